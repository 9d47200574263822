# SPDX-License-Identifier: Apache-2.0

"""Arguments of the reward server, its limits among them, and its key."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Annotated

from alphagrpo_ext.ranges import NonNegativeInt, PositiveFloat, PositiveInt
from alphagrpo_ext.reward_client.addresses import is_header_text
from reward_models.arguments import RewardArguments
from reward_models.files.image_decoding import ImageLimits, OversizedImageError
from reward_models.painters.base import PainterArguments


KEY_VARIABLE = "ALPHAGRPO_SERVER_KEY"
MAX_DEFAULT_CONNECTIONS = 1024
# A question has about ten: its object, and names and values of its fields.
_VALUES_PER_QUESTION = 32
# So many take a few megabytes, and an error can still name the field that holds too many.
_MIN_BODY_VALUES = 2**14


@dataclass
class ServerArguments(RewardArguments, PainterArguments):
    """
    Arguments of the reward server: the judge (see [`RewardArguments`]), the painter (see [`PainterArguments`]), the address,
    and the limits; the help text of a field describes it.

    The limits bound the memory. The server holds at most `max_queue` bodies of `max_body_bytes`. A body is parsed only if it
    holds about as many values as `max_items` and `max_questions` need, and takes at most `max_body_bytes` if each character of a
    text that is not ASCII counts four. A file of a few kilobytes
    can decode to megabytes, so an image is decoded only when its turn comes: at most 64 images are decoded for the judge,
    and for the painter those of the requests that it works on (one for the policy, 16 for an endpoint).
    """

    host: str = field(
        default="127.0.0.1",
        metadata={
            "help": f"Address to listen at. An address that other machines can reach needs a key in {KEY_VARIABLE}."
        },
    )
    port: Annotated[int, "[0, 65535]"] = field(default=8001, metadata={"help": "Port to listen at."})
    max_body_bytes: PositiveInt = field(
        default=2**25,
        metadata={
            "help": "Largest body of a request; a larger one gets 413. Each character of a text that is not ASCII counts four bytes."
        },
    )
    max_image_side: PositiveInt = field(
        default=ImageLimits.max_side,
        metadata={
            "help": "Largest width and height of an image in a request, in pixels; a larger one gets 422. No larger one is painted."
        },
    )
    max_image_pixels: PositiveInt = field(
        default=ImageLimits.max_pixels,
        metadata={
            "help": "Largest number of pixels of an image in a request; a larger one gets 422. No larger one is painted."
        },
    )
    max_items: PositiveInt = field(default=64, metadata={"help": "Largest number of items per request; more get 422."})
    max_questions: PositiveInt = field(
        default=64,
        metadata={"help": "Largest number of questions per item, including those that are not valid; more get 422."},
    )
    max_queue: PositiveInt = field(
        default=64, metadata={"help": "Largest number of requests that run or wait; a further one gets 429."}
    )
    max_connections: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Largest number of open connections; further ones are closed at once. Default: half of the number of files "
            f"that the process may open (`ulimit -n`), at most {MAX_DEFAULT_CONNECTIONS}."
        },
    )
    request_timeout: PositiveFloat = field(
        default=150.0,
        metadata={
            "help": "Seconds for a request, from its first byte; then it gets 504. A connection that has sent no complete head "
            "after that time is closed. OpenRLHF waits for 180."
        },
    )
    shutdown_timeout: NonNegativeInt = field(
        default=30, metadata={"help": "Seconds to finish running requests after the server is told to stop."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_limits = ImageLimits(self.max_image_side, self.max_image_pixels)
        if self.painter == "none":
            return
        try:
            self.image_limits.check(self.image_width, self.image_height)
        except OversizedImageError as error:
            # Clients send painted images to `/score`.
            raise ValueError(
                f"image_width={self.image_width} and image_height={self.image_height} are more than the server takes itself: "
                f"raise max_image_side={self.max_image_side} or max_image_pixels={self.max_image_pixels}, or paint smaller images"
            ) from error

    @property
    def connection_limit(self) -> int:
        """`max_connections`, or its default."""
        return self.max_connections or min(max(_max_open_files() // 2, 1), MAX_DEFAULT_CONNECTIONS)

    @property
    def max_record_values(self) -> int:
        """Largest number of JSON values of one record, with room for fields that the server ignores."""
        return _VALUES_PER_QUESTION * (self.max_questions + 1)

    @property
    def max_body_values(self) -> int:
        """Largest number of JSON values of a body."""
        return max(self.max_record_values * (self.max_items + 1), _MIN_BODY_VALUES)


def server_key(host: str) -> str | None:
    """
    Return the key from the environment, or `None` if there is none.

    Args:
        host (`str`): Address to listen at.

    Raises:
        `ValueError`: If there is no key and other machines can reach the address, or if no client could send the key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if key is not None and not is_header_text(key):
        raise ValueError(
            f"{KEY_VARIABLE} must consist of printable ASCII characters, since clients send it in a header"
        )
    if key is None and not is_loopback(host):
        raise ValueError(
            f"other machines can reach host {host}: set {KEY_VARIABLE} to a key that clients must send, or "
            "listen at 127.0.0.1"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _max_open_files() -> int:
    """Number of files that the process may open."""
    try:
        import resource
    except ImportError:
        # Windows has no such limit that matters here.
        return 2 * MAX_DEFAULT_CONNECTIONS
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * MAX_DEFAULT_CONNECTIONS if limit == resource.RLIM_INFINITY else limit
