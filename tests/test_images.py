# SPDX-License-Identifier: Apache-2.0

"""The reader of images: every mode that a file can hold, in every orientation, and files that are broken."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from alphagrpo_ext.images import check_image, read_image, to_rgb


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "WEBP": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "JPEG": ("1", "L", "RGB", "RGBX", "CMYK", "YCbCr"),
    "GIF": ("1", "L", "LA", "P", "RGB", "RGBA"),
}
ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
"""What a viewer does with a picture of each orientation."""


def gray_picture(mode: str) -> Image.Image:
    """A dark picture with a light corner, which tells all orientations apart, in any mode."""
    gray = np.full((6, 10), 51, dtype=np.uint8)
    gray[:2, :3] = 255
    picture = Image.fromarray(gray)
    if mode == "I;16":
        return Image.fromarray(gray.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(gray.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(gray.astype(np.float32))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(picture.convert("RGB"), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    return picture.convert("P").convert("PA") if mode == "PA" else picture.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}
    image.save(buffer, kind, **{**lossless.get(kind, {}), **options})
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_every_mode_of_every_format_is_read_upright(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(MODES)))
    mode = data.draw(st.sampled_from(MODES[kind]))
    # GIF has no orientation.
    orientation = 1 if kind == "GIF" else data.draw(st.sampled_from([None, *ORIENTED]))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = encoded(gray_picture(mode), kind, **({} if kind == "GIF" else {"exif": exif}))
    check_image(file)
    image = read_image(file)
    # A bit image has black for the dark gray.
    picture = pixels(gray_picture("1").convert("RGB") if mode == "1" else gray_picture("RGB"))
    expected = ORIENTED[orientation or 1](picture)
    assert image.size == expected.shape[1::-1]
    assert np.abs(pixels(image) - expected).max() <= (24 if kind == "JPEG" else 3 if mode in ("LAB", "YCbCr") else 0)
    # What was read is not turned again.
    assert np.array_equal(pixels(read_image(image)), pixels(image))
    assert np.array_equal(pixels(read_image(encoded(image))), pixels(image))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
@pytest.mark.parametrize("is_saved", [False, True])
def test_alpha_is_painted_over_white(mode: str, is_saved: bool) -> None:
    kind = "TIFF" if mode == "PA" else "PNG"
    image = gray_picture("LA" if mode == "La" else "RGBA" if mode in ("RGBa", "PA") else mode)
    alpha = np.zeros((6, 10), dtype=np.uint8)
    alpha[:, 5:] = 255
    if mode == "PA":
        image = gray_picture("PA")
    image.putalpha(Image.fromarray(alpha))
    if mode in ("La", "RGBa"):
        # They hold colors that are multiplied by alpha, and no file does.
        image, is_saved = image.convert(mode), False
    seen = pixels(read_image(encoded(image, kind)) if is_saved else to_rgb(image))
    assert (seen[:, :5] == 255).all() and (seen[:, 5:] == 51).all()


@pytest.mark.parametrize(
    ("image", "key", "transparent"),
    [
        (gray_picture("1"), 0, 0),
        (gray_picture("L"), 51, 51),
        (gray_picture("RGB"), (51, 51, 51), 51),
        (gray_picture("I;16"), 51 * 257, 51),
        (Image.fromarray(np.full((6, 10), 7, np.uint8)).convert("P"), 7, 7),
    ],
)
def test_a_transparent_color_is_painted_white(image: Image.Image, key: object, transparent: int) -> None:
    opaque = pixels(read_image(encoded(image)))
    seen = pixels(read_image(encoded(image, transparency=key)))
    assert (seen[opaque == transparent] == 255).all()
    assert np.array_equal(seen[opaque != transparent], opaque[opaque != transparent])


def test_a_transparent_gray_of_two_bits_is_painted_white() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    # Two bits per pixel, so the row is one byte.
    header = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", 1))
    body += chunk(b"IDAT", zlib.compress(b"\0" + bytes([0b00011011]))) + chunk(b"IEND", b"")
    image = read_image(b"\x89PNG\r\n\x1a\n" + body)
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 255, 170, 255]


@given(st.integers(0, 65535))
def test_sixteen_bits_are_scaled_to_eight(value: int) -> None:
    for image in (Image.fromarray(np.array([[value]], np.uint16)), Image.new("I", (1, 1), value)):
        assert to_rgb(image).getpixel((0, 0)) == (round(value / 257),) * 3


def test_floats_are_taken_by_their_range() -> None:
    def read(*values: float) -> list[int]:
        return [int(v) for v in pixels(to_rgb(Image.fromarray(np.array([values], np.float32))))[0, :, 0]]

    assert read(0.0, 0.5, 1.0) == [0, 128, 255]
    assert read(0.0, 127.6, 255.0) == [0, 128, 255]
    for values in ((0.0, 256.0), (-0.1, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="must be in 0 to 1 or in 0 to 255"):
            read(*values)
    with pytest.raises(ValueError, match="integers from -1 to 70000"):
        to_rgb(Image.fromarray(np.array([[-1, 70000]], np.int32)))


def test_an_open_file_is_read_as_its_bytes_are(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("TIFF", "PNG", "JPEG", "WEBP"):
        path = tmp_path / f"picture.{kind.lower()}"
        path.write_bytes(encoded(gray_picture("L"), kind, exif=exif))
        with Image.open(path) as image:
            seen = pixels(to_rgb(image))
        assert seen.shape == (10, 6, 3)
        assert np.array_equal(seen, pixels(read_image(path.read_bytes())))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_costs_no_picture(kind: str, tmp_path: Path) -> None:
    """The picture itself is whole, in a file, decoded once, and decoded already when it is given on."""
    file = encoded(Image.new("RGB", (6, 4), "red"), kind, exif=b"Exif\0\0garbage!!")
    check_image(file)
    image = read_image(file)
    again = to_rgb(image)
    assert image.size == again.size == (6, 4)
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(file)
    with Image.open(path) as opened:
        assert np.array_equal(pixels(to_rgb(opened)), pixels(again))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_upright_image_has_nothing_that_turns_it_again(kind: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(encoded(Image.new(mode, (6, 4)), kind, exif=exif))
    assert image.size == (4, 6)
    assert image.getexif().get(0x0112, 1) == 1
    assert to_rgb(image) is image


def test_a_plain_image_is_not_copied() -> None:
    image = Image.new("RGB", (3, 2))
    assert to_rgb(image) is image


def test_an_animation_becomes_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        file = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert read_image(file).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("kind", "side"), [*((kind, 64) for kind in MODES), ("JPEG", 1100), ("PNG", 1100), ("TIFF", 1100)]
)
def test_a_cut_file_is_found_without_and_with_reading_it(kind: str, side: int) -> None:
    file = encoded(Image.effect_noise((side, side), 80).convert("RGB"), kind)
    for read in (check_image, read_image):
        read(file)
        for share in (0.5, 0.97):
            with pytest.raises(ValueError):
                read(file[: int(len(file) * share)])


@pytest.mark.parametrize("damage", ["cut", "overwritten", "filter"])
@pytest.mark.parametrize("side", [64, 1100])
def test_a_png_with_right_checksums_and_wrong_pixels_is_found(damage: str, side: int) -> None:
    rows = bytearray(b"".join(b"\0" + bytes(3 * side) for _ in range(side)))
    if damage == "filter":
        rows[0] = 9
    data = zlib.compress(rows)
    if damage == "cut":
        data = data[: len(data) // 2]
    if damage == "overwritten":
        data = data[:20] + b"\xff" * 10 + data[30:]
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    ]
    for read in (check_image, read_image):
        with pytest.raises(ValueError):
            read(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable image: it is empty"),
        (b"hello", "is not a readable image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "it is a Git-LFS pointer .*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "it is an HTML page"),
        (b"\x89PNG\r\n\x1a\n", "it is damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a readable image"),
    ],
)
def test_what_is_no_image_is_named_with_its_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    for source in (path, str(path), {"bytes": None, "path": str(path)}, {"bytes": content, "path": "picture.png"}):
        for read in (check_image, read_image):
            with pytest.raises(ValueError, match=f"picture.png: .*{message}"):
                read(source)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2))
    for source, message in (
        (tmp_path / "gone.png", "there is no image .*gone.png"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ([image, image], "a row has one image, but here are 2"),
        (np.zeros((2, 2, 3)), "but this is ndarray"),
        (tmp_path, "cannot be decoded"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(source)
