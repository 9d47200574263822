# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import pytest

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from alphagrpo_ext.trainer.callbacks.console import ConsoleCallback, banner, log_line


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


def test_a_run_prints_a_banner_and_a_line_per_log(
    make_trainer: Callable[..., AlphaGRPOTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(max_steps=3, disable_tqdm=True)
    ConsoleCallback("Training", {"model": "tiny"}).attach(trainer)
    trainer.train()
    printed = capsys.readouterr().out.splitlines()
    assert printed[printed.index("Training") + 1] == "  model  tiny"
    assert [line.split("  |  ")[0] for line in printed if line.startswith("step")] == [
        "step 1/3",
        "step 2/3",
        "step 3/3",
    ]
    assert any("s per step: about" in line for line in printed)
    assert not any(line.startswith("{") for line in printed)
