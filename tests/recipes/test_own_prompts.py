# SPDX-License-Identifier: Apache-2.0

"""Runs on prompts of one's own: with or without questions, and with or without an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from trl import ModelConfig, TrlParser

from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from recipe_tools.training import prepare_run
from reward_models.arguments import PromptArguments
from reward_models.dvreward import JudgeFailedError
from reward_models.endpoints import preflight
from support.recipe_modules import ROOT, load_recipe
from support.scripted_endpoint import Reply, chat_body, scripted_endpoint


QUICK = (
    *("--use_cpu", "--bf16", "false", "--max_steps", "1", "--per_device_train_batch_size", "8"),
    *("--num_timesteps", "5", "--sde_window_range", "0", "4"),
)
OWN_REWARD = ("--reward", "rewards_of_own_prompts:brightness")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with prompts and a reward function that wants a column of theirs."""
    monkeypatch.chdir(tmp_path)
    Path("rewards_of_own_prompts.py").write_text(
        "from PIL import ImageStat\n"
        "def brightness(images, style, **kwargs):\n"
        "    assert set(style) <= {'ink', None}\n"
        "    return [ImageStat.Stat(image).mean[0] / 255 for image in images]\n"
    )
    Path("prompts.csv").write_text("prompt,style\na red circle on a white background,ink\na blue dog,\n")
    question = {"question": "is there a circle ?", "tag": "Existence"}
    row = {"prompt": "a red circle", "semantic_questions": [question], "quality_questions": []}
    Path("questions.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def parse(recipe: ModuleType, name: str, *options: str) -> tuple[PromptArguments, AlphaGRPOConfig, ModelConfig]:
    parser = TrlParser((recipe.PromptArguments, AlphaGRPOConfig, ModelConfig))
    config = ("--config", str(ROOT / "recipes" / "configs" / f"{name}_shapes.yaml"))
    return parser.parse_args_and_config([*config, *QUICK, "--output_dir", "run", *options])


def train(*options: str, name: str = "reasoning_t2i") -> None:
    recipe = load_recipe(name)
    recipe.main(*parse(recipe, name, *options))


def test_prompts_without_questions_train_and_evaluate_by_own_rewards(capsys: pytest.CaptureFixture[str]) -> None:
    train(*OWN_REWARD, "--train_file", "prompts.csv", "--eval_file", "prompts.csv", "--eval_seeds", "2")
    printed = capsys.readouterr().out
    assert "judge" not in printed
    assert printed.count("The model does not know these words") == printed.count("'dog'") == 1
    assert "  evaluation  2 prompts of prompts.csv x 2 seeds, by the rewards above\n" in printed
    assert "  attention   eager (measured as the fastest on a CPU)\n" in printed
    # Fewer steps than `logging_steps` are logged, too.
    assert "\nstep 1/1  |  reward " in printed
    assert printed.endswith("\nModel, README.md, report.html, summary.json and metrics.jsonl: run\n")
    assert "\nbrightness  " in printed and "\nreward  " not in printed
    summary = json.loads(Path("run/summary.json").read_text())
    for moment in ("before", "after"):
        assert summary[moment].keys() == {"brightness", "reward"} and 0 < summary[moment]["brightness"] < 1
    card = Path("run/README.md").read_text()
    assert "brightness" in card and 'pipe("a red circle on a white background")' in card


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "eager"),
        (("--attn_implementation", "sdpa"), "sdpa"),
        (("--image_width", "128", "--image_height", "128"), "sdpa"),
        (("--image_width", "128", "--image_height", "128", "--dtype", "bfloat16"), "eager"),
    ],
)
def test_attention_is_chosen_unless_it_is_given(options: tuple[str, ...], name: str) -> None:
    own = (*OWN_REWARD, "--train_file", "prompts.csv", "--eval_seeds", "0")
    arguments = parse(load_recipe("reasoning_t2i"), "reasoning_t2i", *own, *options)
    assert prepare_run(*arguments).model.config.text_config._attn_implementation == name


def test_prompts_of_ones_own_are_not_evaluated_on_the_shapes_world(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_endpoint(Reply(chat_body("Yes", [("Yes", [("Yes", -0.1), ("No", -2.4)])]))) as endpoint:
        judge = ("--judge", "openai", "--judge_model", "m", "--judge_base_url", endpoint.url)
        train("--train_file", "questions.jsonl", *judge, "--attn_implementation", "sdpa")
        # One question before the run, and one about each of eight images.
        assert len(endpoint.bodies) == 9
    printed = capsys.readouterr().out
    assert "  evaluation  none (give --eval_file)\n" in printed and "rewards     dvreward (judge: openai)\n" in printed
    assert "  length      1 step of 8 samples each\n" in printed and "  attention   sdpa (given)\n" in printed
    assert printed.endswith("\nModel, README.md, report.html and metrics.jsonl: run\n")
    assert "## Scores" not in Path("run/README.md").read_text()
    assert Path("run/config.json").is_file()


def test_a_judge_that_fails_in_training_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PAUSES", ())
    good = Reply(chat_body("Yes", [("Yes", [("Yes", -0.1), ("No", -2.4)])]))
    with scripted_endpoint(lambda body, number: good if number == 0 else Reply({"error": "out"}, 401)) as endpoint:
        judge = ("--judge", "openai", "--judge_model", "m", "--judge_base_url", endpoint.url)
        message = r"8 of 8 images without a score.*\. There is no checkpoint yet\. With --save_strategy steps --save_steps 10"
        with pytest.raises(JudgeFailedError, match=message):
            train("--train_file", "questions.jsonl", *judge)


def test_another_run_is_not_overwritten() -> None:
    def begin(*options: str) -> None:
        train(*OWN_REWARD, "--train_file", "prompts.csv", "--eval_seeds", "0", *options)

    begin()
    written = Path("run/model.safetensors").stat().st_mtime_ns
    with pytest.raises(
        ValueError, match=r"run with other arguments, .* \(learning_rate was 5e-05 and is 0.001, seed was"
    ):
        begin("--seed", "1", "--learning_rate", "1e-3")
    assert Path("run/model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="run with other arguments"):
        begin("--seed", "1", "--resume_from_checkpoint", "last")
    # What is printed and saved does not make it another run, as when a judge failed before anything was saved.
    begin("--verbose_logs", "--save_strategy", "steps", "--save_steps", "5", "--resume_from_checkpoint", "last")
    assert Path("run/model.safetensors").stat().st_mtime_ns > written
    Path("run/arguments.json").unlink()
    with pytest.raises(ValueError, match="run holds a model or another run"):
        begin()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--train_file", "gone.csv"), FileNotFoundError, "there is no file or folder gone.csv"),
        (("--eval_file", "./gone"), FileNotFoundError, "there is no file or folder ./gone"),
        (("--max_steps", "0"), ValueError, "max_steps=0 trains nothing"),
        (("--reward", "gone:f"), ValueError, "--reward gone:f: No module named 'gone'"),
        (("--train_file", "prompts.csv"), ValueError, "prompts.csv: .* without a column 'semantic_questions'"),
        ((*OWN_REWARD, "--eval_file", "questions.jsonl", "--judge", "gone"), ValueError, "gone"),
    ],
)
def test_a_run_that_fails_its_checks_leaves_no_folder(
    options: tuple[str, ...], error: type[Exception], message: str, folder: Path
) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message) as raised:
        train(*options, "--output_dir", "runs/new")
    assert raised.value.is_of_input
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before
