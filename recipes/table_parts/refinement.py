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


FROM_THE_IMAGE = ("--refine_strength", "0.9", "--sde_window_range", "1", "6")
NUM_REFINING_ROUNDS = 2


def reflection_table(plan: Plan) -> MeasuredTable:
    """What refinement adds to an image, before and after training."""
    default = plan.default_reflection()
    seeds = [one_line(f"trained, seed {s}", [run], _after) for s, run in zip(plan.seeds, default, strict=True)]
    return MeasuredTable(
        "Self-reflection",
        (
            "policy",
            "reward of first image → after the round",
            "strict pass",
            "right kept / broken",
            "wrong kept / fixed",
        ),
        (
            one_line("untrained", default[:1], lambda folders: _refinement([read_summary(folders[0])["before"]])),
            *seeds,
            one_line("**trained, mean of the seeds**", default, _after),
        ),
        "In brackets the gain of the round in points: `+-` is its standard error over prompts where the row is of one run, `sd` the "
        "standard deviation between seeds. *Kept*, *broken* and *fixed* are shares of all right or of all wrong first images.",
    )


def _after(folders: Sequence[Path]) -> list[str]:
    return _refinement([read_summary(folder)["after"] for folder in folders])


def _refinement(parts: Sequence[dict[str, Any]]) -> list[str]:
    def mean(moment: str, name: str) -> float:
        return fmean(part[moment][name] for part in parts)

    rates = [percent(mean(moment, "strict_pass_rate")) for moment in ("initial", "refined")]
    return [
        f"{mean('initial', 'reward'):.3f} → {mean('refined', 'reward'):.3f}",
        f"{' → '.join(rates)} ({_gain_of(parts)})",
        *stop_shares(parts),
    ]


def stop_shares(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Two cells with shares of right first images, kept and broken, and of wrong ones, kept and fixed: means over runs."""

    def mean(name: str) -> str:
        values = [part["stops"][name] for part in parts]
        return "-" if None in values else percent(fmean(values))

    return [f"{mean('right_kept')} / {mean('broken')}", f"{mean('wrong_kept')} / {mean('fixed')}"]


def _gain_of(parts: Sequence[dict[str, Any]]) -> str:
    gains = [part["refined"]["strict_pass_rate"] - part["initial"]["strict_pass_rate"] for part in parts]
    return points(gains[0], parts[0]["gain_error"]) if len(parts) == 1 else over_seeds(gains, points)


def refiner(plan: Plan, seed: int) -> Run:
    """A run of `self_reflection.py` that starts from the model of a short run of text-to-image."""
    (base,) = plan.short_reasoning(seeds=[seed])
    words = ("--model_name_or_path", str(base.folder))
    return plan.training("refinement_after_painting", seed, *words, recipe="self_reflection", needs=(base,))


def refinement_after_painting_table(plan: Plan) -> MeasuredTable:
    """Refinement by a model that was trained on text-to-image before, against the better of two fresh images."""
    painters = dict(zip(plan.seeds, plan.short_reasoning(), strict=True))
    trained = [refiner(plan, seed) for seed in plan.seeds]
    models: dict[str, Sequence[Run | None]] = {
        "untrained": [None],
        **{f"text-to-image, seed {seed}": [base] for seed, base in painters.items()},
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
        "Strict pass; in brackets the gain over the first image in points, where `+-` is its standard error over prompts and `sd` the "
        "standard deviation between seeds. 80 steps of text-to-image, then the recipe's 80 steps of refinement. The "
        "words of the policy decide which images a round keeps. *Better of two*: of two fresh images, the one to which the policy itself "
        "gives the higher reward.",
    )


def _painted_and_judged(plan: Plan, model: Run | None) -> list[Run]:
    """Rounds of refinement as the pixels score them, and the first images once more as their own policy scores them."""
    own = plan.args.model_name_or_path if model is None else str(model.folder)
    judge = ("--judge", "policy", "--judge_model", own, "--judge_min_answer_mass", "0")
    rounds = ("--num_rounds", str(NUM_REFINING_ROUNDS), "--allow_stop")
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
