# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Optional dependencies: an error that says which extra brings them."""

from importlib.util import find_spec


def require_extra(module: str, extra: str) -> None:
    """
    Check that an optional dependency is there.

    Args:
        module (`str`): Name of the module, e.g. `"openai"`.
        extra (`str`): Extra of this package that brings it, e.g. `"judge"`.

    Raises:
        `ImportError`: If it is not; the message says how to install it.
    """
    if find_spec(module) is None:
        raise ImportError(f"'{module}' is not installed: pip install 'alphagrpo-ext[{extra}]'")
