# SPDX-License-Identifier: Apache-2.0

"""Questions about images in recipes: rows, the guard of yes and no, training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig, TrlParser

from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout.generator import RolloutGenerator
from alphagrpo_ext.shapes.answering import question_rows
from alphagrpo_ext.shapes.prompts import build_dataset, prompt_rows
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trajectory import Trajectory
from recipe_tools.answering.guard import AnswerChange, answers_once, answers_right
from recipe_tools.answering.rows import assign_tasks
from reward_models.judges.policy import PolicyJudge
from reward_models.prompts.loading import load_prompts, painted_prompts
from support.recipe_modules import ROOT, load_recipe, run_recipe


ANSWERING = "visual_question_answering"
QUICK = (
    *("--use_cpu", "--bf16", "false", "--max_steps", "1", "--per_device_train_batch_size", "16"),
    *("--num_timesteps", "5", "--sde_window_range", "0", "4", "--eval_num_timesteps", "3", "--output_dir", "run"),
    *("--num_train_prompts", "4", "--num_eval_prompts", "2", "--eval_seeds", "1", "--eval_questions", "14"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file of questions, and one of prompts and questions."""
    monkeypatch.chdir(tmp_path)
    questions = question_rows("evaluation", 4, seed=1)
    for index, row in enumerate(questions):
        row["image"].save(f"{index}.png")
        row["image"] = f"{index}.png"
    prompts = [{**row, "task": "reasoning_t2i"} for row in prompt_rows("train", 2, seed=0)]
    for name, rows in (("questions", questions), ("mixed", [*prompts, *questions])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(*options: str) -> dict[str, Any]:
    recipe = load_recipe("reasoning_t2i")
    parser = TrlParser((recipe.PromptArguments, AlphaGRPOConfig, ModelConfig))
    config = ("--config", str(ROOT / "recipes" / "configs" / "reasoning_t2i_shapes.yaml"))
    recipe.main(*parser.parse_args_and_config([*config, *QUICK, *options]))
    path = Path("run/summary.json")
    return json.loads(path.read_text()) if path.exists() else {}


def test_tasks_are_assigned_and_questions_take_the_place_of_prompts() -> None:
    prompts = build_dataset("train", 6, seed=0)
    plain = assign_tasks(prompts, ["self_reflection", "reasoning_t2i"], is_shapes=True)
    assert plain["task"] == ["self_reflection", "reasoning_t2i"] * 3 and plain["prompt"] == prompts["prompt"]
    mixed = assign_tasks(prompts, ["reasoning_t2i", ANSWERING], is_shapes=True)
    questions = question_rows("train", 3, seed=0)
    assert mixed["task"] == ["reasoning_t2i", ANSWERING] * 3
    assert mixed["prompt"][::2] == prompts["prompt"][::2]
    assert mixed["prompt"][1::2] == [row["prompt"] for row in questions]
    assert mixed["solution"] == [text for row in questions for text in (None, row["solution"])]
    assert [image and image.tobytes() for image in mixed["image"]][1::2] == [
        row["image"].tobytes() for row in questions
    ]
    with pytest.raises(ValueError, match="give the file rows with the task"):
        assign_tasks(prompts, [ANSWERING], is_shapes=False)
    with pytest.raises(ValueError, match="have a column 'task' already"):
        assign_tasks(mixed, ["reasoning_t2i"], is_shapes=True)


def test_guard_answers_as_the_policy_judge(tmp_path: Path) -> None:
    model, processor = load_model("bagel-shapes")
    right = answers_right(model, processor, 63)
    judge = PolicyJudge(model, processor)
    for row, is_right in list(zip(question_rows("evaluation", 63, seed=0), right, strict=True))[50:]:
        (p_yes,) = judge.probabilities(row["image"], [row["prompt"]])
        assert is_right == ((p_yes >= 0.5) == (row["solution"] == "yes"))
    assert sum(right) / len(right) > 0.7

    path = tmp_path / "folder" / "answers.json"
    assert answers_once(path, "a", False, lambda: right) == right
    assert answers_once(path, "a", True, lambda: [True]) == right
    # Of other settings, or of a run that is not resumed.
    assert answers_once(path, "b", True, lambda: [True]) == [True]
    assert answers_once(path, "b", False, lambda: [False]) == [False]


def test_change_of_answers() -> None:
    change = AnswerChange([True, True, False, False] * 10, [True, False, False, False] * 10)
    summary = change.summary()
    assert (summary["num_questions"], summary["before"], summary["after"]) == (40, 0.5, 0.25)
    assert summary["change_low"] < -0.25 < summary["change_high"] < 0 and summary["p_value"] < 0.05
    assert "right, of 40: 50.0% -> 25.0%, -25.0 points [" in str(change)
    assert "+0.0 points, p 1.00" in str(AnswerChange([True], [True]))


def test_a_file_may_mix_prompts_and_questions(folder: Path) -> None:
    dataset = load_prompts("mixed.jsonl", "train", 0)
    assert dataset["task"] == ["reasoning_t2i"] * 2 + [ANSWERING] * 4
    assert dataset["solution"][:2] == [None, None] and set(dataset["solution"][2:]) == {"yes"}
    assert all(dataset["semantic_questions"][:2]) and not any(dataset["semantic_questions"][2:])
    assert dataset[2]["image"].size == (24, 24)
    assert painted_prompts(dataset, "mixed.jsonl")["prompt"] == dataset["prompt"][:2]
    with pytest.raises(ValueError, match="questions has no row whose task paints an image"):
        painted_prompts(dataset.select(range(2, 6)), "questions")
    dataset.save_to_disk("saved")
    assert load_prompts("saved", "train", 0)["solution"] == dataset["solution"]
    Path("bad.jsonl").write_text(json.dumps({"prompt": "a circle", "task": "reasoning_t2i"}) + "\n")
    with pytest.raises(ValueError, match="has a prompt and no questions"):
        load_prompts("bad.jsonl", "train", 0)


def test_painting_and_answering_on_shapes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ("--train_tasks", "reasoning_t2i", ANSWERING)
    summary = train(*tasks, "--reward", "dvreward", "answer", "--logging_steps", "1")
    guard = summary["understanding"]
    assert guard["num_questions"] == 14 and 0.5 < guard["before"] <= 1
    line = f"held-out scenes answered right, of 14: {guard['before']:.1%} -> {guard['after']:.1%}"
    assert line in capsys.readouterr().out
    for name in ("report.html", "README.md"):
        assert "held-out scenes answered right" in Path("run", name).read_text()
    first = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert first[f"rewards/{ANSWERING}"] == pytest.approx(first["rewards/answer/mean"])
    assert first["rewards/reasoning_t2i"] == pytest.approx(first["rewards/dvreward/mean"])


def test_questions_of_a_file_train_and_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--train_file", "questions.jsonl", "--eval_file", "questions.jsonl")
    with pytest.raises(ValueError, match="paints no image for dvreward to judge: give --reward answer"):
        train("--task", ANSWERING, *files)
    summary = train("--task", ANSWERING, "--reward", "answer", *files)
    # The shapes world says nothing about images of another kind.
    assert summary.keys() == {"before", "after"} and 0 <= summary["before"]["answer"] <= 1
    assert "\nanswer  " in capsys.readouterr().out


def test_answers_are_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("evaluate")
    options = ("--task", ANSWERING, "--eval_seeds", "1", "--output_dir", "out", "--eval_file", "questions.jsonl")
    run_recipe(recipe, recipe.EvaluationArguments, *options, "--modes", "direct", "thought")
    lines = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert [line["mode"] for line in lines] == ["direct"] * 4 + ["thought"] * 4
    assert all(("</think>" in line["text"]) == (line["mode"] == "thought") for line in lines)
    found = json.loads(Path("out/evaluation.json").read_text())["accuracies"]
    for mode in ("direct", "thought"):
        (total,) = [entry["accuracy"] for entry in found if (entry["mode"], entry["category"]) == (mode, "all")]
        assert total["value"] == sum(line["right"] for line in lines if line["mode"] == mode) / 4
    assert "bagel-shapes, thought" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no image that num_rounds=1 could refine"):
        run_recipe(recipe, recipe.EvaluationArguments, *options, "--num_rounds", "1")


def test_answers_that_are_kept_are_not_given_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("evaluate")
    options = ("--task", ANSWERING, "--eval_seeds", "1", "--output_dir", "out", "--eval_file", "questions.jsonl")
    batches = (*options, "--batch_size", "2", "--modes", "direct")
    run_recipe(recipe, recipe.EvaluationArguments, *batches)
    expected = Path("out/samples.jsonl").read_text()
    (kept,) = Path("out/answers").rglob("*.jsonl")
    first, second = kept.read_text().splitlines()
    # As a process that was killed while it wrote the second batch leaves it.
    kept.write_text(f"{first}\n{second[:40]}")
    answered = []
    generate = RolloutGenerator.__call__

    def counting(self: RolloutGenerator, rows: Sequence[Any], *args: Any) -> list[Trajectory]:
        answered.extend(row["prompt"] for row in rows)
        return generate(self, rows, *args)

    monkeypatch.setattr(RolloutGenerator, "__call__", counting)
    run_recipe(recipe, recipe.EvaluationArguments, *batches)
    assert len(answered) == 2 and Path("out/samples.jsonl").read_text() == expected
    monkeypatch.setattr("recipe_tools.evaluation.answers.load_policy", lambda *args: pytest.fail("nothing is left"))
    run_recipe(recipe, recipe.EvaluationArguments, *batches)
    # Other settings have other answers.
    with pytest.raises(pytest.fail.Exception, match="nothing is left"):
        run_recipe(recipe, recipe.EvaluationArguments, *batches, "--temperature", "0.5")
