# SPDX-License-Identifier: Apache-2.0

import math
from email.utils import formatdate

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphagrpo_ext.reward_client.retry_after import retry_after_seconds


NOW = 784111777.0  # Sun, 06 Nov 1994 08:49:37 GMT


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:47 GMT"}, 10.0),
        ({"retry-after": "Sunday, 06-Nov-94 08:49:47 GMT"}, 10.0),
        ({"retry-after": "Sun Nov  6 08:49:47 1994"}, 10.0),
        ({"retry-after": "Sun, 06 Nov 1994 09:49:47 +0100"}, 10.0),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:27 GMT"}, 0.0),
        ({"retry-after": "9" * 400}, math.inf),
        ({"retry-after": "5, 5"}, 5.0),
        ({"retry-after": "10,9.5"}, 10.0),
        ({"retry-after-ms": "250, 500", "retry-after": "7"}, 0.5),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:47 GMT, Sun, 06 Nov 1994 08:49:47 GMT"}, 10.0),
        ({"retry-after": "5, soon"}, None),
        ({}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e3"}, None),
        ({"retry-after": "Sun, 99 Nov 1994 08:49:47 GMT"}, None),
    ],
)
def test_every_form_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_seconds(headers, NOW) == seconds
    assert retry_after_seconds(httpx.Headers({name.title(): value for name, value in headers.items()}), NOW) == seconds


@given(st.integers(min_value=0, max_value=10**6))
def test_a_date_counts_from_now(seconds: int) -> None:
    assert retry_after_seconds({"retry-after": formatdate(NOW + seconds, usegmt=True)}, NOW) == seconds


@given(st.text())
def test_anything_else_is_no_wait(value: str) -> None:
    seconds = retry_after_seconds({"retry-after": value, "retry-after-ms": value}, NOW)
    assert seconds is None or seconds >= 0
