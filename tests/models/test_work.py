# SPDX-License-Identifier: Apache-2.0

"""How many trained steps go into one forward."""

import pytest

from alphagrpo_ext.models.work import MIN_FORWARD_TOKENS, MIN_FORWARD_WORK, balanced_steps, min_forward_tokens


MANY = MIN_FORWARD_WORK
"""So many weights that tokens decide."""


@pytest.mark.parametrize(
    ("num_steps", "tokens_per_step", "num_weights", "expected"),
    [
        pytest.param(10, MIN_FORWARD_TOKENS, MANY, 1, id="a step is enough"),
        pytest.param(10, 14 * MIN_FORWARD_TOKENS, MANY, 1, id="more than enough"),
        pytest.param(10, MIN_FORWARD_TOKENS // 2, MANY, 2, id="two steps"),
        pytest.param(10, MIN_FORWARD_TOKENS // 8, MANY, 10, id="not enough for two forwards"),
        pytest.param(10, MIN_FORWARD_TOKENS // 4, MANY, 5, id="two equal forwards and not three"),
        pytest.param(3, 64 * 36, 983_040, 3, id="the packaged model in its own configuration"),
        pytest.param(3, 0, MANY, 3, id="no images"),
        pytest.param(3, 36, 0, 3, id="no weights"),
        pytest.param(1, 10**6, MANY, 1, id="one step"),
    ],
)
def test_number_of_steps(num_steps: int, tokens_per_step: int, num_weights: int, expected: int) -> None:
    assert balanced_steps(num_steps, tokens_per_step, num_weights, MIN_FORWARD_TOKENS) == expected


def test_forwards_are_smallest_in_fp32_and_largest_for_all_weights_in_bf16() -> None:
    fp32 = min_forward_tokens(is_fp32=True, trains_adapters=False)
    assert fp32 == min_forward_tokens(is_fp32=True, trains_adapters=True)
    adapters = min_forward_tokens(is_fp32=False, trains_adapters=True)
    assert fp32 < adapters < min_forward_tokens(is_fp32=False, trains_adapters=False) == MIN_FORWARD_TOKENS


@pytest.mark.parametrize("least", [512, 1280, 2048])
def test_steps_together_have_the_least_number_of_tokens(least: int) -> None:
    assert balanced_steps(10, least, MANY, least) == 1
    assert balanced_steps(10, least // 2, MANY, least) == 2


def test_forwards_are_large_and_balanced() -> None:
    for num_steps in range(1, 13):
        for tokens in (1, 100, 500, 1000, 3000):
            for weights in (10**5, 10**6, 10**8):
                steps = balanced_steps(num_steps, tokens, weights, MIN_FORWARD_TOKENS)
                assert 1 <= steps <= num_steps
                is_large = steps * tokens >= MIN_FORWARD_TOKENS and steps * tokens * weights >= MIN_FORWARD_WORK
                assert is_large or steps == num_steps
                # No smaller part would have done with as few forwards.
                num_forwards = -(-num_steps // steps)
                assert steps == 1 or -(-num_steps // (steps - 1)) > num_forwards
