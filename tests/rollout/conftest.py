# SPDX-License-Identifier: Apache-2.0

from support.tiny_bagel import make_tiny_bagel, rollout, tiny_bagel  # noqa: F401
