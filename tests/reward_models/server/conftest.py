# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from support.server_samples import running


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
