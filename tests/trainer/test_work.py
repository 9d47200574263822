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

"""What a training step pushes through the network, against the least that it can be."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.shapes import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trajectory import ImageSegment, Segment, Trajectory


MakeTrainer = Callable[..., AlphaGRPOTrainer]
LATENTS, PATCHES, DELIMITERS = 36, 36, 2
IMAGE = LATENTS + DELIMITERS


def num_tokens(*segments: Segment) -> int:
    """Tokens of segments as context: a text, or an image for the decoder and, if it is looked at, the vision tower."""
    total = 0
    for segment in segments:
        if isinstance(segment, ImageSegment):
            total += IMAGE + (PATCHES + DELIMITERS if segment.pixel_values is not None else 0)
        else:
            total += len(segment.content_ids) + DELIMITERS
    return total


def branch_contexts(trajectory: Trajectory) -> dict[str, list[Segment]]:
    """What each guidance branch of a trajectory of one turn is given, by the task's own rules."""
    system, *given = trajectory.segments[:-2]
    image = [segment for segment in given if isinstance(segment, ImageSegment)]
    texts = [segment for segment in given if not isinstance(segment, ImageSegment)]
    return {"full": [system, *given], "text_dropped": [system, *image], "image_dropped": [system, *texts]}


def least_work(trainer: AlphaGRPOTrainer, trajectories: list[Trajectory], branches: dict[str, list[int]]) -> Counter:
    """
    The least work of one rollout of trajectories of one turn, and of one update on it.

    Args:
        trainer ([`AlphaGRPOTrainer`]): Its configuration.
        trajectories (`list[Trajectory]`): What was sampled.
        branches (`dict[str, list[int]]`): Denoising steps at which each guidance branch counts.
    """
    args, least = trainer.args, Counter()
    prompts = {str(trajectory.segments[-3].token_ids): trajectory for trajectory in trajectories}
    thoughts = [trajectory.sampled_texts[0] for trajectory in trajectories]
    used = [name for name in branches if branches[name]]
    for trajectory in prompts.values():
        least["prefill_tokens"] += sum(num_tokens(*branch_contexts(trajectory)[name]) for name in used)
    least["decode_tokens"] = num_tokens(*thoughts)
    for name in used:
        least[f"denoise_tokens/{name}"] = len(trajectories) * len(branches[name]) * IMAGE
    window = range(
        trajectories[0].sampled_images[0].window.start,
        trajectories[0].sampled_images[0].window.start + args.sde_window_size,
    )
    trained = {name: len(set(window) & set(branches[name])) for name in used}
    for trajectory, thought in zip(trajectories, thoughts, strict=True):
        least["training_tokens"] += (
            num_tokens(*branch_contexts(trajectory)["full"], thought) + sum(trained.values()) * IMAGE
        )
    for trajectory in prompts.values():
        contexts = branch_contexts(trajectory)
        for name in used:
            # What the trajectories of a prompt begin with is there, and what they do not serves all of them.
            begins = contexts["full"][: len(contexts[name])] == contexts[name]
            least["training_tokens"] += num_tokens(*contexts[name]) if trained[name] and not begins else 0
    least["network_evaluations/prefill"] = least["network_evaluations/training"] = 1
    # Every token of the longest thought, its start, and its end where that was not sampled.
    least["network_evaluations/decode"] = max(num_tokens(thought) for thought in thoughts)
    least["network_evaluations/denoise"] = args.num_timesteps - 1
    return least


def work(trainer: AlphaGRPOTrainer) -> dict[str, float]:
    """What the first step logged."""
    entry = trainer.state.log_history[0]
    return {name.removeprefix("work/"): value for name, value in entry.items() if name.startswith("work/")}


def assert_least(actual: dict[str, float], least: Counter) -> None:
    without_padding = {name: value for name, value in actual.items() if name != "padding_tokens"}
    assert {name: value for name, value in without_padding.items() if value} == dict(least)


def guided_steps(trainer: AlphaGRPOTrainer) -> list[int]:
    """Steps inside the guidance interval."""
    low, high = trainer.args.cfg_interval
    times = flow_timesteps(trainer.args.num_timesteps, trainer.args.timestep_shift)[:-1].tolist()
    return [i for i, time in enumerate(times) if low < time <= high]


GUIDANCES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "part of the window": ({"cfg_interval": [0.5, 1.0]}, ("text_dropped",)),
    "off": ({"cfg_text_scale": 1.0, "cfg_img_scale": 2.0}, ()),
    "nowhere on the schedule": ({"cfg_interval": [0.65, 0.75]}, ()),
    "text and image": ({"cfg_img_scale": 2.0, "cfg_interval": [0.3, 0.9]}, ("text_dropped", "image_dropped")),
}


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_reasoning_is_at_its_least(make_trainer: MakeTrainer, guidance: str) -> None:
    settings, guided = GUIDANCES[guidance]
    trainer = make_trainer(per_device_train_batch_size=8, **settings)
    trainer.train()
    (update,) = trainer.recorder.updates
    assert len({str(t.segments[1].token_ids) for t in update.trajectories}) == 2
    branches = {"full": list(range(5)), **dict.fromkeys(guided, guided_steps(trainer))}
    assert_least(work(trainer), least_work(trainer, update.trajectories, branches))


@pytest.mark.parametrize("guidance", ["off", "text and image"])
def test_self_reflection_is_at_its_least(make_trainer: MakeTrainer, guidance: str) -> None:
    settings, guided = GUIDANCES[guidance]
    trainer = make_trainer(task="self_reflection", per_device_train_batch_size=8, **settings)
    trainer.train()
    (update,) = trainer.recorder.updates
    branches = {"full": list(range(5)), **dict.fromkeys(guided, guided_steps(trainer))}
    least = least_work(trainer, update.trajectories, branches)
    # The image that a group sets out to fix: its prompt alone, one evaluation a step, guided by text.
    processor, first = trainer.processing_class, [row["prompt"] for row in trainer._rows[::4]]
    assert len(first) == 2
    least["prefill_tokens"] += sum(num_tokens(processor.text_segment(prompt)) for prompt in first)
    least["network_evaluations/prefill"] += 1
    least["network_evaluations/denoise"] += trainer.args.num_timesteps - 1
    for name in [name for name in branches if name != "image_dropped"]:
        least[f"denoise_tokens/{name}"] += len(first) * len(branches[name]) * IMAGE
    assert_least(work(trainer), least)


def test_prompt_that_fills_several_groups_is_prefilled_once(make_trainer: MakeTrainer) -> None:
    rows = build_dataset("train", 8, seed=0).select([0, 0])
    trainer = make_trainer(datasets={"train_dataset": rows}, per_device_train_batch_size=8)
    trainer.train()
    (update,) = trainer.recorder.updates
    branches = {"full": list(range(5)), "text_dropped": guided_steps(trainer)}
    assert_least(work(trainer), least_work(trainer, update.trajectories, branches))


def test_old_and_reference_policies_are_counted_apart_and_evaluations_not_at_all(make_trainer: MakeTrainer) -> None:
    plain = make_trainer(max_steps=2)
    plain.train()
    trainer = make_trainer(max_steps=2, image_beta=0.1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    first, second = ([e for e in t.state.log_history if "work/decode_tokens" in e] for t in (plain, trainer))
    for entry, other in zip(first, second, strict=True):
        assert other["work/scoring_tokens"] == other["work/training_tokens"] == entry["work/training_tokens"]
        assert entry["work/scoring_tokens"] == 0
        assert other["work/network_evaluations/denoise"] == entry["work/network_evaluations/denoise"] == 5
    assert trainer.model.work is None
