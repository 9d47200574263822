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

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from server_samples import running


@pytest.fixture(scope="module")
def shapes() -> Iterator[httpx.Client]:
    """A server with the real judge of the shapes world and the packaged model as its painter."""
    with running(judge="shapes", painter="policy", max_items=8, max_questions=16) as client:
        yield client


@pytest.fixture(scope="module")
def plain() -> Iterator[httpx.Client]:
    """A server with the real judge and no painter, and small limits."""
    limits = {"max_items": 3, "max_questions": 8, "max_body_bytes": 200_000}
    with running(judge="shapes", max_image_side=300, max_image_pixels=40_000, **limits) as client:
        yield client
