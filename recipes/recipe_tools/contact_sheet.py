# SPDX-License-Identifier: Apache-2.0

"""Pictures in rows and columns, with captions, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[Image.Image, str]]]],
    headers: Sequence[str],
    tile_size: int = 144,
    caption_width: int = 260,
) -> Image.Image:
    """
    Args:
        rows (`Sequence[tuple[str, Sequence[tuple[PIL.Image.Image, str]]]]`):
            Caption of a row, of one or several lines, and its pictures, each with a line under it.
        headers (`Sequence[str]`): Titles of the columns of pictures.
        tile_size (`int`, *optional*, defaults to `144`): Side of a picture in pixels; small ones are enlarged sharply.
        caption_width (`int`, *optional*, defaults to `260`): Width of the captions in pixels.
    """
    font = ImageFont.load_default(13)
    margin, line = 12, 18
    row_height = tile_size + line + margin
    width = caption_width + len(headers) * (tile_size + margin) + margin
    sheet = Image.new("RGB", (width, 2 * margin + line + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)

    def left(column: int) -> int:
        return caption_width + margin + column * (tile_size + margin)

    for column, header in enumerate(headers):
        draw.text((left(column), margin), header, fill="black", font=font)
    for i, (caption, tiles) in enumerate(rows):
        top = 2 * margin + line + i * row_height
        wrapped = [line for part in caption.splitlines() for line in textwrap.wrap(part, width=caption_width // 7)]
        draw.multiline_text((margin, top), "\n".join(wrapped), fill="black", font=font, spacing=4)
        for column, (image, label) in enumerate(tiles):
            method = Image.Resampling.NEAREST if max(image.size) < tile_size else Image.Resampling.LANCZOS
            frame = (left(column) - 1, top - 1, left(column) + tile_size, top + tile_size)
            draw.rectangle(frame, outline="#b0b0b0")
            sheet.paste(image.resize((tile_size, tile_size), method), (left(column), top))
            draw.text((left(column), top + tile_size + 2), label, fill="#404040", font=font)
    return sheet
