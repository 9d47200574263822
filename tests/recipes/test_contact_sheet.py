# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from PIL import Image

from recipe_tools.contact_sheet import contact_sheet


def tile(sheet: Image.Image, row: int, column: int, tile_size: int, caption_width: int) -> np.ndarray:
    """The pixels of one picture, found by its frame: tiles are where the grid's arithmetic puts them."""
    margin, line = 12, 18
    left = caption_width + margin + column * (tile_size + margin)
    top = 2 * margin + line + row * (tile_size + line + margin)
    return np.asarray(sheet.crop((left, top, left + tile_size, top + tile_size)))


def checkerboard(size: int) -> Image.Image:
    values = (np.indices((size, size)).sum(axis=0) % 2 * 255).astype(np.uint8)
    return Image.fromarray(values).convert("RGB")


def test_every_picture_has_its_place() -> None:
    colors = [["#ff0000", "#00ff00"], ["#0000ff", "#ffff00"], ["#00ffff", "#ff00ff"]]
    rows = [(f"row {i}", [(Image.new("RGB", (24, 24), c), "label") for c in row]) for i, row in enumerate(colors)]
    sheet = contact_sheet(rows, headers=("before", "after"), tile_size=48, caption_width=100)
    for i, row in enumerate(colors):
        for j, color in enumerate(row):
            pixels = tile(sheet, i, j, 48, 100)
            assert (pixels == np.asarray(Image.new("RGB", (1, 1), color))[0, 0]).all()


def test_small_pictures_stay_sharp() -> None:
    sheet = contact_sheet([("", [(checkerboard(6), "")])], headers=("image",), tile_size=60)
    pixels = tile(sheet, 0, 0, 60, 260)
    assert set(np.unique(pixels)) == {0, 255}


def test_large_pictures_are_shrunk_smoothly() -> None:
    sheet = contact_sheet([("", [(checkerboard(200), "")])], headers=("image",), tile_size=50)
    assert tile(sheet, 0, 0, 50, 260).std() < 30


@pytest.mark.parametrize("part", ["caption", "header", "label"])
def test_words_are_drawn(part: str) -> None:
    def draw(**words: str) -> np.ndarray:
        texts = {"caption": "", "header": "", "label": ""} | words
        image = Image.new("RGB", (8, 8), "white")
        sheet = contact_sheet([(texts["caption"], [(image, texts["label"])])], headers=(texts["header"],))
        return np.asarray(sheet)

    assert (draw() != draw(**{part: "word"})).any()


def test_long_captions_stay_beside_the_pictures() -> None:
    image = Image.new("RGB", (8, 8), "red")
    sheet = contact_sheet([("many words " * 10, [(image, "")])], headers=("image",))
    assert (tile(sheet, 0, 0, 144, 260) == (255, 0, 0)).all()


def test_lines_of_a_caption_stay_apart() -> None:
    image = Image.new("RGB", (8, 8), "white")
    one, two = (np.asarray(contact_sheet([(caption, [(image, "")])], headers=("",))) for caption in ("a b", "a\nb"))
    # Dark rows of pixels in the column of captions: of one line of words, and of two.
    extents = [np.flatnonzero((sheet[:, 5:200] < 128).any(axis=(1, 2))) for sheet in (one, two)]
    assert np.ptp(extents[1]) > np.ptp(extents[0]) + 10
