# SPDX-License-Identifier: Apache-2.0

"""Every option of TRL's configuration has a place in the table, and those that are refused are."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from alphagrpo_ext.trainer import AlphaGRPOConfig
from alphagrpo_ext.trainer.trl_options import KEPT_OPTIONS, REFUSED_OPTIONS


VALUES: dict[str, Any] = {
    "min_p": 0.1,
    "generation_kwargs": {"num_beams": 2},
    "chat_template_kwargs": {"enable_thinking": False},
    "cache_implementation": "static",
    "max_tool_calling_iterations": 1,
    "neftune_noise_alpha": 5.0,
    "liger_kernel_config": {"rope": True},
    "transformers_continuous_batching_config": {"max_memory_percent": 0.5},
    "debug": "underflow_overflow",
    "label_smoothing_factor": 0.1,
    "vllm_importance_sampling_clip_max": 2.0,
    "vllm_importance_sampling_clip_min": 0.1,
    "vllm_importance_sampling_cap": 2.0,
    "vllm_max_model_length": 64,
    "vllm_server_base_url": "http://localhost:8000",
    "vllm_structured_outputs_regex": ".*",
}
"""Values of options whose default says nothing of their type."""


def other_value(name: str) -> Any:
    default = next(field.default for field in fields(GRPOConfig) if field.name == name)
    assert default is not MISSING
    if name in VALUES:
        return VALUES[name]
    if isinstance(default, bool):
        return not default
    return {
        int: lambda: default + 1,
        float: lambda: default / 2,
        str: lambda: {"colocate": "server"}.get(default, "x"),
    }[type(default)]()


def test_every_option_of_trl_is_kept_or_refused() -> None:
    """A new option of TRL fails here: try whether it has an effect with this trainer, then add it to one of the two."""
    assert KEPT_OPTIONS | REFUSED_OPTIONS.keys() == {field.name for field in fields(GRPOConfig)}
    assert not KEPT_OPTIONS & REFUSED_OPTIONS.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(REFUSED_OPTIONS))
def test_refused_options_are_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    value = other_value(name)
    with pytest.raises(ValueError, match=f"does not take .*{name}=") as error:
        AlphaGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})
    assert REFUSED_OPTIONS[name] in str(error.value)


def test_all_refused_options_are_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"min_p=0.1: .*; repetition_penalty=1.2: .* Leave them out"):
        AlphaGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, min_p=0.1, repetition_penalty=1.2)


def test_empty_values_are_no_values(tmp_path: Path) -> None:
    AlphaGRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, generation_kwargs={}, chat_template_kwargs="{}", min_p=0.0
    )
