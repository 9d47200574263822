# SPDX-License-Identifier: Apache-2.0

"""WISE: prompts that require world knowledge."""

from __future__ import annotations

import logging
from pathlib import Path

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


logger = logging.getLogger(__name__)

TOPICS = ("cultural_common_sense", "natural_science", "spatio-temporal_reasoning")


@BENCHMARKS.register("wise")
class WISE(Benchmark):
    """
    WISE (https://huggingface.co/papers/2503.07265).

    Prompts are a folder of https://github.com/PKU-YuanGroup/WISE, or one of its files: a JSON array of
    `{"prompt_id", "Prompt", "Explanation", "Category", "Subcategory"}`. The folder is `data_verified`, or the `data` of the original
    release. Read is one file of each of the benchmark's three topics, e.g. `natural_science_verified.json` or
    `natural_science.json`. If a topic has no file, all prompts are read from `merge.json`; without that file the topic is
    warned of. The same prompts in other words (`natural_science_rewrite.json`) are read only if that file is named, or if the
    folder holds no other files. Images go where its `gpt_eval.py` looks,
    `<folder>/<prompt_id>.png`, one image per prompt. The metadata has no yes/no questions. To score the images by
    questions, decompose the prompts with `recipes/decompose_prompts.py`.
    """

    max_images = 1

    def prompts(self, source: str) -> list[BenchmarkPrompt]:
        prompts = []
        for path in _prompt_files(source):
            for where, row in read_json_array(path):
                prompt, category = text_field(row, "Prompt", where), text_field(row, "Category", where)
                prompts.append(
                    BenchmarkPrompt(path_part(row.get("prompt_id"), f"{where}: prompt_id"), prompt, category)
                )
        return checked_keys(prompts, source)

    def image_path(self, prompt: BenchmarkPrompt, sample: int) -> str:
        check_single_image("WISE", sample)
        return f"{prompt.key}.png"


def _prompt_files(source: str) -> list[Path]:
    """The files of a folder that hold each prompt once, or the file itself."""
    files = {path.name.lower(): path for path in source_files(source, "*.json")}
    releases = [
        {topic: files[name] for topic in TOPICS if (name := f"{topic}{suffix}.json") in files}
        for suffix in ("_verified", "")
    ]
    # A topic that has a file of both releases is read from the one with more topics, or else from the first release.
    found = {topic: path for release in sorted(releases, key=len) for topic, path in release.items()}
    missing = [topic for topic in TOPICS if topic not in found]
    if missing and "merge.json" in files:
        return [files["merge.json"]]
    if found:
        if missing and Path(source).is_dir():
            logger.warning("%s has no files of the topics %s, whose prompts are not read.", source, ", ".join(missing))
        return [found[topic] for topic in TOPICS if topic in found]
    return [path for name, path in files.items() if not name.endswith("_rewrite.json")] or list(files.values())
