# SPDX-License-Identifier: Apache-2.0

"""Settings of the plug-in, from environment variables: OpenRLHF hands nothing else to the files that it loads."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


PREFIX = "ALPHAGRPO_"
RECTIFICATIONS = ("minimum", "initial", "off")
# A misspelt name is this much like a right one; the variables of other parts are not.
SIMILARITY = 0.85

CHATML_FEEDBACK = "\n<|im_start|>user\n{image}{request}<|im_end|>\n<|im_start|>assistant\n"
QWEN_IMAGE_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"

SEEN_REQUEST = (
    "This image was painted from what you wrote. Compare it with the request: {prompt}\n"
    "Name what is wrong in the image or missing from it, and say exactly what must be changed. The image is then painted "
    "anew from what you say."
)
UNSEEN_REQUEST = (
    "An image was painted from what you wrote, but you cannot see it. Go through the request once more: {prompt}\n"
    "Name what such an image is likely to get wrong, and say exactly what it must show. The image is then painted anew from "
    "what you say."
)


def _text(value: str) -> str:
    # A shell's plain quotes leave a line break as two characters.
    return value.replace("\\n", "\n")


def _flag(value: str) -> bool:
    answers = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if value.lower() not in answers:
        raise ValueError("true or false")
    return answers[value.lower()]


def _setting(default: Any, read: Callable[[str], Any], expected: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"read": read, "expected": expected}, **kwargs)


@dataclass(frozen=True)
class PluginConfig:
    r"""
    What the plug-in needs to know. A field is set by the environment variable of its name in capitals after `ALPHAGRPO_`,
    e.g. `server_url` by `ALPHAGRPO_SERVER_URL`; an empty variable counts as not set. On several nodes the variables have to
    reach the Ray actors, e.g. by `ray job submit --runtime-env-json`.

    Args:
        server_url (`str`, *optional*, defaults to `"http://127.0.0.1:8001"`):
            Where the reward server is.
        server_key (`str`, *optional*):
            Its bearer key, if it wants one.
        timeout (`float`, *optional*, defaults to `180.0`):
            Seconds for one try of a request.
        max_retries (`int`, *optional*, defaults to `10`):
            Further tries of a request: 10 last about two and a half minutes where no connection can be made.
        max_concurrency (`int`, *optional*, defaults to `8`):
            Requests of one process that are with the server at once; further ones wait. Each vLLM engine is a process, and
            all of them together should not ask for more than the server's `max_queue`, 64 by default.
        seed (`int`, *optional*):
            If set, the noise of an image follows from it, the prompt and the turn, and is the same for a whole group, whose
            rewards then differ by its texts alone. Otherwise the server draws its own.
        num_reflection_rounds (`int`, *optional*, defaults to `1`):
            How often the agent reflects on an image and has it painted anew. 0 only paints.
        rectification (`str`, *optional*, defaults to `"minimum"`):
            What an episode gets whose last image is no better than its first: `"minimum"` the least reward there is, 0;
            `"initial"` the reward of the first image; `"off"` that of the last. See [`rectified_reward`].
        policy_sees_images (`bool`, *optional*, defaults to `True`):
            Whether the policy is a vision-language model that is shown its images. A text-only policy has to be told so: it
            gets the request alone.
        image_placeholder (`str`, *optional*, defaults to `"<|vision_start|><|image_pad|><|vision_end|>"`):
            What stands for one image in a text for the policy's processor. The default is that of Qwen's models.
        feedback_template (`str`, *optional*, defaults to ChatML):
            What follows on the end of the policy's turn, up to the start of its next one, as its chat template writes it.
            `{image}` is where the placeholder goes and `{request}` where the reflection request goes.
        end_of_turn (`str`, *optional*, defaults to `"<|im_end|>"`):
            What ends a turn of the policy. It is put before the feedback where the policy was cut off before it.
        reflection_request (`str`, *optional*):
            What asks the policy to reflect; `{prompt}` stands for the request. Defaults to one text for a policy that sees
            its image and another for one that does not.
        max_new_tokens (`int`, *optional*):
            Most tokens of a turn of the agent. A turn never takes more than its equal share of what is left of
            `--data.max_len`, so that later ones have room.

    Raises:
        `ValueError`: If a value is out of range; the message names the environment variable.
    """

    server_url: str = _setting("http://127.0.0.1:8001", str.strip, "a URL")
    server_key: str | None = _setting(None, str.strip, "a key", repr=False)
    timeout: float = _setting(180.0, float, "a number of seconds")
    max_retries: int = _setting(10, int, "a whole number")
    max_concurrency: int = _setting(8, int, "a whole number")
    seed: int | None = _setting(None, int, "a whole number")
    num_reflection_rounds: int = _setting(1, int, "a whole number")
    rectification: str = _setting("minimum", str.strip, f"one of {', '.join(RECTIFICATIONS)}")
    policy_sees_images: bool = _setting(True, _flag, "true or false")
    image_placeholder: str = _setting(QWEN_IMAGE_PLACEHOLDER, _text, "a text")
    feedback_template: str = _setting(CHATML_FEEDBACK, _text, "a text")
    end_of_turn: str = _setting("<|im_end|>", _text, "a text")
    reflection_request: str | None = _setting(None, _text, "a text")
    max_new_tokens: int | None = _setting(None, int, "a whole number")

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, what: str) -> None:
            if not condition:
                raise ValueError(f"{variable(name)} must {what}, but is {getattr(self, name)!r}")

        require(self.server_url.startswith(("http://", "https://")), "server_url", "start with http:// or https://")
        # Written so that NaN fails too.
        require(0 < self.timeout < float("inf"), "timeout", "be a positive number of seconds")
        require(self.max_retries >= 0, "max_retries", "not be negative")
        require(self.max_concurrency >= 1, "max_concurrency", "be at least 1")
        require(self.num_reflection_rounds >= 0, "num_reflection_rounds", "not be negative")
        require(self.rectification in RECTIFICATIONS, "rectification", f"be one of {', '.join(RECTIFICATIONS)}")
        require(self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", "be at least 1")
        require("{request}" in self.feedback_template, "feedback_template", "contain {request}")
        num_images = self.feedback_template.count("{image}")
        require(num_images == 1 or not self.policy_sees_images, "feedback_template", "contain {image} once")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> PluginConfig:
        """
        Args:
            environment (`Mapping[str, str]`, *optional*): Read instead of the process's own.

        Raises:
            `ValueError`: If a value cannot be read or is out of range, or if a variable's name looks misspelt. The message
                names the variable.
        """
        environment = os.environ if environment is None else environment
        settings = {variable(setting.name): setting for setting in fields(cls)}
        for name in environment:
            if name.startswith(PREFIX) and name not in settings:
                similar = difflib.get_close_matches(name, settings, n=1, cutoff=SIMILARITY)
                if similar:
                    raise ValueError(f"there is no environment variable {name}; did you mean {similar[0]}?")
        values = {}
        for name, setting in settings.items():
            value = environment.get(name, "")
            if not value.strip():
                continue
            try:
                values[setting.name] = setting.metadata["read"](value)
            except ValueError as error:
                raise ValueError(f"{name} must be {setting.metadata['expected']}, but is {value!r}") from error
        return cls(**values)

    @property
    def request(self) -> str:
        """The reflection request, with `{prompt}` still in it."""
        if self.reflection_request is not None:
            return self.reflection_request
        return SEEN_REQUEST if self.policy_sees_images else UNSEEN_REQUEST


def variable(name: str) -> str:
    """The environment variable of a field of [`PluginConfig`]."""
    return PREFIX + name.upper()
