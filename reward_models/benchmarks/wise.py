# SPDX-License-Identifier: Apache-2.0

"""WISE: prompts that take world knowledge to understand."""

from __future__ import annotations

from reward_models.benchmarks.base import (
    BENCHMARKS,
    Benchmark,
    BenchmarkPrompt,
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
    `<folder>/<prompt_id>.png`, one image a prompt. The metadata has no questions: the explanation is a sentence, so decompose
    the prompts (`recipes/decompose_prompts.py`) and pass the result.
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
        if sample:
            raise ValueError(f"WISE takes one image a prompt, but image {sample + 1} was asked for")
        return f"{prompt.key}.png"
