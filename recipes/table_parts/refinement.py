# SPDX-License-Identifier: Apache-2.0

"""Tables of `self_reflection.py`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from reward_models.evaluation.statistics import standard_error
from table_parts.plan import Plan, Run
from table_parts.results import ScoredSamples, over_seeds, percent, points, read_summary
from table_parts.tables import MeasuredTable, one_line


UNWEIGHTED = ("--text_loss_weight", "1")
STRENGTH = ("--refine_strength", "0.9")
FROM_THE_IMAGE = (*STRENGTH, "--sde_window_range", "1", "6")
AFTER_PAINTING = (*FROM_THE_IMAGE, "--allow_stop", "false", "--num_initial_images", "3", "--learning_rate", "1e-4")
AFTER_PAINTING += ("--text_loss_weight", "0.05")
NUM_REFINING_ROUNDS = 2


def reflection_table(plan: Plan) -> MeasuredTable:
    """What refinement adds to an image, before and after training."""
    default = plan.default_reflection()
    seeds = [one_line(f"trained, seed {s}", [run], _after) for s, run in zip(plan.seeds, default, strict=True)]
    return MeasuredTable(
        "Self-reflection",
        (
            "policy",
            "reward of initial → refined image",
            "strict pass",
            "improved / worsened / unchanged",
            "fixed",
            "broken",
        ),
        (
            one_line("untrained", default[:1], lambda folders: _refinement([read_summary(folders[0])["before"]])),
            *seeds,
            one_line("**trained, mean of the seeds**", default, _after),
            one_line(
                "`--rectification off`, mean of the seeds",
                plan.reflection("reflection_unrectified", "--rectification", "off"),
                _after,
            ),
        ),
        "In brackets the gain in points: `+-` is its standard error over prompts where the row is of one run, `sd` the standard "
        "deviation between seeds.",
    )


def _after(folders: Sequence[Path]) -> list[str]:
    return _refinement([read_summary(folder)["after"] for folder in folders])


def _refinement(parts: Sequence[dict[str, Any]]) -> list[str]:
    def mean(*names: str) -> float:
        values = []
        for part in parts:
            for name in names:
                part = part[name]
            values.append(part)
        return fmean(values)

    changes = "/".join(f" {percent(mean(name))} " for name in ("improved", "worsened", "unchanged")).strip()
    return [
        f"{mean('initial', 'reward'):.3f} → {mean('refined', 'reward'):.3f}",
        f"{percent(mean('initial', 'strict_pass_rate'))} → {percent(mean('refined', 'strict_pass_rate'))} ({_gain_of(parts)})",
        changes,
        percent(mean("fixed")),
        percent(mean("broken")),
    ]


def _gain_of(parts: Sequence[dict[str, Any]]) -> str:
    gains = [part["refined"]["strict_pass_rate"] - part["initial"]["strict_pass_rate"] for part in parts]
    return points(gains[0], parts[0]["gain_error"]) if len(parts) == 1 else over_seeds(gains, points)


def reflection_settings_table(plan: Plan) -> MeasuredTable:
    """How the gain of refinement depends on settings."""
    last, ends = plan.seeds[-1:], list(dict.fromkeys([plan.seeds[0], plan.seeds[-1]]))
    settings: dict[str, tuple[Run, ...]] = {
        "text loss weight 1, learning rate 5e-5": plan.reflection("reflection_weight_1", *UNWEIGHTED),
        "the same at 2e-5": plan.reflection("reflection_rate_2", *UNWEIGHTED, "--learning_rate", "2e-5", seeds=last),
        "the same at 3e-5, groups of 16": plan.reflection(
            "reflection_groups_16", *UNWEIGHTED, "--learning_rate", "3e-5", "--num_generations", "16", seeds=last
        ),
        "weight 1, every second prompt a reasoning text-to-image": plan.reflection(
            "reflection_mixed", *UNWEIGHTED, "--train_tasks", "self_reflection", "reasoning_t2i", seeds=ends
        ),
        "text loss weight 0.05": plan.reflection("reflection_weight_0.05", "--text_loss_weight", "0.05", seeds=last),
        "`--refine_strength 0.9`": plan.reflection("reflection_strength", *FROM_THE_IMAGE, seeds=last),
        "the recipe's, with text loss weight 0": plan.default_reflection(),
    }
    return MeasuredTable(
        "Self-reflection: settings",
        ("setting", "seeds", "gain"),
        tuple(
            one_line(label, runs, lambda folders: [", ".join(map(_seed, folders)), ", ".join(map(_own_gain, folders))])
            for label, runs in settings.items()
        ),
        "Gain: strict pass of the refined minus that of the initial image, in points, with its standard error over prompts.",
    )


def refinement_after_painting_table(plan: Plan) -> MeasuredTable:
    """Refinement by a model that was trained on text-to-image before, against the better of two fresh images."""
    painters = {seed: plan.training("painting", seed, "--max_steps", "80") for seed in plan.seeds}
    trained = [
        plan.training(
            *("refinement", seed, "--model_name_or_path", str(painter.folder), *AFTER_PAINTING),
            recipe="self_reflection",
            needs=(painter,),
        )
        for seed, painter in painters.items()
    ]
    models: dict[str, Sequence[Run | None]] = {
        "untrained": [None],
        **{f"text-to-image, seed {seed}": [painter] for seed, painter in painters.items()},
        **{f"then refinement, seed {seed}": [run] for seed, run in zip(plan.seeds, trained, strict=True)},
        "**then refinement, mean of the seeds**": trained,
    }
    return MeasuredTable(
        "Refinement after text-to-image",
        ("trained on", "first image", *(f"after round {n + 1}" for n in range(NUM_REFINING_ROUNDS)), "better of two"),
        tuple(
            one_line(label, [run for model in group for run in _painted_and_judged(plan, model)], _rounds_and_choices)
            for label, group in models.items()
        ),
        f"Strict pass; in brackets the gain over the first image in points, where `+-` is its standard error over prompts and `sd` the "
        f"standard deviation between seeds. 80 steps of text-to-image, then `self_reflection.py {' '.join(AFTER_PAINTING)}`. No round "
        f"may keep its image. *Better of two*: of two fresh images, the one to which the policy itself gives the higher reward.",
    )


def _painted_and_judged(plan: Plan, model: Run | None) -> list[Run]:
    """Rounds of refinement as the pixels score them, and the first images once more as their own policy scores them."""
    own = plan.args.model_name_or_path if model is None else str(model.folder)
    judge = ("--judge", "policy", "--judge_model", own, "--judge_min_answer_mass", "0")
    rounds = ("--num_rounds", str(NUM_REFINING_ROUNDS), *STRENGTH)
    return [
        plan.evaluation("refining", model, *rounds, num_stages=NUM_REFINING_ROUNDS + 1),
        plan.evaluation("own_scores", model, *judge, num_stages=2),
    ]


def _rounds_and_choices(folders: Sequence[Path]) -> list[str]:
    stages = [list(ScoredSamples.read(folder).values()) for folder in folders[::2]]
    firsts = [first for first, *_ in stages]
    chosen = [
        _better_of_two(first, own)
        for first, own in zip(firsts, (ScoredSamples.read(folder)["thought"] for folder in folders[1::2]), strict=True)
    ]
    rates = [first.mean("strict_pass") for first in firsts]
    one = len(firsts) == 1
    initial = percent(rates[0], firsts[0].error("strict_pass")) if one else percent(fmean(rates))
    later = [[group[n].gain(group[0]) for group in stages] for n in range(1, NUM_REFINING_ROUNDS + 1)]
    return [initial, *(_rate_and_gain(rates, gains) for gains in [*later, chosen])]


def _better_of_two(samples: ScoredSamples, own: ScoredSamples) -> tuple[float, float | None]:
    """
    The gain of choosing, for every prompt, the image with the highest score of the policy over one of its images at random.

    Returns:
        `tuple[float, float | None]`: The gain in strict pass, and its standard error over prompts.
    """
    passes: dict[int, list[tuple[float, float]]] = {}
    for key, row in samples.by_noise.items():
        if key in own.by_noise:
            passes.setdefault(key[0], []).append((own.by_noise[key]["reward"], float(row["strict_pass"])))
    gains = [max(group, key=itemgetter(0))[1] - fmean(passed for _, passed in group) for group in passes.values()]
    return fmean(gains), standard_error(list(passes), gains)


def _rate_and_gain(rates: Sequence[float], gains: Sequence[tuple[float, float | None]]) -> str:
    gain = points(*gains[0]) if len(gains) == 1 else over_seeds([gain for gain, _ in gains], points)
    return f"{percent(fmean(rates) + fmean(gain for gain, _ in gains))} ({gain})"


def _own_gain(folder: Path) -> str:
    return _gain_of([read_summary(folder)["after"]])


def _seed(folder: Path) -> str:
    return folder.name.rpartition("-seed")[2]
