# SPDX-License-Identifier: Apache-2.0

"""
The reward server: DVReward, and a painter, over HTTP.

```bash
python -m reward_models.server --judge openai --judge_base_url http://localhost:8000/v1 --painter policy \\
    --painter_model runs/reasoning_t2i_bagel --image_height 512 --image_width 512
```

- `POST /score` scores images by their questions.
- `POST /generate` paints prompts, after given thoughts.
- `POST /get_reward` is OpenRLHF's remote reward (`--reward.remote_url`): it paints what the policy has thought out, and
  scores that.
- `GET /health` and `GET /metrics` are for those who run it.

`server_protocol.py` documents the messages. With the environment variable `ALPHAGRPO_SERVER_KEY` every request but that for
`/health` has to bring that key, as `Authorization: Bearer <key>`.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl import TrlParser

from alphagrpo_ext.files import require_extra
from reward_models.arguments import RewardArguments
from reward_models.dvreward import DVReward
from reward_models.files.image_decoding import ImageLimits
from reward_models.painters.policy import Painter, PainterArguments


if TYPE_CHECKING:
    from fastapi import FastAPI


KEY_VARIABLE = "ALPHAGRPO_SERVER_KEY"


@dataclass
class ServerArguments(RewardArguments, PainterArguments):
    """
    Arguments of the reward server: who judges (see [`RewardArguments`]), who paints (see [`PainterArguments`]), where it
    listens, and what it takes.

    Memory is bounded: there are at most `max_queue` bodies, and images are decoded when their turn comes. That is at most
    64 with the judge, and those of the requests that are with the painter (one for the policy, 16 for an endpoint), each
    of at most `max_image_pixels`.

    Args:
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at. One that other machines reach needs a key.
        port (`int`, *optional*, defaults to `8001`):
            Port to listen at.
        max_body_bytes (`int`, *optional*, defaults to 32 MiB):
            Largest body of a request. A larger one is 413.
        max_image_side (`int`, *optional*, defaults to `4096`):
            Pixels along the longer side of an image that is sent. A larger one is 422.
        max_image_pixels (`int`, *optional*, defaults to `2**22`):
            Pixels of an image that is sent. A larger one is 422.
        max_items (`int`, *optional*, defaults to `64`):
            Items of a request. More are 422.
        max_questions (`int`, *optional*, defaults to `64`):
            Questions of an item, those that are not valid included. More are 422.
        max_queue (`int`, *optional*, defaults to `64`):
            Requests that are processed or wait. Further ones are 429.
        request_timeout (`float`, *optional*, defaults to `150.0`):
            Seconds for a request, from its first byte; then it is 504. OpenRLHF waits for 180.
        shutdown_timeout (`int`, *optional*, defaults to `30`):
            Seconds that requests under way have when the server is told to stop.
    """

    host: str = field(
        default="127.0.0.1",
        metadata={"help": f"Address to listen at; one that other machines reach needs a key in {KEY_VARIABLE}."},
    )
    port: int = field(default=8001, metadata={"help": "Port to listen at."})
    max_body_bytes: int = field(default=2**25, metadata={"help": "Largest body of a request."})
    max_image_side: int = field(
        default=ImageLimits.max_side, metadata={"help": "Pixels along the longer side of an image that is sent."}
    )
    max_image_pixels: int = field(
        default=ImageLimits.max_pixels, metadata={"help": "Pixels of an image that is sent."}
    )
    max_items: int = field(default=64, metadata={"help": "Items of a request."})
    max_questions: int = field(default=64, metadata={"help": "Questions of an item."})
    max_queue: int = field(default=64, metadata={"help": "Requests that are processed or wait; beyond it 429."})
    request_timeout: float = field(default=150.0, metadata={"help": "Seconds for a request; then 504."})
    shutdown_timeout: int = field(
        default=30, metadata={"help": "Seconds that requests under way have when the server is told to stop."}
    )


def create_app(args: ServerArguments, reward: DVReward | None = None, painter: Painter | None = None) -> FastAPI:
    """
    The server as an ASGI application, for `uvicorn` or whatever else runs such.

    Args:
        args ([`ServerArguments`]):
            The arguments.
        reward ([`DVReward`], *optional*):
            Scores, in place of the judge that `args` name.
        painter ([`Painter`], *optional*):
            Paints, in place of the painter that `args` name.

    Raises:
        `ImportError`: If the extra `server` is not installed.
        `ValueError`: If an argument is out of range, the judge cannot read what the painter paints, or the server would be
            open to other machines.
    """
    for module in ("fastapi", "prometheus_client"):
        require_extra(module, "server")
    from reward_models.server.app import ServerLimits, build_app
    from reward_models.server.requests import RequestLimits

    limits = ServerLimits(
        RequestLimits(ImageLimits(args.max_image_side, args.max_image_pixels), args.max_items, args.max_questions),
        args.max_body_bytes,
        args.max_queue,
        args.request_timeout,
    )
    key = server_key(args.host)
    painter = painter or args.make_painter()
    reward = reward or args.make_reward(painter.policy if painter else None)
    if painter is not None:
        reward.validate_image_size(args.image_height, args.image_width)
    return build_app(reward, painter, limits, key, args.judge, args.painter)


def server_key(host: str) -> str | None:
    """
    The key in the environment; `None` if there is none.

    Args:
        host (`str`): Address to listen at.

    Raises:
        `ValueError`: If there is none, and the address is not of this machine alone.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if key is None and not is_loopback(host):
        raise ValueError(
            f"host {host} can be reached from other machines: set {KEY_VARIABLE} to a key that clients must send, or "
            "listen at 127.0.0.1"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def configure_logging() -> None:
    """One line of JSON a request on standard output, which other lines would spoil; warnings of all else on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("reward_models.server.__main__")
    requests.setLevel(logging.INFO)
    requests.addHandler(handler)
    requests.propagate = False


def main(args: ServerArguments) -> None:
    require_extra("uvicorn", "server")
    import uvicorn

    configure_logging()
    uvicorn.run(
        create_app(args),
        host=args.host,
        port=args.port,
        # Every request has its own line already.
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=args.shutdown_timeout,
    )


if __name__ == "__main__":
    (arguments,) = TrlParser((ServerArguments,)).parse_args_and_config()
    main(arguments)
