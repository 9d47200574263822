# SPDX-License-Identifier: Apache-2.0

"""The result files of evaluations."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alphagrpo_ext.files import write_text
from reward_models.evaluation.comparisons import compare_models
from reward_models.evaluation.scores import (
    EvaluationScores,
    GroupScore,
    NamedEvaluation,
    TagScore,
    sample_answers,
    score_evaluation,
)
from reward_models.evaluation.statistics import Estimate
from reward_models.evaluation.text_tables import difference_table, overall_line, score_table, table_legend
from reward_models.prompts.questions import PromptRecord


_METRICS = ("reward", "strict_pass_rate", "p_yes", "pass_rate")
_BOUNDS = ("value", "low", "high")
# Spreadsheets skip blanks before a formula, and take the wide forms of its first character, too.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def save_results(
    folder: Path,
    evaluations: Sequence[NamedEvaluation],
    records: Sequence[PromptRecord],
    settings: Mapping[str, Any],
) -> str:
    """
    Write `evaluation.json` (everything), `summary.csv` (one line per model, mode and category or tag) and `samples.jsonl` (one
    line per sample). The first model is the baseline of the others.

    Args:
        folder (`Path`): Folder of the files. Files of earlier evaluations are replaced.
        evaluations (`Sequence[NamedEvaluation]`): The evaluations.
        records (`Sequence[PromptRecord]`): The record of each row.
        settings (`Mapping[str, Any]`): Settings of the evaluations, as JSON values.

    Returns:
        `str`: Tables of the scores and of the differences, what their columns mean, and the differences over all prompts as
        sentences.
    """
    scores = [score_evaluation(evaluation, records) for evaluation in evaluations]
    baselines = {entry.mode: entry for entry in reversed(evaluations) if entry.model == evaluations[0].model}
    comparisons = [
        compare_models(baselines[entry.mode], entry, records)
        for entry in evaluations
        if entry.model != evaluations[0].model and entry.mode in baselines
    ]
    content = {
        "settings": settings,
        "evaluations": [asdict(entry) for entry in scores],
        "comparisons": [asdict(entry) for entry in comparisons],
    }
    lines = (json.dumps(row, ensure_ascii=False) for row in _sample_rows(evaluations, records, folder))
    for name, text in {
        "evaluation.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        "summary.csv": _summary_csv(scores),
        "samples.jsonl": "".join(f"{line}\n" for line in lines),
    }.items():
        # A prompt may contain an unpaired surrogate, which UTF-8 cannot encode.
        write_text(folder / name, text, errors="backslashreplace")
    tables = [*map(score_table, scores), *map(difference_table, comparisons), table_legend(scores, comparisons)]
    return "\n\n".join([*tables, *(["\n".join(map(overall_line, comparisons))] if comparisons else [])])


def _sample_rows(
    evaluations: Sequence[NamedEvaluation], records: Sequence[PromptRecord], folder: Path
) -> Iterator[dict[str, Any]]:
    for entry in evaluations:
        for sample in entry.evaluation.samples:
            yield {
                "model": entry.model,
                "mode": entry.mode,
                "prompt_index": sample.index,
                "noise_seed": sample.seed,
                "category": sample.category,
                "prompt": sample.prompt,
                "thought": sample.text,
                "image": os.path.relpath(sample.image_file, folder) if sample.image_file else None,
                "reward": sample.reward,
                "semantic": _mean(sample.semantic),
                "quality": _mean(sample.quality),
                "strict_pass": sample.strict_pass,
                "answers": [
                    {
                        "side": answer.side,
                        "tag": answer.question.tag,
                        "question": answer.question.question,
                        "p_yes": answer.p_yes,
                    }
                    for answer in sample_answers(sample, records[sample.index])
                ],
            }


def _summary_csv(evaluations: Sequence[EvaluationScores]) -> str:
    columns = ["model", "mode", "scope", "name", "num_prompts", "num_samples", "num_failed"]
    columns += [f"{metric}_{bound}" for metric in _METRICS for bound in _BOUNDS]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()

    def write(row: Mapping[str, Any]) -> None:
        writer.writerow({name: _csv_cell(value) for name, value in row.items()})

    for entry in evaluations:
        for group in (entry.total, *entry.categories):
            metrics = {"reward": group.reward, "strict_pass_rate": group.strict_pass_rate}
            write(_summary_row(entry, group.scope, group, metrics))
        for tag in entry.tags:
            metrics = {"p_yes": tag.p_yes, "pass_rate": tag.pass_rate}
            write(_summary_row(entry, f"{tag.side} tag", tag, metrics))
    return text.getvalue()


def _summary_row(
    evaluation: EvaluationScores, scope: str, score: GroupScore | TagScore, metrics: Mapping[str, Estimate]
) -> dict[str, Any]:
    first = next(iter(metrics.values()))
    return {
        "model": evaluation.model,
        "mode": evaluation.mode,
        "scope": scope,
        "name": score.name,
        "num_prompts": first.num_prompts,
        "num_samples": first.num_samples,
        "num_failed": score.num_failed,
        **{f"{name}_{bound}": getattr(metric, bound) for name, metric in metrics.items() for bound in _BOUNDS},
    }


def _csv_cell(value: Any) -> Any:
    """Put an apostrophe before a text that a spreadsheet would compute as a formula. Numbers stay numbers."""
    if not isinstance(value, str):
        return value
    # The writer does not quote a carriage return, which readers take for the end of a line.
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _mean(answers: Sequence[float | None]) -> float | None:
    return sum(answers) / len(answers) if answers and None not in answers else None
