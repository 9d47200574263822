# SPDX-License-Identifier: Apache-2.0

"""
Images in files that stay encoded until they are needed.

Of an image that is not trusted, such as one in a request to the server, the format and the size in the header are checked before
any pixel is decoded. All are decoded by [`~alphagrpo_ext.images.read_image`].
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from PIL import Image

from alphagrpo_ext.images import open_image, read_image
from alphagrpo_ext.ranges import PositiveInt, check_ranges


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats that are decoded if the image is not trusted. Pillow supports more, and some of its decoders are little tested."""

_WHITE_SPACE = b" \t\r\n"
_MAX_HEADER_LENGTH = 100
"""Largest number of characters of a data URL before its comma."""


class OversizedImageError(ValueError):
    """An image that is not trusted has more pixels than its limits allow."""


@dataclass(frozen=True)
class ImageLimits:
    """
    Size limits of images that are not trusted.

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
            [`OversizedImageError`]: If the image is too large.
        """
        if max(width, height) > self.max_side or width * height > self.max_pixels:
            raise OversizedImageError(
                f"the image has {width} x {height} pixels, more than {self.max_side} along a side or "
                f"{self.max_pixels} in all"
            )

    def including(self, width: int, height: int) -> ImageLimits:
        """Return these limits, raised as far as an image of this size needs."""
        return ImageLimits(max(self.max_side, width, height), max(self.max_pixels, width * height))


@dataclass(frozen=True)
class EncodedImage:
    """
    An image file in memory.

    Args:
        data (`bytes`): Content of the file.
        formats (`tuple[str, ...]`, *optional*): Formats that may be decoded; `None` for all.
    """

    data: bytes
    formats: tuple[str, ...] | None = None

    @classmethod
    def from_bytes(cls, data: bytes, limits: ImageLimits | None = None) -> EncodedImage:
        """
        Check format and size of an image file.

        Args:
            data (`bytes`): Content of the file.
            limits ([`ImageLimits`], *optional*):
                Size limits of an image that is not trusted, whose format must be one of [`IMAGE_FORMATS`]. `None` for a file of
                the user's own.

        Raises:
            [`OversizedImageError`]: If the image is too large.
            `ValueError`: If it is not an image in such a format.
        """
        formats = None if limits is None else IMAGE_FORMATS
        with open_image(data, formats) as image:
            if limits is not None:
                limits.check(*image.size)
        return cls(data, formats)

    @classmethod
    def from_base64(cls, text: str, limits: ImageLimits) -> EncodedImage:
        """
        Check an image file that is encoded in base64.

        Args:
            text (`str`): The file in base64, with or without the prefix of a data URL. It may be broken into lines.
            limits ([`ImageLimits`]): Size limits.

        Raises:
            [`OversizedImageError`] or `ValueError`: As in [`from_bytes`], and if the text is not base64.
        """
        if text.startswith("data:"):
            end = text.find(",", 0, _MAX_HEADER_LENGTH + 1)
            header = text[: max(end, 0)]
            if not (header.isascii() and header.endswith(";base64")):
                raise ValueError("the data URL must hold base64 after a short header: data:image/png;base64,...")
            text = text[end + 1 :]
        try:
            data = base64.b64decode(text.encode("ascii").translate(None, _WHITE_SPACE), validate=True)
        except ValueError as error:
            raise ValueError(f"the image is not base64 ({error})") from error
        return cls.from_bytes(data, limits)

    def decode(self) -> Image.Image:
        """
        Decode the image; see [`~alphagrpo_ext.images.read_image`].

        Raises:
            `ValueError`: If the file is damaged.
        """
        return read_image(self.data, self.formats)
