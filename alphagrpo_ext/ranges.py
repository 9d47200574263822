# SPDX-License-Identifier: Apache-2.0

"""
Ranges of numeric settings, stated beside the fields that hold them.

The annotation of a field names its range, in the notation of intervals: `top_p: Annotated[float, "(0, 1]"]`. [`check_ranges`]
compares the values of all fields with them. Without a range a number must be finite all the same, because NaN passes every
comparison that is written to refuse a value.
"""

from __future__ import annotations

import functools
import math
import numbers
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


PositiveInt = Annotated[int, "[1, inf)"]
NonNegativeInt = Annotated[int, "[0, inf)"]
AtLeastTwo = Annotated[int, "[2, inf)"]
PositiveFloat = Annotated[float, "(0, inf)"]
NonNegativeFloat = Annotated[float, "[0, inf)"]
UnitFloat = Annotated[float, "[0, 1]"]
PositiveUnitFloat = Annotated[float, "(0, 1]"]


def check_ranges(settings: Any, ranges: Mapping[str, str] | None = None) -> None:
    """
    Check the numbers of a dataclass: finite, in the range of their field, whole where the field holds whole numbers. `None`
    passes where the field may be `None`. The numbers in lists and dictionaries are checked one by one.

    Args:
        settings: An object of a dataclass.
        ranges (`Mapping[str, str]`, *optional*): Ranges of inherited fields, by name.

    Raises:
        `ValueError`: At the first number that is refused; the message begins with the name of its field.
    """
    for name, (numeric_types, own_range) in _numeric_fields(type(settings)).items():
        value = getattr(settings, name)
        interval = (ranges or {}).get(name, own_range)
        if numeric_types is not None and not _is_number(value) and not (value is None and type(None) in numeric_types):
            raise ValueError(f"{name} must be a number, but is {value!r}")
        for place, number in _numbers(value, name):
            check_number(place, number, interval)
        if numeric_types is not None and float not in numeric_types and _is_number(value) and value % 1:
            raise ValueError(f"{name} must be a whole number, but is {value!r}")


def number_or_word(name: str, value: Any, words: Sequence[str]) -> int | str:
    """
    Read a setting that is a whole number of at least 1 or one of a few words; a command line gives both as texts.

    Args:
        name (`str`): What the message calls it.
        value: The number, also as a text, or the word.
        words (`Sequence[str]`): The words.

    Raises:
        `ValueError`: If it is neither.
    """
    if value in words:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not number >= 1 or number % 1:
        raise ValueError(
            f"{name} must be {', '.join(map(repr, words))} or a whole number of at least 1, but is {value!r}"
        )
    return int(number)


def check_number(name: str, value: float, interval: str | None = None) -> None:
    """
    Check one number.

    Args:
        name (`str`): What the message calls it.
        value (`float`): The number.
        interval (`str`, *optional*): Its range, e.g. `"[0, 1)"`; a bound may be `inf`. `None` takes every finite number.

    Raises:
        `ValueError`: If the number is NaN, infinite or outside the range.
    """
    if math.isfinite(value) and (interval is None or in_range(value, interval)):
        return
    rule = "be a finite number" if interval is None else _rule(interval)
    raise ValueError(f"{name} must {rule}, but is {value}")


def in_range(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as `"(0, 1]"`. NaN lies in none."""
    low, high = _bounds(interval)
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below


@functools.cache
def _bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _rule(interval: str) -> str:
    low, high = _bounds(interval)
    if math.isfinite(high):
        return f"be in {interval}"
    if low:
        return f"be {'at least' if interval[0] == '[' else 'above'} {low:g}"
    return "not be negative" if interval[0] == "[" else "be positive"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers in a value, each with its place, e.g. `"interval[0]"`."""
    if _is_number(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}[{key!r}]")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{name}[{index}]")


@functools.cache
def _numeric_fields(kind: type) -> dict[str, tuple[frozenset[type] | None, str | None]]:
    """
    Types and range of every field of a dataclass that can hold a number. The types are `None` where it can hold something else
    as well, or several numbers.
    """
    with_ranges = get_type_hints(kind, include_extras=True)
    found = {}
    for name, hint in get_type_hints(kind).items():
        members = frozenset(get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,))
        is_number = members <= {int, float, type(None)}
        found[name] = (members if is_number else None, next(_intervals(with_ranges[name]), None))
    return {field.name: found[field.name] for field in fields(kind)}


def _intervals(hint: Any) -> Iterator[str]:
    """The ranges in a type, e.g. in that of a list of numbers."""
    if get_origin(hint) is Annotated:
        yield from (extra for extra in hint.__metadata__ if isinstance(extra, str))
    for part in get_args(hint):
        yield from _intervals(part)
