# SPDX-License-Identifier: Apache-2.0

import pytest
from transformers import PreTrainedTokenizerFast

from reward_models.likelihood.tokens import counted_tokens
from support.tiny_llava import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("There is a red circle , and no dog left of the 2 trees.", "red circle no dog left 2 trees"),
        ("A man's hat", "man's hat"),
        ("un château de_neige", "un château de neige"),
    ],
)
def test_content_is_what_says_something_about_the_image(
    tokenizer: PreTrainedTokenizerFast, prompt: str, words: str
) -> None:
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert len(ids) > len(words.split())
    counted = counted_tokens(tokenizer, prompt, ids, "content")
    kept = tokenizer.decode([token_id for token_id, counts in zip(ids, counted, strict=True) if counts])
    assert kept.split() == words.split() or kept.replace(" ", "") == words.replace(" ", "")
    assert counted_tokens(tokenizer, prompt, ids) == [True] * len(ids)


def test_a_prompt_without_content_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("of the, and", add_special_tokens=False)
    with pytest.raises(ValueError, match="'of the, and' has no tokens that count with likelihood_tokens='content'"):
        counted_tokens(tokenizer, "of the, and", ids, "content")
    with pytest.raises(ValueError, match="that encodes texts as its tokenizer does"):
        counted_tokens(tokenizer, "a cat", ids, "content")
