# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from alphagrpo_ext.reward_client.json_values import has_more_values, size_in_memory


VALUES = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('ab"\\[{,:}]\u0100\U0001f600'), max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(st.sampled_from('a"\\,['), max_size=4), inner),
    max_leaves=30,
)


def count_values(value: Any) -> int:
    """Number of lists, objects, keys and scalars."""
    if isinstance(value, list):
        return 1 + sum(map(count_values, value))
    if isinstance(value, dict):
        return 1 + sum(1 + count_values(entry) for entry in value.values())
    return 1


@settings(deadline=None, database=None, derandomize=True, max_examples=300)
@given(value=VALUES, ascii_only=st.booleans())
def test_the_count_of_values_bounds_their_number(value: Any, ascii_only: bool) -> None:
    text, number = json.dumps(value, ensure_ascii=ascii_only).encode(), count_values(value)
    assert has_more_values(text, number // 4 - 1)
    assert not has_more_values(text, 4 * number)


@settings(deadline=None, database=None, derandomize=True, max_examples=300)
@given(value=VALUES, end=st.text(st.sampled_from('\\"[]{},x'), max_size=8))
def test_what_precedes_an_error_is_counted(value: Any, end: str) -> None:
    number = count_values(value)
    assert has_more_values((json.dumps([value, value])[:-1] + end).encode(), number // 4 - 1)


def size_of_texts(value: Any) -> int:
    """Bytes of all characters of the texts of a value, as Python keeps them."""
    if isinstance(value, str):
        widest = max(map(ord, value), default=0)
        return len(value) * (1 if widest < 0x100 else 2 if widest < 0x10000 else 4)
    if isinstance(value, list):
        return sum(map(size_of_texts, value))
    if isinstance(value, dict):
        return sum(size_of_texts(key) + size_of_texts(entry) for key, entry in value.items())
    return 0


@settings(deadline=None, database=None, derandomize=True, max_examples=300)
@given(value=VALUES, ascii_only=st.booleans())
def test_size_in_memory_bounds_that_of_texts(value: Any, ascii_only: bool) -> None:
    assert size_in_memory(json.dumps(value, ensure_ascii=ascii_only).encode()) >= size_of_texts(value)


def test_one_wide_character_makes_its_own_text_wide_alone() -> None:
    ascii_text = json.dumps(["a" * 100, {"key": 'b"\\'}])
    assert size_in_memory(ascii_text.encode()) == len(ascii_text)
    for character in ("\U0001f600", "\\u0100"):
        size = size_in_memory(f'["{"a" * 100}", "{character}bc"]'.encode())
        assert size == 100 + 4 * 3 + len("[, ]")
