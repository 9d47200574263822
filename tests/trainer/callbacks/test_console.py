# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import pytest

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.callbacks.console import ConsoleCallback, LastLogCallback, banner, log_line


def test_a_line_has_what_tells_whether_a_run_is_healthy() -> None:
    logs = {
        "loss": 0.1,
        "reward": 0.7811,
        "dvreward/strict_pass": 0.5,
        "entropy": 1.234,
        "grad_norm": 0.5,
        "image/ratio_mean": 1.0,
        "judge/failed_frac": 0.0,
        "work/decode_tokens": 123,
    }
    line = log_line(5, 80, logs, seconds_per_step=1.25)
    assert line == (
        "step 5/80  |  reward 0.781  |  strict pass 50%  |  entropy 1.23  |  grad norm 0.50  |  image ratio 1.0000  |  "
        "1.2 s per step"
    )
    assert "unscored 25%" in log_line(5, 80, logs | {"judge/failed_frac": 0.25})


@pytest.mark.parametrize("reverse", [False, True])
def test_a_metric_of_the_exact_name_is_shown_and_not_one_that_ends_in_it(reverse: bool) -> None:
    logs = {"timing/reward": 12.0, "reward": 0.25, "holdout/reward": 0.75}
    assert log_line(1, 2, dict(sorted(logs.items(), reverse=reverse))) == "step 1/2  |  reward 0.250"


def test_banner_lines_up() -> None:
    assert banner("Training", {"model": "bagel-shapes", "steps": 80}).splitlines() == [
        "Training",
        "  model  bagel-shapes",
        "  steps  80",
    ]


@pytest.mark.parametrize(("max_steps", "others"), [(3, "last step"), (4, "other 2 steps")])
def test_a_run_prints_a_line_per_log_and_one_for_its_last_steps(
    make_trainer: Callable[..., AlphaGRPOTrainer], capfd: pytest.CaptureFixture[str], max_steps: int, others: str
) -> None:
    trainer = make_trainer(max_steps=max_steps, logging_steps=3)
    trainer.add_callback(LastLogCallback)
    ConsoleCallback().attach(trainer)
    trainer.train()
    # There is no terminal, so there is no bar that a line could be glued to.
    output, progress = capfd.readouterr()
    printed = output.splitlines()
    assert "it/s" not in progress
    assert [line.split("  |  ")[0] for line in printed if line.startswith("step")] == [
        f"step {step}/{max_steps}" for step in dict.fromkeys((3, max_steps))
    ]
    (estimate,) = [line for line in printed if "s per step: about" in line]
    assert estimate.endswith(f"for the {others}")
    assert not any(line.startswith("{") for line in printed)
