# SPDX-License-Identifier: Apache-2.0

"""What a policy of OpenRLHF wrote: its completion, told from the prompt, without special tokens."""

from __future__ import annotations

import re


SPECIAL_TOKENS = re.compile(
    r"<\|[^<>|\s]+\|?>|<[^<>|\s]+\|>"  # <|im_end|> of Qwen, Llama and Phi; <|turn> and <turn|> of Gemma 4
    r"|<｜[^<>｜\s]+｜>"  # of DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_(?:turn|image)>|\[/?INST\]"
)
"""`<think>` is not among them: it is part of what the policy says."""


def thought_of(query: str, prompt: str, where: str = "the query") -> str:
    """
    What the policy wrote after its prompt, without special tokens.

    White space and special tokens may differ between the prompt and the beginning of the query: a tokenizer that cleans up
    spaces, one that adds a token at the start, and a processor that repeats an image's token all do that.

    Args:
        query (`str`): Prompt and completion, decoded from token ids.
        prompt (`str`): The prompt.
        where (`str`, *optional*, defaults to `"the query"`): How error messages call the query.

    Raises:
        `ValueError`: If the query does not begin with the prompt.
    """
    query = SPECIAL_TOKENS.sub("", query)
    place = 0
    for character in SPECIAL_TOKENS.sub("", prompt):
        if character.isspace():
            continue
        while place < len(query) and query[place].isspace():
            place += 1
        if place == len(query) or query[place] != character:
            raise ValueError(
                f"{where} does not begin with the prompt, so what the policy wrote cannot be told: raise --data.max_len "
                f"if prompts were cut; the query is {query[:200]!r}, the prompt {prompt[:200]!r}"
            )
        place += 1
    return query[place:].strip()
