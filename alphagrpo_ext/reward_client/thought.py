# SPDX-License-Identifier: Apache-2.0

"""Separation of a completion from its prompt, for policies of OpenRLHF: both arrive in one string with special tokens."""

from __future__ import annotations

import re


SPECIAL_TOKENS = re.compile(
    r"<\|[^<>|\s]+\|?>|<[^<>|\s]+\|>"  # <|im_end|> of Qwen, Llama and Phi; <|turn> and <turn|> of Gemma 4
    r"|<｜[^<>｜\s]+｜>"  # of DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_(?:turn|image)>|\[/?INST\]"
)
"""`<think>` is not among them, because it belongs to the thought."""


def extract_thought(query: str, prompt: str, where: str = "the query") -> str:
    """
    Return what the policy wrote after its prompt, without special tokens.

    White space and special tokens are ignored when the prompt is compared with the beginning of the query: some tokenizers clean
    up spaces or add a token at the start, and a processor repeats the token of an image.

    Args:
        query (`str`): Prompt and completion, decoded from token ids.
        prompt (`str`): The prompt.
        where (`str`, *optional*, defaults to `"the query"`): Name of the query in error messages.

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
                f"{where} does not begin with the prompt, so the completion cannot be separated from it: raise --data.max_len "
                f"if prompts were cut; the query is {query[:200]!r}, the prompt {prompt[:200]!r}"
            )
        place += 1
    return query[place:].strip()
