# SPDX-License-Identifier: Apache-2.0

"""Arguments of the likelihood reward."""

from __future__ import annotations

from dataclasses import dataclass, field

from alphagrpo_ext.ranges import PositiveInt, check_ranges
from reward_models.likelihood.tokens import TOKEN_CHOICES


IMAGE_CONTEXTS = ("vit", "vae_vit")
"""What `likelihood_context` may be."""


@dataclass
class LikelihoodArguments:
    """
    Which model finds a prompt likely, and what of it counts, for the reward 'likelihood'; the help text of a field describes
    it.
    """

    likelihood_scorer: str = field(
        default="policy",
        metadata={
            "help": "Frozen model of the reward 'likelihood': 'policy', the policy as it is before training, or "
            "'transformers', another vision-language model in this process, or a registered one."
        },
    )
    likelihood_model: str | None = field(
        default=None,
        metadata={
            "help": "Name or folder of the frozen model. Needed for 'transformers'. For 'policy', another unified model than "
            "the one that is trained."
        },
    )
    likelihood_context: str = field(
        default="vit",
        metadata={
            "help": "How a unified model sees the image: 'vit', through its vision tower alone, or 'vae_vit', with its latents "
            "as well, as in a refinement. Texts of Cosmos3 never read latents, so both give the same there.",
            "choices": list(IMAGE_CONTEXTS),
        },
    )
    likelihood_tokens: str = field(
        default="all",
        metadata={
            "help": "Tokens of the prompt that count: 'all', or 'content', those of words that say something about the image, "
            "without articles, punctuation and the like.",
            "choices": list(TOKEN_CHOICES),
        },
    )
    likelihood_prefix: str = field(
        default="",
        metadata={"help": "What the answer begins with before the prompt. It does not count."},
    )
    likelihood_instruction: str | None = field(
        default=None,
        metadata={
            "help": "Request between the image and the answer. Default: none for 'policy', 'Describe the image.' for "
            "'transformers'."
        },
    )
    likelihood_batch_size: PositiveInt = field(
        default=16, metadata={"help": "Images per forward of the frozen model."}
    )

    def __post_init__(self) -> None:
        for name, choices in (("likelihood_context", IMAGE_CONTEXTS), ("likelihood_tokens", TOKEN_CHOICES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {getattr(self, name)!r}")
        check_ranges(self)
