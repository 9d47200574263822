# SPDX-License-Identifier: Apache-2.0

"""Decomposed against holistic: the same judge asks many questions, asks one, or finds the prompt likely."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from alphagrpo_ext.files import atomic_path
from table_parts.plan import SHORT_STEPS, Plan, Run
from table_parts.results import ScoredSamples, decimals, over_seeds, percent, points, rewards_over_seeds
from table_parts.tables import MeasuredRow, MeasuredTable, one_line


HOLISTIC_TEMPLATE = "is there {prompt} ?"
BOTH_ARGUMENTS = ("--reward", "dvreward", "likelihood", "--reward_weights", "1", "1")
BOTH_ARGUMENTS += ("--multi_objective_aggregation", "normalize_then_sum")
NUM_PICTURED_PROMPTS = 14
"""Prompts in the picture, the same for all policies."""


def frozen_rewards_table(plan: Plan) -> MeasuredTable:
    """How well rewards of a frozen model tell right images of a prompt from wrong ones."""
    return MeasuredTable(
        "Rewards of a frozen model",
        ("reward", "area under the ROC curve, within a prompt"),
        (MeasuredRow("rewards", (plan.frozen_rewards(),), _agreements),),
        "Of pairs of a right and a wrong image of the same prompt, the share in which the right one has the higher reward. The judge of "
        "the pixels says what is right. `+-` is the standard error over prompts.",
    )


def _agreements(folders: Sequence[Path]) -> list[list[str]]:
    found = json.loads((folders[0] / "frozen_rewards.json").read_text(encoding="utf-8"))
    return [[label, decimals(row["auc"], row["error"])] for label, row in found.items()]


def decomposed_or_holistic_table(plan: Plan) -> MeasuredTable:
    """What training by each reward of a frozen copy of the policy changes, as the judge of the pixels sees it."""
    untrained = plan.evaluation("rewards", None)
    arms = _evaluations(plan)
    return MeasuredTable(
        "Decomposed or holistic",
        (
            "reward",
            *(f"seed {seed}" for seed in plan.seeds),
            *("strict pass", "reward by pixels", "semantic", "quality"),
        ),
        (
            one_line("untrained", [untrained], lambda folders: _levels(folders, len(plan.seeds))),
            *(_arm_row(label, untrained, evaluations) for label, evaluations in arms.items()),
        ),
        "The judge of all rewards is a frozen copy of the policy, except in the first trained row. All have as many steps and as many images "
        "per step. All are evaluated by the pixels on held-out prompts; seeds: points of strict pass gained over the "
        "untrained policy on the same noise, `+-` the standard error over prompts, `sd` the standard deviation between "
        f"seeds. The holistic question is `{HOLISTIC_TEMPLATE}`. *Semantic* and *quality* are means of the two kinds of questions, so a reward "
        "that is raised without the one or the other shows there. `decomposed_or_holistic.png` has images of all policies on the same "
        f"noise, seed {plan.seeds[0]}, for prompts drawn at random.",
        draw=lambda path: _draw(path, {"untrained": untrained, **{label: runs[0] for label, runs in arms.items()}}),
    )


def _evaluations(plan: Plan) -> dict[str, list[Run]]:
    """The evaluations of each reward, one per seed, by its label."""
    questions = plan.questions("shapes")
    holistic = plan.questions("holistic", "--holistic_template", HOLISTIC_TEMPLATE)
    # To some questions the policy says neither yes nor no; which of the two it prefers is its answer all the same.
    frozen = ("--judge", "policy", "--judge_model", plan.args.model_name_or_path, "--judge_min_answer_mass", "0")
    arms = {
        "DVReward": ("by_questions", questions, frozen),
        "one question": ("by_one_question", holistic, frozen),
        "likelihood": ("by_likelihood", questions, ("--reward", "likelihood")),
        "both": ("by_both", questions, (*BOTH_ARGUMENTS, *frozen)),
    }
    by_pixels = {"DVReward, pixels": [plan.evaluation("rewards", run) for run in plan.short_reasoning()]}

    def trained(name: str, source: Run, words: Sequence[str], seed: int) -> Run:
        file = ("--train_file", str(source.folder / "questions.jsonl"))
        return plan.training(name, seed, *SHORT_STEPS, *file, "--eval_seeds", "0", *words, needs=(source,))

    return by_pixels | {
        label: [plan.evaluation("rewards", trained(name, source, words, seed)) for seed in plan.seeds]
        for label, (name, source, words) in arms.items()
    }


def _arm_row(label: str, untrained: Run, evaluations: Sequence[Run]) -> MeasuredRow:
    return one_line(label, [untrained, *evaluations], _gains_and_levels)


def _read(folder: Path) -> ScoredSamples:
    return ScoredSamples.read(folder)["thought"]


def _levels(folders: Sequence[Path], num_seeds: int) -> list[str]:
    (samples,) = map(_read, folders)
    strict = percent(samples.mean("strict_pass"), samples.error("strict_pass"))
    return [*[""] * num_seeds, strict, *(f"{samples.mean(name):.3f}" for name in ("reward", "semantic", "quality"))]


def _gains_and_levels(folders: Sequence[Path]) -> list[str]:
    before, *after = map(_read, folders)
    return [
        *(points(*samples.gain(before)) for samples in after),
        over_seeds([samples.mean("strict_pass") for samples in after], percent),
        rewards_over_seeds([samples.mean("reward") for samples in after]),
        *(f"{fmean(samples.mean(name) for samples in after):.3f}" for name in ("semantic", "quality")),
    ]


def _draw(path: Path, evaluations: dict[str, Run]) -> None:
    """Draw images of several policies side by side, with what the pixels say of each."""
    from recipe_tools.contact_sheet import contact_sheet
    from reward_models.files.image_files import load_image

    found = {label: (run.folder, _read(run.folder).by_noise) for label, run in evaluations.items() if run.finished}
    common = sorted(set.intersection(*(set(samples) for _, samples in found.values()))) if found else []
    # One noise seed per prompt, the first.
    keys = list({key[0]: key for key in reversed(common)}.values())
    if not keys:
        return
    chosen = random.Random(0).sample(keys, min(len(keys), NUM_PICTURED_PROMPTS))
    rows = []
    for key in chosen:
        samples = [(folder, by_noise[key]) for folder, by_noise in found.values()]
        tiles = [
            (
                load_image(folder / row["image"]),
                f"{row['reward']:.2f}, {'passes' if row['strict_pass'] else 'fails'}",
            )
            for folder, row in samples
        ]
        rows.append((samples[0][1]["prompt"], tiles))
    with atomic_path(path) as temporary:
        contact_sheet(rows, list(found)).save(temporary)
