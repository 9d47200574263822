# SPDX-License-Identifier: Apache-2.0

"""Numbers of settings: every dataclass of arguments refuses NaN, infinity and what is out of range, by the name of the field."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import GRPOConfig

from alphagrpo_ext.ranges import NonNegativeFloat, PositiveInt, UnitFloat, check_number, check_ranges, in_range
from alphagrpo_ext.trainer.config import INHERITED_RANGES, AlphaGRPOConfig
from reward_models.endpoints.endpoint import OpenAIEndpoint


ROOT = Path(__file__).parents[1]
NOT_FINITE = (math.nan, math.inf, -math.inf)

REQUIRED: dict[str, dict[str, Any]] = {
    "AlphaGRPOConfig": {"output_dir": "unused", "report_to": "none", "use_cpu": True},
    "RolloutConfig": {"height": 24, "width": 24},
    "StructuredChat": {"endpoint": OpenAIEndpoint("http://127.0.0.1:1/v1", "m")},
    "OpenAIJudge": {"endpoint": None},
    "ExportArguments": {"prompts": "prompts.jsonl"},
    "ConversionArguments": {"model_name_or_path": "bagel-shapes", "layout": "released", "output_dir": "unused"},
}
"""What a class cannot be made without."""


def argument_classes() -> list[type]:
    """
    All dataclasses of the project whose fields are settings: those with help texts, and those that declare ranges. Names of
    modules that need an optional package are skipped.
    """
    found = {}
    for path in sorted(p for s in ("alphagrpo_ext", "reward_models", "recipes") for p in (ROOT / s).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "@dataclass" not in text:
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(parts[1:] if parts[0] == "recipes" else parts))
        for name, kind in vars(module).items():
            is_own = inspect.isclass(kind) and kind.__module__ == module.__name__
            if is_own and dataclasses.is_dataclass(kind) and not name.startswith("_") and has_settings(kind):
                found[name] = kind
    return list(found.values())


def has_settings(kind: type) -> bool:
    return any("help" in f.metadata for f in dataclasses.fields(kind)) or "check_ranges" in vars_of_post_init(kind)


def vars_of_post_init(kind: type) -> tuple[str, ...]:
    method = vars(kind).get("__post_init__")
    return method.__code__.co_names if method is not None else ()


CLASSES = argument_classes()


def float_fields(kind: type) -> Iterator[tuple[str, Any]]:
    """Fields that can hold a float, each with a function that puts a number where the field holds one."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        members = union_members(hints[f.name])
        if float in members:
            yield f.name, lambda value: value
        elif any(get_origin(m) in (list, tuple) and float in get_args(m) for m in members):
            yield f.name, lambda value: [0.5, value]


def union_members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def make(kind: type, values: Mapping[str, Any]) -> Any:
    return kind(**{**REQUIRED.get(kind.__name__, {}), **values})


def test_all_classes_of_arguments_are_found() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert names >= {
        *(
            "AlphaGRPOConfig",
            "SamplingArguments",
            "JudgeArguments",
            "RewardArguments",
            "PromptArguments",
            "HoldoutArguments",
        ),
        *("ServerArguments", "PainterArguments", "DecomposerArguments", "EvaluationArguments", "ExportArguments"),
        *("GenerationArguments", "PretrainingArguments", "MemorySettings", "RayArguments"),
        *("RolloutConfig", "DenoisingConfig", "GuidanceConfig", "ObjectiveConfig", "OpenAIEndpoint", "StructuredChat"),
    }


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_defaults_are_in_range(kind: type) -> None:
    assert make(kind, {}) is not None


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_float_refuses_what_is_not_finite_by_name(kind: type) -> None:
    for name, place in float_fields(kind):
        for value in NOT_FINITE:
            with pytest.raises(ValueError, match=rf"\b{name}\b"):
                make(kind, {name: place(value)})


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_whole_numbers_refuse_fractions(kind: type) -> None:
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        members = set(union_members(hints[f.name]))
        if f.init and int in members and members <= {int, type(None)}:
            with pytest.raises(ValueError, match=rf"\b{f.name}\b"):
                make(kind, {f.name: 7.5})


def ranged_fields() -> list[tuple[type, str, str]]:
    """Class, field and range of every field that declares one."""
    found = []
    for kind in CLASSES:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            for member in union_members(hint):
                if get_origin(member) is Annotated:
                    found.append((kind, name, member.__metadata__[0]))
    return found


RANGED = ranged_fields()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.sampled_from(RANGED), value=st.one_of(st.floats(-1e9, 1e9), st.integers(-(10**6), 10**6)))
def test_values_out_of_range_are_refused_by_name(place: tuple[type, str, str], value: float) -> None:
    kind, name, interval = place
    if kind.__name__ == "AlphaGRPOConfig" or in_range(value, interval):
        return  # A configuration of the trainer takes long; its fields are tried below.
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        make(kind, {name: value})


def test_trainer_refuses_values_out_of_range_by_name() -> None:
    own = {name: interval for kind, name, interval in RANGED if kind is AlphaGRPOConfig}
    assert len(own) > 30
    for name, interval in {**own, **INHERITED_RANGES}.items():
        low = float(interval[1:-1].split(",")[0])
        value = low if interval[0] == "(" else low - 1
        with pytest.raises(ValueError, match=rf"^{name} must "):
            make(AlphaGRPOConfig, {name: int(value)})


def test_trainer_knows_its_inherited_fields() -> None:
    names = {f.name for f in dataclasses.fields(GRPOConfig)}
    assert set(INHERITED_RANGES) <= names


@given(
    value=st.floats(allow_nan=True, allow_infinity=True),
    bounds=st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)).map(sorted),
    ends=st.sampled_from(["[]", "()", "(]", "[)"]),
)
def test_number_is_refused_exactly_outside_of_its_interval(value: float, bounds: list[float], ends: str) -> None:
    low, high = bounds
    inside = (low <= value if ends[0] == "[" else low < value) and (value <= high if ends[1] == "]" else value < high)
    interval = f"{ends[0]}{low!r}, {high!r}{ends[1]}"
    if inside:
        check_number("level", value, interval)
    else:
        with pytest.raises(ValueError, match="^level must be in "):
            check_number("level", value, interval)


@dataclass
class Inner:
    count: PositiveInt = 1
    share: UnitFloat | None = 0.5
    weights: list[NonNegativeFloat] = field(default_factory=list)
    extra: dict[str, Any] | str | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be at least 1, but is 0"),
        ({"count": True}, "count must be a number, but is True"),
        ({"count": "3"}, "count must be a number, but is '3'"),
        ({"count": None}, "count must be a number, but is None"),
        ({"count": 1.5}, "count must be a whole number, but is 1.5"),
        ({"share": 1.1}, r"share must be in \[0, 1\], but is 1.1"),
        ({"weights": [1.0, -1.0]}, r"weights\[1\] must not be negative, but is -1.0"),
        ({"extra": {"a": [0.0, math.nan]}}, r"extra\['a'\]\[1\] must be a finite number, but is nan"),
    ],
)
def test_messages_name_field_value_and_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_ranges(Inner(**values))


def test_what_may_be_left_out_may_be_none() -> None:
    check_ranges(Inner(share=None, weights=[], extra="text"))
    check_ranges(Inner(count=2, share=1, weights=[0, 2.5], extra={"model": "m", "n": 3}))


def test_ranges_of_inherited_fields_are_given_apart() -> None:
    with pytest.raises(ValueError, match="^share must be in \\[0, 0.4\\], but is 0.5$"):
        check_ranges(Inner(), {"share": "[0, 0.4]"})
