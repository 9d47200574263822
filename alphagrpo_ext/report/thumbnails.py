# SPDX-License-Identifier: Apache-2.0

"""Images that are small enough to be embedded in a page."""

from __future__ import annotations

import base64
from io import BytesIO

from PIL import Image

from alphagrpo_ext.images import to_rgb


# Images up to this size are stored without loss, because the page enlarges their pixels.
LOSSLESS_SIZE = 64
QUALITY = 80


def data_url(image: Image.Image, max_size: int = 256) -> str:
    """
    Encode an image as a data URL.

    Args:
        image (`PIL.Image.Image`): An image of any size and mode.
        max_size (`int`, *optional*, defaults to `256`): Largest side in pixels. A larger image is scaled down.

    Returns:
        `str`: A `data:` URL: PNG for images of at most 64 pixels, WebP for larger ones.
    """
    # A copy, because `thumbnail` changes the image itself.
    image = to_rgb(image).copy()
    if max(image.size) > max_size:
        image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    if max(image.size) <= LOSSLESS_SIZE:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, "WEBP", quality=QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
