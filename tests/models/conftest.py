# SPDX-License-Identifier: Apache-2.0

import pytest

from support.tiny_bagel import make_tiny_bagel, rollout, tiny_bagel  # noqa: F401
from support.toy_fixtures import installed_toy_family, toy_model  # noqa: F401


pytest.register_assert_rewrite("models.conformance")
