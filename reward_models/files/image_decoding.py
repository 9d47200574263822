# SPDX-License-Identifier: Apache-2.0

"""Decoding of images that are not trusted: the size in the header is checked before any pixel is decoded."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from alphagrpo_ext.models.pixels import to_rgb
from alphagrpo_ext.ranges import PositiveInt, check_ranges


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats that are decoded. Pillow supports more, and some of them run other programs or read other files."""


@dataclass(frozen=True)
class ImageLimits:
    """
    Size limits of images that are decoded.

    Args:
        max_side (`int`, *optional*, defaults to `4096`): Largest side, in pixels.
        max_pixels (`int`, *optional*, defaults to `2**22`): Largest number of pixels.

    Raises:
        `ValueError`: If a limit is less than 1.
    """

    max_side: PositiveInt = 4096
    max_pixels: PositiveInt = 2**22

    def __post_init__(self) -> None:
        check_ranges(self)

    def check(self, width: int, height: int) -> None:
        """
        Check the size of an image in pixels.

        Raises:
            `ValueError`: If the image is too large.
        """
        if max(width, height) > self.max_side or width * height > self.max_pixels:
            raise ValueError(
                f"the image has {width} x {height} pixels, more than {self.max_side} along a side or "
                f"{self.max_pixels} in all: send a smaller one"
            )


@dataclass(frozen=True)
class EncodedImage:
    """
    An image file in memory whose format and size have been checked.

    Args:
        data (`bytes`): Content of the file.
    """

    data: bytes

    @classmethod
    def from_bytes(cls, data: bytes, limits: ImageLimits) -> EncodedImage:
        """
        Check the content of an image file.

        Raises:
            `ValueError`: If the format is not one of [`IMAGE_FORMATS`], or if the image is too large.
        """
        with _open(data) as image:
            limits.check(*image.size)
        return cls(data)

    @classmethod
    def from_base64(cls, text: str, limits: ImageLimits) -> EncodedImage:
        """
        Check an image file that is encoded in base64.

        Args:
            text (`str`): The file in base64, with or without the prefix of a data URL.
            limits ([`ImageLimits`]): Size limits.

        Raises:
            `ValueError`: If the text is not base64, or as in [`from_bytes`].
        """
        if text.startswith("data:"):
            header, _, text = text.partition(",")
            if not header.endswith(";base64"):
                raise ValueError("the data URL must hold base64: data:image/png;base64,...")
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ValueError(f"the image is not base64 ({error})") from error
        return cls.from_bytes(data, limits)

    def decode(self) -> Image.Image:
        """
        Decode the image to RGB. Transparent pixels become white, and an animation becomes its first frame.

        Raises:
            `ValueError`: If the file is damaged.
        """
        try:
            with _open(self.data) as image:
                return to_rgb(image)
        except Exception as error:
            # Pillow's decoders raise errors of many types, which all mean that the file is damaged.
            raise ValueError(f"the image cannot be decoded ({type(error).__name__}: {error})") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large ({error}): send a smaller one") from error
    except Exception as error:
        raise ValueError(f"the image is not a readable {', '.join(IMAGE_FORMATS)} file") from error
