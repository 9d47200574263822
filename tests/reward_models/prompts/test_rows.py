# SPDX-License-Identifier: Apache-2.0


import json
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from reward_models.prompts.loading import load_prompts
from reward_models.prompts.rows import PromptRows


def write_prompts(folder: Path, **images: Image.Image) -> Path:
    rows = []
    for name, image in images.items():
        image.save(folder / name.replace("_", "."))
        question = {"question": "is there a circle ?", "tag": "Existence"}
        rows.append(
            {
                "prompt": "extra circle",
                "image": name.replace("_", "."),
                "semantic_questions": [question],
                "quality_questions": [],
            }
        )
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_images_of_files_are_decoded_in_rgb(tmp_path: Path) -> None:
    path = write_prompts(
        tmp_path, a_png=Image.new("RGBA", (3, 5), (9, 9, 9, 0)), b_png=Image.new("RGB", (4, 4), "red")
    )
    rows = PromptRows(load_prompts(str(path), "evaluation", 0))
    assert len(rows) == 2
    assert rows[0]["image"].mode == "RGB" and rows[0]["image"].getpixel((0, 0)) == (255, 255, 255)
    assert [row["image"].size for row in rows] == [(3, 5), (4, 4)]


def test_files_of_the_user_have_no_limits_of_size_and_format(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, a_bmp=Image.new("RGB", (4, 5)), b_png=Image.new("1", (5000, 1000)))
    rows = PromptRows(load_prompts(str(path), "evaluation", 0))
    assert [row["image"].size for row in rows] == [(4, 5), (5000, 1000)]


def test_rows_without_image_stay_as_they_are() -> None:
    features = Features({"prompt": Value("string"), "image": ImageFeature()})
    rows = PromptRows(Dataset.from_dict({"prompt": ["a"], "image": [None]}, features))
    assert rows[0] == {"prompt": "a", "image": None}
    assert list(PromptRows(Dataset.from_dict({"prompt": ["a", "b"]}))) == [{"prompt": "a"}, {"prompt": "b"}]
