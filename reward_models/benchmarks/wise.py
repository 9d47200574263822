# SPDX-License-Identifier: Apache-2.0

"""WISE: prompts that require world knowledge."""

from __future__ import annotations

from reward_models.benchmarks.base import (
    BENCHMARKS,
    Benchmark,
    BenchmarkPrompt,
    check_single_image,
    checked_keys,
    path_part,
    read_json_array,
    source_files,
    text_field,
)


@BENCHMARKS.register("wise")
class WISE(Benchmark):
    """
    WISE (https://huggingface.co/papers/2503.07265).

    Prompts are the folder `data` of https://github.com/PKU-YuanGroup/WISE, or one of its files: a JSON array of
    `{"prompt_id", "Prompt", "Explanation", "Category", "Subcategory"}`. Images go where its `gpt_eval.py` looks,
    `<folder>/<prompt_id>.png`, one image per prompt. The metadata has no yes/no questions. To score the images by
    questions, decompose the prompts with `recipes/decompose_prompts.py`.
    """

    def prompts(self, source: str) -> list[BenchmarkPrompt]:
        prompts = []
        for path in source_files(source, "*.json"):
            for where, row in read_json_array(path):
                prompt, category = text_field(row, "Prompt", where), text_field(row, "Category", where)
                prompts.append(
                    BenchmarkPrompt(path_part(row.get("prompt_id"), f"{where}: prompt_id"), prompt, category)
                )
        return checked_keys(prompts, source)

    def image_path(self, prompt: BenchmarkPrompt, sample: int) -> str:
        check_single_image("WISE", sample)
        return f"{prompt.key}.png"
