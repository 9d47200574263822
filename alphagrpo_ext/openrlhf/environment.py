# SPDX-License-Identifier: Apache-2.0

"""
Settings of the plug-in for OpenRLHF, read from environment variables.

OpenRLHF passes nothing else to the files that it loads, so there is no command line and no configuration file here. The files
are loaded when an actor starts: a wrong setting stops the run there, and not at the first reward. Nothing heavy is imported.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict


PREFIX = "ALPHAGRPO_"
# A misspelt name is at least this similar to the right one. Variables of other programs are less similar.
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

Rectification = Literal["minimum", "initial", "off"]
# Inside a shell's plain quotes, a line break is written as two characters.
TemplateText = Annotated[str, AfterValidator(lambda text: text.replace("\\n", "\n"))]
ServerURL = Annotated[str, StringConstraints(strip_whitespace=True)]


class PluginConfig(BaseSettings):
    r"""
    Settings of the plug-in.

    A field that is not passed is read from the environment variable `ALPHAGRPO_` plus its name in capitals: `server_url`
    from `ALPHAGRPO_SERVER_URL`. An empty variable counts as not set. On several nodes the variables must reach the Ray
    actors, e.g. by `ray job submit --runtime-env-json`.

    Args:
        server_url (`str`, *optional*, defaults to `"http://127.0.0.1:8001"`):
            URL of the reward server.
        server_key (`SecretStr`, *optional*):
            Bearer key of the reward server, if it requires one. It is never printed.
        timeout (`float`, *optional*, defaults to `180.0`):
            Seconds that one attempt of a request may take.
        max_retries (`int`, *optional*, defaults to `10`):
            Number of further attempts. Ten attempts take about two and a half minutes if no connection can be made.
        max_concurrency (`int`, *optional*, defaults to `8`):
            Number of requests that one process has open at the server; further ones wait. Each vLLM engine is a process. All
            of them together should not open more requests than the server's `max_queue`, 64 by default.
        seed (`int`, *optional*):
            If set, the noise of an image follows from the seed, the prompt and the turn. It is then equal for a whole group,
            so that rewards in the group differ by their texts only. If not set, the server draws the noise.
        num_reflection_rounds (`int`, *optional*, defaults to `1`):
            How often the agent reflects on an image and has it painted anew. With 0 it only paints.
        rectification (`str`, *optional*, defaults to `"minimum"`):
            Reward of an episode whose last image is not better than its first: `"minimum"` gives the lowest possible reward,
            0; `"initial"` the reward of the first image; `"off"` that of the last image. See [`rectified_reward`].
        policy_sees_images (`bool`, *optional*, defaults to `True`):
            Whether the policy is a vision-language model that is shown its images. For a text-only policy set it to false:
            it then gets the reflection request without an image.
        image_placeholder (`str`, *optional*, defaults to `"<|vision_start|><|image_pad|><|vision_end|>"`):
            Text that the policy's processor replaces by one image. The default is that of Qwen's models.
        feedback_template (`str`, *optional*, defaults to ChatML):
            Text between the end of one turn of the policy and the start of its next, in the form of its chat template.
            `{image}` is replaced by the placeholder and `{request}` by the reflection request.
        end_of_turn (`str`, *optional*, defaults to `"<|im_end|>"`):
            Text that ends a turn of the policy. It is inserted before the feedback if the turn was cut off.
        reflection_request (`str`, *optional*):
            Text that asks the policy to reflect; `{prompt}` is replaced by the prompt. There are two defaults: one for a
            policy that sees its image and one for a policy that does not.
        max_new_tokens (`int`, *optional*):
            Maximum number of tokens per turn. A turn never takes more than its equal share of the tokens that are left of
            `--data.max_len`, so that later turns have room.

    Raises:
        `ValueError`: If a value is invalid or a variable's name looks misspelt; the message names the environment variable.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    server_url: ServerURL = Field("http://127.0.0.1:8001", pattern="^https?://")
    server_key: SecretStr | None = None
    timeout: float = Field(180.0, gt=0, allow_inf_nan=False)
    max_retries: int = Field(10, ge=0)
    max_concurrency: int = Field(8, ge=1)
    seed: int | None = None
    num_reflection_rounds: int = Field(1, ge=0)
    rectification: Rectification = "minimum"
    policy_sees_images: bool = True
    image_placeholder: TemplateText = QWEN_IMAGE_PLACEHOLDER
    feedback_template: TemplateText = CHATML_FEEDBACK
    end_of_turn: TemplateText = "<|im_end|>"
    reflection_request: TemplateText | None = None
    max_new_tokens: int | None = Field(None, ge=1)

    def __init__(self, **values: Any) -> None:
        check_spelling()
        try:
            super().__init__(**values)
        except ValidationError as error:
            # Not chained: Pydantic's own message would print a key.
            raise ValueError("; ".join(map(describe_error, error.errors()))) from None

    @model_validator(mode="before")
    @classmethod
    def drop_empty_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out values that are blank, so that fields keep their defaults."""
        return {name: value for name, value in values.items() if not isinstance(value, str) or value.strip()}

    @field_validator("feedback_template")
    @classmethod
    def check_feedback_template(cls, template: str, info: ValidationInfo) -> str:
        """Check that the reflection request, and the image if it is shown, have a place in the feedback."""
        if "{request}" not in template:
            raise ValueError("must contain {request}")
        if info.data.get("policy_sees_images") and template.count("{image}") != 1:
            raise ValueError("must contain {image} once")
        return template

    @property
    def request(self) -> str:
        """The reflection request, with `{prompt}` still in it."""
        if self.reflection_request is not None:
            return self.reflection_request
        return SEEN_REQUEST if self.policy_sees_images else UNSEEN_REQUEST


def variable(name: str) -> str:
    """The environment variable of a field of [`PluginConfig`]."""
    return PREFIX + name.upper()


def check_spelling() -> None:
    """
    Look for environment variables whose names are nearly those of settings.

    Raises:
        `ValueError`: If there is one; the message names the variable that is probably meant.
    """
    known = [variable(name) for name in PluginConfig.model_fields]
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            similar = difflib.get_close_matches(name, known, n=1, cutoff=SIMILARITY)
            if similar:
                raise ValueError(f"there is no environment variable {name}; did you mean {similar[0]}?")


def describe_error(error: Mapping[str, Any]) -> str:
    """One of Pydantic's errors in a sentence that names the environment variable."""
    name = str(error["loc"][0])
    expected = {
        "bool_parsing": "must be true or false",
        "string_pattern_mismatch": "must start with http:// or https://",
    }
    rule = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    value = "" if name == "server_key" else f", but is {error['input']!r}"
    return f"{variable(name)} {expected.get(error['type'], rule)}{value}"
