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

"""Datasets of prompts with questions: from a file, or of the shapes world."""

from __future__ import annotations

from datasets import Dataset

from alphagrpo_ext.shapes import build_dataset
from reward_models.questions import load_records


def load_prompts(file: str | None, split: str, num_prompts: int) -> Dataset:
    """
    Args:
        file (`str`, *optional*): JSON lines, see [`load_records`]. `None` takes prompts of the shapes world.
        split (`str`): Of the shapes world: `"train"` or `"evaluation"`.
        num_prompts (`int`): Prompts drawn from the shapes world.
    """
    if file is None:
        # The draw of prompts is part of the task, not of a run, so it does not follow the run's seed.
        return build_dataset(split, num_prompts, seed=0)
    return Dataset.from_list(
        [
            {
                "prompt": record.prompt,
                "semantic_questions": [vars(question) for question in record.semantic_questions],
                "quality_questions": [vars(question) for question in record.quality_questions],
            }
            for record in load_records(file)
        ]
    )
