# SPDX-License-Identifier: Apache-2.0

"""Answers that are too large, too slow or damaged."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import itertools
import json
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from alphagrpo_ext.reward_client.client import PaintRequest, RewardServerError, decode_image, encode_image


PICTURE = encode_image(Image.new("RGB", (8, 8), "red"))
ANSWER = json.dumps({"images": [PICTURE]}).encode()
Say = Callable[..., str]


@pytest.fixture
def say() -> Iterator[Say]:
    """Starts a server that gives one answer to everything, with a head unless it has one, and returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(parts: Iterable[bytes] | bytes, has_head: bool = False, **headers: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                if not has_head:
                    self.send_response(200)
                    for name, value in headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.end_headers()
                with contextlib.suppress(OSError):
                    for part in [parts] if isinstance(parts, bytes) else parts:
                        self.wfile.write(part)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)]
)
def test_compressed_answers_are_read(ask, say: Say, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    (image,) = ask(say(compress(ANSWER), content_encoding=encoding), "generate", [PaintRequest("a")])
    assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_answer_without_end_is_left(ask, say: Say, is_compressed: bool) -> None:
    headers = {"content_encoding": "gzip"} if is_compressed else {}
    url = say(itertools.repeat(bytes(2**16)), **headers)
    with pytest.raises(RewardServerError, match="of more than 2000000 bytes: raise ALPHAGRPO_MAX_ANSWER_BYTES"):
        ask(url, "generate", [PaintRequest("a")], max_answer_bytes=2_000_000)


def test_gzip_bomb_costs_no_more_memory_than_the_bound(ask, say: Say) -> None:
    bomb = gzip.compress(bytes(200_000_000), compresslevel=9)
    url = say(bomb, content_encoding="gzip", content_length=str(len(bomb)))
    tracemalloc.start()
    try:
        with pytest.raises(RewardServerError, match="of more than 1000000 bytes"):
            ask(url, "generate", [PaintRequest("a")], max_answer_bytes=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("answer", "encoding", "reason"),
    [
        (ANSWER, "gzip", "is not gzip, as its header says"),
        (ANSWER, "deflate", "is not deflate, as its header says"),
        (ANSWER, "br", "is compressed by 'br', which was not asked for"),
        (ANSWER, "zstd", "is compressed by 'zstd', which was not asked for"),
        (gzip.compress(ANSWER, mtime=0)[:-9], "gzip", "is compressed by 'gzip' and is cut off"),
        (gzip.compress(ANSWER, mtime=0)[:-4], "gzip", "is compressed by 'gzip' and is cut off"),
        (b"", "gzip", "is compressed by 'gzip' and is cut off"),
    ],
    ids=["not gzip", "not deflate", "brotli", "zstandard", "cut off", "cut off in its checksum", "empty"],
)
def test_answer_that_cannot_be_decompressed_is_named(ask, say: Say, answer: bytes, encoding: str, reason: str) -> None:
    with pytest.raises(RewardServerError, match=f"{reason}.*a proxy may be in between"):
        ask(say(answer, content_encoding=encoding), "generate", [PaintRequest("a")], max_retries=0)


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nx: "], ids=["body", "head"])
def test_answer_that_drips_is_left_after_the_deadline(ask, say: Say, begin: bytes) -> None:
    def drip() -> Iterator[bytes]:
        yield begin
        for _ in range(600):
            yield b" "
            time.sleep(0.05)

    start = time.monotonic()
    with pytest.raises(RewardServerError, match="did not answer in 0.4 s after 1 try"):
        ask(say(drip(), has_head=begin != b""), "generate", [PaintRequest("a")], timeout=0.4, max_retries=0)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "answer",
    ['{"images": [%s[]]}', '{"images": [""], "more": [%s0]}', '{"images": [[%s[]]]}'],
    ids=["list", "field", "item"],
)
def test_answer_of_many_values_is_not_parsed(ask, say: Say, answer: str) -> None:
    url = say((answer % ("[]," * 500_000)).encode())
    with pytest.raises(RewardServerError, match="far more values than 1 images have"):
        ask(url, "generate", [PaintRequest("a")])


def test_deeply_nested_answer_is_an_error(ask, say: Say) -> None:
    with pytest.raises(RewardServerError, match="probably not the reward server"):
        ask(say(b"[" * 5000 + b"]" * 5000), "generate", [PaintRequest("a")])


def test_image_of_too_many_pixels_is_not_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (8192, 4096)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="8192 x 4096 pixels"):
        decode_image(base64.b64encode(buffer.getvalue()).decode())
