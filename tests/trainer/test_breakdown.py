# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


from collections.abc import Callable

from alphagrpo_ext.benchmark.breakdown import PHASES, phases_of
from alphagrpo_ext.trainer import AlphaGRPOTrainer


def test_every_phase_is_found_and_the_trainer_left_as_it_was(make_trainer: Callable[..., AlphaGRPOTrainer]) -> None:
    trainer = make_trainer()
    prefill, score = trainer.model.prefill, trainer._score
    with phases_of(trainer) as seconds:
        trainer.train()
    assert set(seconds) == set(PHASES) - {"rest"}
    assert all(value > 0 for value in seconds.values())
    assert trainer.model.prefill == prefill
    assert trainer._score is score
