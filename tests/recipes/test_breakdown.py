# SPDX-License-Identifier: Apache-2.0


from collections.abc import Callable

from alphagrpo_ext.trainer import AlphaGRPOTrainer
from benchmark_parts.breakdown import PHASES, phase_seconds


def test_every_phase_is_found_and_the_trainer_left_as_it_was(make_trainer: Callable[..., AlphaGRPOTrainer]) -> None:
    trainer = make_trainer()
    prefill, score = trainer.model.prefill, trainer.scorer.score
    with phase_seconds(trainer) as seconds:
        trainer.train()
    assert set(seconds) == set(PHASES) - {"rest"}
    assert all(value > 0 for value in seconds.values())
    assert trainer.model.prefill == prefill
    assert trainer.scorer.score is score
