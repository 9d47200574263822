# SPDX-License-Identifier: Apache-2.0

"""
Settings of the plug-in for OpenRLHF, read from environment variables.

OpenRLHF passes nothing else to the files that it loads, so there is no command line and no configuration file here. The files
are loaded when an actor starts: a wrong setting stops the run there, and not at the first reward. Nothing heavy is imported.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from alphagrpo_ext.reward_client.settings import ClientSettings


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

Rectification = Literal["minimum", "off"]
# Inside a shell's plain quotes, a line break is written as two characters.
TemplateText = Annotated[str, AfterValidator(lambda text: text.replace("\\n", "\n"))]


class PluginConfig(ClientSettings):
    r"""
    Settings of the plug-in. On several nodes the variables must reach the Ray actors, e.g. by
    `ray job submit --runtime-env-json`.

    Args:
        server_url, server_key, timeout, max_retries, max_concurrency, seed:
            As in [`ClientSettings`].
        num_reflection_rounds (`int`, *optional*, defaults to `1`):
            How often the agent reflects on an image and has it painted anew. With 0 it only paints.
        rectification (`str`, *optional*, defaults to `"minimum"`):
            Reward of an episode whose last image is not better than its first: `"minimum"` gives the lowest possible reward,
            0; `"off"` that of the last image. See [`rectified_reward`].
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

    num_reflection_rounds: int = Field(1, ge=0)
    rectification: Rectification = "minimum"
    policy_sees_images: bool = True
    image_placeholder: TemplateText = QWEN_IMAGE_PLACEHOLDER
    feedback_template: TemplateText = CHATML_FEEDBACK
    end_of_turn: TemplateText = "<|im_end|>"
    reflection_request: TemplateText | None = None
    max_new_tokens: int | None = Field(None, ge=1)

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
