# SPDX-License-Identifier: Apache-2.0

"""Commands of the READMEs, shortened so that a machine without a GPU and without the 7B weights runs them in seconds."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from unittest import mock

from support.readme_commands import ROOT


CHAT_URL = "CHAT_URL"
JUDGE_URL = "JUDGE_URL"
"""What stands for the addresses of the two endpoints until they are running."""
REPLACED = {
    "--base_url": CHAT_URL,
    "--judge_base_url": JUDGE_URL,
    "--model_name_or_path": "bagel-shapes",
    # An absolute one would be outside of the test's folder.
    "--output_dir": "runs/output",
    "--seed": "0",
    "--num_workers": "2",
    "--use_gpu": "false",
    # Processors that do not know bfloat16 are slow at it.
    "--dtype": "float32",
}
"""Values of arguments that a command gives, by their names."""
SHORT = {
    # Training
    "--max_steps": "1",
    "--num_train_prompts": "8",
    "--num_eval_prompts": "7",
    "--eval_questions": "8",
    "--per_device_train_batch_size": "4",
    "--num_generations": "4",
    "--gradient_accumulation_steps": "1",
    "--logging_steps": "1",
    # Images and texts
    "--height": "24",
    "--width": "24",
    "--image_height": "24",
    "--image_width": "24",
    "--max_completion_length": "8",
    "--max_new_tokens": "8",
    "--num_timesteps": "4",
    "--eval_num_timesteps": "4",
    "--sde_window_size": "1",
    "--sde_window_range": "0 2",
    # Amounts
    "--num_prompts": "4",
    "--num_images": "1",
    "--num_groups": "2",
    "--limit": "2",
    # Of benchmark.py
    "--parts": "structures",
    "--repetitions": "1",
    "--num_trajectories": "1",
    # Of pretrain_shapes.py
    "--vae_steps": "2",
    "--decoder_steps": "2",
    "--steps": "2",
    "--vision_steps": "2",
    "--vision_answers": "4",
    "--num_paintings": "4",
    "--grounding_rounds": "1",
    "--grounding_steps": "2",
    # Of reproduce_tables.py
    "--only": "categories",
    "--seeds": "0",
    # Of weight_digests.py
    "--runs": "reasoning_t2i",
}
"""Values of arguments of every command whose script has them."""
ADDED = {"--eval_seeds": "1"}
"""The same, where a command does not give them itself."""
WITH_CONFIG = {"--model_name_or_path": "bagel-shapes", "--dtype": "float32", "--bf16": "false"}
"""The same, where a command names a configuration, which is that of the 7B model."""
UNCHANGED = ("recipes/estimate_memory.py",)
"""Scripts that run here as they are."""
LAUNCHED = {"--num_processes": "2", "--mixed_precision": "no", "--main_process_port": "0"}
"""Arguments of `accelerate launch` where it starts several processes."""


NOT_RUN = {
    "pip install": "it would change the environment of the tests; `.ci/run` installs the package as README says",
    "python -m venv": "the same",
    ". .venv/bin/activate": "the same",
    "pre-commit install": "it would change the hooks of the repository",
    "vllm serve": "it needs a GPU",
    "python recipes/gpu_check.py": "it needs a GPU; `tests/recipes/test_gpu_check.py` runs it on a CPU",
    "jupyter lab": "it waits for a reader; `tests/recipes/test_quickstart.py` runs the notebook",
    "curl": "the block is run as a whole, against a server, by `tests/reward_models/server/test_process.py`",
    "python -c": "the same block",
}
"""Beginnings of commands that no test runs by themselves, and why."""


class KnownOptions(Exception):
    """Ends a script when it parses its command line, with the names of its arguments."""


@cache
def known_options(script: str) -> frozenset[str]:
    """Names of the arguments of a script of this repository, with their dashes."""
    if script == "recipes/ray_train.py":
        # It passes its command line on to a recipe.
        return known_options("recipes/reasoning_t2i.py")

    def stop(parser: argparse.ArgumentParser, *args: object, **options: object) -> None:
        raise KnownOptions(frozenset(parser._option_string_actions))

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [script]),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except KnownOptions as known:
            return known.args[0]
    raise ValueError(f"{script} does not parse its command line")


def reason_not_to_run(command: Sequence[str]) -> str | None:
    """Why a command is not run, or `None` if it is."""
    text = f"{' '.join(command)} "
    return next((reason for start, reason in NOT_RUN.items() if text.startswith(f"{start} ")), None)


def script_of(command: Sequence[str]) -> str | None:
    """The script of this repository that `python` or `accelerate launch` runs, if it runs one."""
    scripts = [word for word in command if word.endswith(".py")]
    return scripts[0] if scripts and command[0] in ("accelerate", "python") else None


def script_arguments(command: Sequence[str]) -> list[str]:
    """What stands behind the script of a command."""
    return list(command[command.index(script_of(command)) + 1 :])


def split_options(words: Sequence[str]) -> dict[str, list[str]]:
    """From arguments to their values, by name. What stands before the first name is under the empty name."""
    options: dict[str, list[str]] = {"": []}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options[name] = [value] if equals else []
        else:
            options[name].append(word)
    return options


def join_options(options: Mapping[str, Sequence[str]]) -> list[str]:
    return [word for name, values in options.items() for word in ((name,) if name else ()) + tuple(values)]


def laptop_options(script: str, words: Sequence[str]) -> list[str]:
    """The arguments of a script, shortened by the tables above."""
    options = split_options(words)
    if script in UNCHANGED or "--help" in options:
        return list(words)
    known = known_options(script)
    values = ADDED if "--config" not in options else {**ADDED, **WITH_CONFIG}
    values = {name: value for name, value in values.items() if name in known and name not in options}
    values |= {name: value for name, value in SHORT.items() if name in known}
    values |= {name: value for name, value in REPLACED.items() if name in options}
    return join_options({**options, **{name: value.split() for name, value in values.items()}})


def laptop_command(command: Sequence[str]) -> list[str]:
    """A command that runs a script by `python` or `accelerate launch`, shortened."""
    script = script_of(command)
    launcher = list(command[: command.index(script)])
    if {"--config_file", "--multi_gpu"} & set(launcher):
        launcher += join_options({name: [value] for name, value in LAUNCHED.items()})
    if "--config_file" in launcher:
        # Accelerate alone would not shard without a GPU.
        launcher.append("tests/support/launch_on_cpu.py")
    return [*launcher, script, *laptop_options(script, script_arguments(command))]
