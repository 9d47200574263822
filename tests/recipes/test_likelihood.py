# SPDX-License-Identifier: Apache-2.0

"""Training runs with the reward `likelihood`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trl import ModelConfig, TrlParser

from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from reward_models.likelihood.reward import LikelihoodReward
from support.recipe_modules import ROOT, load_recipe


QUICK = (
    *(
        "--use_cpu",
        "--bf16",
        "false",
        "--max_steps",
        "3",
        "--per_device_train_batch_size",
        "8",
        "--logging_steps",
        "1",
    ),
    *("--num_timesteps", "5", "--sde_window_range", "0", "4", "--output_dir", "run"),
)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LikelihoodReward]:
    """The rewards that runs make, in an empty working folder with prompts that have no questions."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle on a white background\ntwo blue squares on a black background\n")
    rewards: list[LikelihoodReward] = []
    make = LikelihoodReward.from_arguments

    def keep(*args: Any) -> LikelihoodReward:
        rewards.append(make(*args))
        return rewards[-1]

    monkeypatch.setattr(LikelihoodReward, "from_arguments", keep)
    return rewards


def train(*options: str, name: str = "reasoning_t2i") -> list[dict[str, Any]]:
    """The logs of a run."""
    recipe = load_recipe(name)
    parser = TrlParser((recipe.PromptArguments, AlphaGRPOConfig, ModelConfig))
    config = ("--config", str(ROOT / "recipes" / "configs" / f"{name}_shapes.yaml"))
    recipe.main(*parser.parse_args_and_config([*config, *QUICK, *options]))
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    return [log for line in lines if "reward" in (log := json.loads(line))]


@pytest.mark.slow
def test_it_mixes_with_dvreward_by_weights(made: list[LikelihoodReward], capsys: pytest.CaptureFixture[str]) -> None:
    logs = train(
        *("--reward", "likelihood", "dvreward", "--reward_weights", "0.1", "1.0", "--eval_seeds", "0"),
        *("--holdout_judge", "policy"),
    )
    rewards = "rewards     likelihood (compare it within groups only), dvreward (judge: shapes)\n"
    assert rewards in capsys.readouterr().out
    assert len(logs) == 3
    for log in logs:
        parts = log["rewards/likelihood/mean"], log["rewards/dvreward/mean"]
        assert log["reward"] == pytest.approx(0.1 * parts[0] + parts[1], abs=1e-4)
        assert parts[0] < 0 and log["likelihood/within_prompt_std"] > 0 and log["likelihood/failed_frac"] == 0
        assert 0 < log["holdout/reward"] < 1
    # All weights are trained, so that the frozen policy is a copy.
    frozen, trained, packaged = made[0].scorer.model, load_model("run")[0], load_model("bagel-shapes")[0]
    assert all(torch.equal(p, packaged.get_parameter(name)) for name, p in frozen.named_parameters())
    assert not all(torch.equal(p, packaged.get_parameter(name)) for name, p in trained.named_parameters())


@pytest.mark.slow
def test_prompts_need_no_questions_and_an_adapter_no_copy(
    made: list[LikelihoodReward], capsys: pytest.CaptureFixture[str]
) -> None:
    logs = train(
        *("--reward", "likelihood", "--train_file", "prompts.txt", "--eval_file", "prompts.txt", "--eval_seeds", "2"),
        *("--use_peft", "--lora_r", "4", "--learning_rate", "1e-2", "--gradient_checkpointing"),
        *("--likelihood_tokens", "content", "--likelihood_context", "vae_vit"),
    )
    assert "\nlikelihood  " in capsys.readouterr().out
    assert len(logs) == 3 and all(log["reward"] == pytest.approx(log["rewards/likelihood/mean"]) for log in logs)
    policy = made[0].scorer.model
    image, prompt = Image.new("RGB", (24, 24), "red"), "a red circle"
    # After training the reward of an image is what it was before, although the policy's own has changed.
    fresh = LikelihoodReward(type(made[0].scorer)(*load_model("bagel-shapes"), "vae_vit"), "content")
    before = fresh([prompt], images=[image])
    assert made[0]([prompt], images=[image]) == pytest.approx(before, abs=1e-5)
    processor = made[0].scorer.processor
    context = [[processor.image_segment(image, policy)]]
    ids = processor.text_segment(prompt)
    (now,), (then,) = (model.text_log_probs(context, [ids]) for model in (policy, fresh.scorer.model))
    assert (now - then).abs().max() > 1e-4


@pytest.mark.slow
def test_refined_images_are_compared_with_those_they_started_from(made: list[LikelihoodReward]) -> None:
    (log,) = train(
        *("--reward", "likelihood", "--eval_seeds", "0", "--max_steps", "1", "--use_peft", "--judge", "policy"),
        name="self_reflection",
    )
    assert log["reflection/initial_reward"] < 0 and log["reflection/final_reward"] < 0
    # Its judge may use the policy at the same time, so that the adapter is not switched off.
    assert not any("lora" in name for name, _ in made[0].scorer.model.named_parameters())


def test_wrong_arguments_and_prompts_end_a_run_before_it_begins(made: list[LikelihoodReward]) -> None:
    with pytest.raises(ValueError, match="'transformers' needs likelihood_model"):
        train("--reward", "likelihood", "--likelihood_scorer", "transformers", "--eval_seeds", "0")
    Path("prompts.txt").write_text("a red circle\nof the\n")
    options = ("--reward", "likelihood", "--train_file", "prompts.txt")
    with pytest.raises(
        ValueError, match="train_dataset: row 1: the prompt 'of the' has no tokens that count"
    ) as error:
        train(*options, "--likelihood_tokens", "content")
    assert error.value.is_of_input
    assert not Path("run").exists()
