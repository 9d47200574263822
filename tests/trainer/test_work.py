# SPDX-License-Identifier: Apache-2.0

"""What a training step pushes through the network, against the least that it can be."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.shapes.prompts import build_dataset
from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trajectory import ImageSegment, Segment, Trajectory
from support.trainers import brightness


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


def turns(trajectory: Trajectory) -> list[dict[str, list[Segment]]]:
    """What each guidance branch is given in every turn, by the task's own rules."""
    system, segments, all_turns = trajectory.segments[0], trajectory.segments, []
    requests: list[Segment] = []
    for i, segment in enumerate(segments):
        if isinstance(segment, ImageSegment) or not segment.sampled:
            continue
        request = segments[i - 1]
        requests.append(request)
        all_turns.append(
            {"full": segments[:i], "text_dropped": segments[: i - 1], "image_dropped": [system, *requests]}
        )
    return all_turns


def beginnings(contexts: list[list[Segment]]) -> set[tuple[str, ...]]:
    """Every beginning of contexts, by contents."""
    names = [tuple(contents(segment) for segment in context) for context in contexts]
    return {name[:length] for name in names for length in range(1, len(name) + 1)}


def contents(segment: Segment) -> str:
    return str(segment.content_ids if not isinstance(segment, ImageSegment) else segment.latents.tolist())


def least_prefill(contexts: list[list[Segment]], read: set[tuple[str, ...]]) -> int:
    """Tokens of contexts without what was read; a context counts once, and not where another one begins with it."""
    of_name = {tuple(map(contents, context)): context for context in contexts}
    total = 0
    for name, context in of_name.items():
        if any(name == other[: len(name)] and name != other for other in of_name):
            continue
        known = max((length for length in range(len(name) + 1) if name[:length] in read), default=0)
        total += num_tokens(*context[known:])
    return total


def least_work(trainer: AlphaGRPOTrainer, trajectories: list[Trajectory], branches: dict[str, list[int]]) -> Counter:
    """
    The least work of one rollout, and of one update on it.

    Args:
        trainer ([`AlphaGRPOTrainer`]): Its configuration.
        trajectories (`list[Trajectory]`): What was sampled, by as many turns each.
        branches (`dict[str, list[int]]`): Denoising steps at which each guidance branch counts.
    """
    args, least = trainer.args, Counter()
    used = [name for name in branches if branches[name]]
    start = trajectories[0].sampled_images[0].window.start
    window = range(start, start + args.sde_window_size)
    trained = {name: len(set(window) & set(branches[name])) for name in used}
    read: set[tuple[str, ...]] = set()
    for turn in range(len(turns(trajectories[0]))):
        given = [turns(trajectory)[turn] for trajectory in trajectories]
        thoughts = [trajectory.sampled_texts[turn] for trajectory in trajectories]
        contexts = [contexts[name] for contexts in given for name in used]
        least["prefill_tokens"] += least_prefill(contexts, read)
        written = [[*of[turn]["full"], t] for of, t in zip(map(turns, trajectories), thoughts, strict=True)]
        read = beginnings([*contexts, *written])
        least["decode_tokens"] += num_tokens(*thoughts)
        # Every token of the longest thought, its start, and its end where that was not sampled.
        least["network_evaluations/decode"] += max(num_tokens(thought) for thought in thoughts)
        least["network_evaluations/prefill"] += 1
        least["network_evaluations/denoise"] += args.num_timesteps - 1
        for name in used:
            least[f"denoise_tokens/{name}"] += len(trajectories) * len(branches[name]) * IMAGE
    # What a trajectory begins with is there, and what it does not begin with serves all that see it.
    elsewhere = []
    for trajectory in trajectories:
        num_copies = len(turns(trajectory)) * sum(trained.values())
        least["training_tokens"] += num_tokens(*trajectory.segments[:-1]) + num_copies * IMAGE
        own = beginnings([trajectory.segments])
        elsewhere += [
            contexts[name]
            for contexts in turns(trajectory)
            for name in used
            if trained[name] and tuple(map(contents, contexts[name])) not in own
        ]
    least["training_tokens"] += least_prefill(elsewhere, set())
    least["network_evaluations/training"] = 1
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


@pytest.mark.parametrize("num_rounds", [1, 3])
@pytest.mark.parametrize("guidance", ["off", "text and image"])
def test_self_reflection_is_at_its_least(make_trainer: MakeTrainer, guidance: str, num_rounds: int) -> None:
    settings, guided = GUIDANCES[guidance]
    settings = {"per_device_train_batch_size": 8, "num_reflection_rounds": num_rounds, **settings}
    judged_prompts = []

    def recording(images: list, prompts: list[str], **kwargs: Any) -> list[float]:
        judged_prompts.append(prompts)
        return brightness(images)

    trainer = make_trainer(task="self_reflection", reward_funcs=recording, **settings)
    trainer.train()
    (update,) = trainer.recorder.updates
    branches = {"full": list(range(5)), **dict.fromkeys(guided, guided_steps(trainer))}
    least = least_work(trainer, update.trajectories, branches)
    # The image that a group sets out to fix: its prompt alone, one evaluation a step, guided by text.
    processor, first = trainer.processing_class, judged_prompts[0]
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
