# SPDX-License-Identifier: Apache-2.0

"""Evaluation of answers to questions about images: how many are right, by model and mode."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from alphagrpo_ext.files import JsonLinesFile, write_text
from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.fingerprint import checkpoint_fingerprint, model_label
from alphagrpo_ext.printable import printable
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.generator import RolloutGenerator, sample_generator
from alphagrpo_ext.rollout.task import ANSWERING_TASK, TASKS
from recipe_tools.answering.rows import shapes_questions
from recipe_tools.evaluation.arguments import EvaluationArguments
from recipe_tools.evaluation.stages import THOUGHT
from recipe_tools.processes import load_policy
from reward_models.answering.exact import ExactAnswer
from reward_models.evaluation.evaluate import share_of_work
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.evaluation.statistics import Estimate, estimate_rate, paired_difference
from reward_models.evaluation.text_tables import format_interval
from reward_models.prompts.loading import load_unjudged_prompts
from reward_models.prompts.rows import PromptRows


@dataclass(frozen=True)
class EvaluatedAnswer:
    """
    An answer of a policy.

    Args:
        model (`str`), mode (`str`): The policy, and whether it wrote a thought: `"thought"` or `"direct"`.
        seed, index (`int`): Seed of sampling, and index of the row.
        question, category, solution (`str`): Of the row.
        text (`str`): What the policy wrote.
        right (`bool`): Whether its answer is the solution.
    """

    model: str
    mode: str
    seed: int
    index: int
    question: str
    category: str
    solution: str
    text: str
    right: bool


def load_questions(eval_file: str | None, num_questions: int, skipped: list[str] | None = None) -> PromptRows:
    """
    Load questions with their images and solutions: of a file or dataset, or of the shapes world.

    Raises:
        `ValueError`: If a row has no image or no solution. The message names the row.
    """
    if eval_file is None:
        return PromptRows(shapes_questions("evaluation", num_questions))
    dataset = load_unjudged_prompts(eval_file, skipped)
    missing = [name for name in ("image", "solution") if name not in dataset.column_names]
    if missing:
        raise ValueError(f"{eval_file} has no column '{missing[0]}', which task '{ANSWERING_TASK}' needs")
    rows = PromptRows(dataset)
    for index, row in enumerate(rows.undecoded):
        if row["image"] is None or row["solution"] is None:
            raise ValueError(f"{eval_file}, row {index} has no {'image' if row['image'] is None else 'solution'}")
    return rows


class AnswerStore(JsonLinesFile):
    """
    The answered batches of one mode of a model, to be used in a `with` statement. The name of the file has a digest of all that
    answers depend on, so other settings have another file.

    Args:
        folder (`Path`): A folder for answers.
        digest (`str`): The digest.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        state = PartialState()
        super().__init__(folder / f"{digest[:16]}-{state.process_index}-of-{state.num_processes}.jsonl")
        self.batches: dict[int, list[EvaluatedAnswer]] = {}

    def read_row(self, row: Any, where: str) -> None:
        try:
            self.batches[row["start"]] = [EvaluatedAnswer(**answer) for answer in row["answers"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} is not a batch of answers ({error!r}): delete {self.path}") from error

    def keep(self, start: int, answers: Sequence[EvaluatedAnswer]) -> None:
        """Write the batch that starts at position `start` of this process's share."""
        self.append_row({"start": start, "answers": [asdict(answer) for answer in answers]})
        self.batches[start] = list(answers)


def evaluate_answers(
    name: str, rows: Sequence[Mapping[str, Any]], rows_digest: str, args: EvaluationArguments
) -> list[EvaluatedAnswer]:
    """
    Let a model answer every question with every seed, in every mode. Several processes share the work, and each of them returns all
    answers. Answered batches are kept in the output folder, and the model is loaded only if a question is left.

    Args:
        name (`str`): The model: a name, a folder, or an id on the Hub.
        rows (`Sequence[Mapping[str, Any]]`): From [`load_questions`].
        rows_digest (`str`): Digest of the rows.
        args ([`EvaluationArguments`]): How to sample, and the output folder.
    """
    policy = functools.cache(functools.partial(load_policy, name, args.dtype))
    config = args.rollout(args.image_size, args.image_size, ANSWERING_TASK)
    settings = (checkpoint_fingerprint(name), args.dtype, rows_digest, config, args.eval_seeds, args.batch_size)
    work = share_of_work(len(rows), range(args.eval_seeds))
    starts = range(0, len(work), args.batch_size)
    state = PartialState()
    answers: list[EvaluatedAnswer] = []
    for mode in args.modes:
        folder = Path(args.output_dir) / "answers" / model_label(name) / mode
        with AnswerStore(folder, settings_digest(*settings)) as store:
            for start in tqdm(starts, desc=f"{name}, {mode}", disable=not state.is_main_process):
                if start not in store.batches:
                    places = work[start : start + args.batch_size]
                    store.keep(start, _answer(policy(), name, mode, rows, places, config))
            answers += [replace(answer, model=name) for start in starts for answer in store.batches[start]]
        if state.is_main_process:
            print(f"{name}, {mode}: {len(rows)} questions x {args.eval_seeds} seeds answered", flush=True)
    modes = {mode: place for place, mode in enumerate(args.modes)}
    return sorted(gather_object(answers), key=lambda answer: (modes[answer.mode], answer.seed, answer.index))


def _answer(
    policy: tuple[UnifiedModel, UnifiedProcessor],
    name: str,
    mode: str,
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[tuple[int, int]],
    config: RolloutConfig,
) -> list[EvaluatedAnswer]:
    """Answers of one batch. A place is a seed and the index of a row."""
    model, processor = policy
    generate = RolloutGenerator(model, processor, TASKS.get(ANSWERING_TASK)(think=mode == THOUGHT))
    batch = [rows[index] for _, index in places]
    trajectories = generate(batch, [sample_generator(f"eval-{seed}", 0, i) for seed, i in places], config)
    texts = [processor.decode_sampled(trajectory.sampled_texts) for trajectory in trajectories]
    solutions = [row["solution"] for row in batch]
    scores = ExactAnswer()(completions=texts, solution=solutions, texts=[[text] for text in texts])
    return [
        EvaluatedAnswer(
            *(name, mode, seed, index, prompt_text(row["prompt"]), row.get("category") or "all"),
            *(str(row["solution"]), text, bool(score)),
        )
        for (seed, index), row, text, score in zip(places, batch, texts, scores, strict=True)
    ]


def save_answers(output_dir: Path, answers: Sequence[EvaluatedAnswer], settings: Mapping[str, Any]) -> str:
    """
    Write `evaluation.json` (accuracies with 95% intervals) and `samples.jsonl` (all answers).

    Returns:
        `str`: A table of the accuracies, and of their differences to those of the first model.
    """
    lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
    write_text(output_dir / "samples.jsonl", lines)
    results, table = [], [f"{'category':<24}{'n':>7}{'right':>25}{'change, in points':>28}"]
    for mode in dict.fromkeys(answer.mode for answer in answers):
        first: list[EvaluatedAnswer] | None = None
        for model in dict.fromkeys(answer.model for answer in answers):
            own = [answer for answer in answers if (answer.model, answer.mode) == (model, mode)]
            table += ["", f"{model}, {mode}"]
            for category, change in _categories(own, first):
                chosen = [answer for answer in own if category == "all" or answer.category == category]
                accuracy = estimate_rate([answer.index for answer in chosen], [answer.right for answer in chosen])
                results.append(
                    {"model": model, "mode": mode, "category": category, "accuracy": asdict(accuracy)}
                    | ({} if change is None else {"change": asdict(change)})
                )
                shown = "" if change is None else format_interval(change, "+.1f", scale=100)
                table.append(
                    f"{printable(category):<24}{len(chosen):>7}{format_interval(accuracy, '.1%'):>25}{shown:>28}".rstrip()
                )
            first = first or own
    text = json.dumps({"settings": settings, "accuracies": results}, indent=2, default=str)
    write_text(output_dir / "evaluation.json", text + "\n")
    return "\n".join(table)


def _categories(
    own: Sequence[EvaluatedAnswer], first: Sequence[EvaluatedAnswer] | None
) -> list[tuple[str, Estimate | None]]:
    """The categories, `"all"` at last, each with the change of its accuracy from the first model's."""
    found = []
    for category in [*dict.fromkeys(a.category for a in own if a.category != "all"), "all"]:
        places = [i for i, answer in enumerate(own) if category == "all" or answer.category == category]
        change = None
        if first is not None:
            differences = [own[i].right - first[i].right for i in places]
            change = paired_difference([own[i].index for i in places], differences).difference
        found.append((category, change))
    return found
