# SPDX-License-Identifier: Apache-2.0

"""
The one reader of images: upright, opaque, eight bits, RGB.

Training, evaluation, judges, the reward server, exporters and reports all get their images from [`read_image`] or, if they hold
an image already, from [`to_rgb`].
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

from alphagrpo_ext.file_formats import HEAD_SIZE, format_name


_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_FULLY_CHECKED_PIXELS = 2**20
_EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Entries of `Image.info` in which Pillow looks for an orientation."""


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Convert an image to RGB with 8 bits per channel.

    - It is turned upright as its EXIF orientation says, unless its EXIF data is damaged. The result has no EXIF data.
    - Transparent pixels are painted over white, in every mode: alpha channels, palettes, and a transparent color.
    - 16-bit gray is scaled to 8 bits. Integers in 0 to 65535 are taken as 16 bits. Floats are taken as 0 to 1 if none is
      greater than 1, and as 0 to 255 otherwise.
    - Of an animation, the current frame is taken.

    Args:
        image (`PIL.Image.Image`): An image in any mode. An RGB image without EXIF data and transparency is returned as it is.

    Raises:
        `ValueError`: If values are outside these ranges, or if the mode cannot be converted.
        `OSError`: If a file that has not been decoded yet is damaged.
    """
    # The tile is only known until the pixels are decoded.
    raw_mode = _raw_mode(image)
    _load(image)
    image = _upright(image)
    if image.mode in _WITH_ALPHA or image.mode == "P" and image.has_transparency_data:
        return _over_white(image.convert("LA") if image.mode == "La" else image)
    color = _scaled_gray(image, raw_mode) if image.mode[0] in "IF" else image
    if image.info.get("transparency") is not None and image.mode != "P":
        return _without_color(color, image, raw_mode)
    if color.mode == "RGB":
        is_plain = type(color) is Image.Image and not any(key in color.info for key in _EXIF_KEYS)
        return color if is_plain else _without_exif(color.copy())
    return _without_exif(_lab_to_rgb(color) if color.mode == "LAB" else color.convert("RGB"))


def read_image(source: Any, formats: Sequence[str] | None = None) -> Image.Image:
    """
    Read an image; see [`to_rgb`] for the result. An animation becomes its first frame.

    Args:
        source (`PIL.Image.Image`, `bytes`, `str`, `Path` or `Mapping[str, Any]`):
            An image, the content of a file, its path or `hf://` address, or `{"bytes": ..., "path": ...}` as
            `datasets.Image(decode=False)` returns it.
        formats (`Sequence[str]`, *optional*):
            Pillow's names of formats that may be decoded. Default: all that decode without another program.

    Raises:
        `ValueError`: If there is no such file, or if it is damaged or not an image. The message names the file.
    """
    with _Errors(source):
        if isinstance(source, Image.Image):
            return to_rgb(source)
        with open_image(file_content(source), formats) as image:
            return to_rgb(image)


def check_image(source: Any) -> None:
    """
    Check that an image can be read, for less time than it takes to read it: a large JPEG is decoded at an eighth of its size, and no
    large image is converted.

    Args:
        source: As in [`read_image`].

    Raises:
        `ValueError`: As in [`read_image`].
    """
    with _Errors(source):
        if isinstance(source, Image.Image):
            to_rgb(source)
            return
        data = file_content(source)
        with open_image(data) as image:
            width, height = image.size
            if image.mode[0] in "IF" or image.mode == "LAB" or width * height <= _FULLY_CHECKED_PIXELS:
                to_rgb(image)
                return
            if image.format == "PNG":
                # Decoding does not compare the checksums of pixels, and after comparing them Pillow cannot decode.
                with open_image(data) as unread:
                    unread.verify()
            image.draft("RGB", (width // 8, height // 8))
            image.load()


def open_image(data: bytes, formats: Sequence[str] | None = None) -> Image.Image:
    """
    Open an image file in memory. Its pixels are not decoded yet.

    Args:
        data (`bytes`): Content of the file.
        formats (`Sequence[str]`, *optional*): As in [`read_image`].

    Raises:
        `ValueError`: If it is not an image in one of the formats, or larger than Pillow decodes.
    """
    try:
        return Image.open(BytesIO(data), formats=_safe_formats() if formats is None else formats)
    except Image.DecompressionBombError as error:
        advice = "scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        raise ValueError(
            f"the image is too large ({error}): {advice if formats is None else 'send a smaller one'}"
        ) from error
    except Exception as error:
        found = format_name(data[:HEAD_SIZE])
        is_image = found is not None and found.endswith("image")
        names = "image" if formats is None else f"{', '.join(formats)} file"
        because = f": it is {'damaged' if is_image else found}" if found else ""
        raise ValueError(f"the image is not a readable {names}{because}") from error


@cache
def _safe_formats() -> tuple[str, ...]:
    """Formats that Pillow decodes itself. For EPS and WMF it runs other programs."""
    Image.init()
    return tuple(name for name in Image.ID if name not in ("EPS", "WMF"))


class _Errors:
    """Turns all errors of decoders, which are of many types, into a `ValueError` that names the image."""

    def __init__(self, source: Any) -> None:
        path = source.get("path") if isinstance(source, Mapping) else source
        self.name = str(path) if isinstance(path, str | Path) else getattr(source, "filename", None)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception):
            return
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"there is no image {self.name}") from error
        if isinstance(error, ValueError):
            text = str(error)
        else:
            text = f"the image cannot be decoded ({type(error).__name__}: {error})"
        raise ValueError(f"{self.name}: {text}" if self.name else text) from error


def file_content(source: Any) -> bytes:
    """
    Read the content of an image file, which is not decoded.

    Args:
        source: As in [`read_image`], without a `PIL.Image.Image`.

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If the source is of another kind, or if bytes and path are both missing.
    """
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if data is None and path is None:
            raise ValueError("the image is missing: it has neither bytes nor a path")
        source = path if data is None else data
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str) and "://" in source:
        from datasets.utils.file_utils import xopen

        with xopen(source, "rb") as file:
            return file.read()
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    if isinstance(source, list | tuple):
        raise ValueError(f"a row has one image, but here are {len(source)} in a list")
    raise ValueError(f"an image, its bytes or its path is needed, but this is {type(source).__name__}")


def _raw_mode(image: Image.Image) -> str:
    """How the pixels are stored in the file, e.g. `"L;4"`; empty if they are decoded already."""
    for tile in getattr(image, "tile", ()):
        args = tile[3]
        first = args[0] if isinstance(args, tuple) and args else args
        return first if isinstance(first, str) else ""
    return ""


def _load(image: Image.Image) -> None:
    name = getattr(image, "filename", "")
    if name and image.format == "TIFF":
        # Pillow 13 maps such a file into memory with the size that it has upright, and so mixes up its rows.
        image.filename = ""
    try:
        image.load()
    finally:
        if name:
            image.filename = name


def _upright(image: Image.Image) -> Image.Image:
    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_turned else image
    # Pillow's parser raises errors of many types. Its pixels are right where only its metadata is damaged.
    except Exception:
        return image


def _without_exif(image: Image.Image) -> Image.Image:
    for key in _EXIF_KEYS:
        image.info.pop(key, None)
    return image


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _without_color(color: Image.Image, image: Image.Image, raw_mode: str) -> Image.Image:
    """Paint the pixels white that have the color which the file calls transparent."""
    import numpy as np

    key = image.info["transparency"]
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    if not isinstance(key, int | tuple) or np.shape(key) != pixels.shape[2:]:
        return color.convert("RGB")
    # The color is given in the depth of the file, and Pillow converts the pixels to eight bits.
    if raw_mode in ("L;2", "L;4"):
        key = key * 255 // (2 ** int(raw_mode[-1]) - 1)
    elif raw_mode.startswith("RGB;16"):
        key = tuple(value >> 8 for value in key)
    opaque = pixels != np.asarray(key)
    opaque = opaque if opaque.ndim == 2 else opaque.any(axis=2)
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(color.convert("RGB"), mask=Image.fromarray(opaque.astype(np.uint8) * 255))
    return canvas


def _scaled_gray(image: Image.Image, raw_mode: str) -> Image.Image:
    """Scale gray of more than eight bits to eight."""
    import numpy as np

    values = np.asarray(image)
    low, high = (values.min().item(), values.max().item()) if values.size else (0, 0)
    if image.mode == "F":
        # Comparisons with NaN are false.
        if not (low >= 0 and high <= 255):
            raise ValueError(
                f"the image holds floats from {low:g} to {high:g}, but must be in 0 to 1 or in 0 to 255: convert it to 8 bits"
            )
        scaled = values * 255 if high <= 1 else values
        return Image.fromarray(np.rint(scaled).astype(np.uint8))
    if low < 0 or high > 65535:
        raise ValueError(
            f"the image holds integers from {low} to {high}, but must be in 0 to 65535: convert it to 8 or 16 bits"
        )
    largest = 4095 if raw_mode == "I;12" else 65535
    return Image.fromarray(((values.astype(np.int64) * 255 + largest // 2) // largest).astype(np.uint8))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
