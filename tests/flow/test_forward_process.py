# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from alphagrpo_ext.flow.forward_process import draw_times, noised_latents


def test_noised_latents_are_a_line_from_image_to_noise() -> None:
    clean, noise = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    states = noised_latents(clean, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert states.shape == (3, 3, 4, 5)
    torch.testing.assert_close(states[:, 0], clean[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(states[:, 2], noise[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(states[:, 1], 0.75 * clean[:, 0] + 0.25 * noise[:, 0])


def test_each_stratum_has_one_time() -> None:
    for step in range(50):
        times = draw_times(4, (0.2, 1.0), 1.0, seed=0, step=step)
        assert ((1.0 - times) / 0.2).long().tolist() == [0, 1, 2, 3]
    shifted = draw_times(4, (0.2, 1.0), 3.0, seed=0, step=49)
    torch.testing.assert_close(shifted, 3 * times / (1 + 2 * times))


def test_draw_depends_on_seed_and_step_alone() -> None:
    draws = [tuple(draw_times(3, (0.0, 1.0), 2.0, seed, step).tolist()) for seed in range(3) for step in range(3)]
    assert len(set(draws)) == 9
    assert draws == [
        tuple(draw_times(3, (0.0, 1.0), 2.0, seed, step).tolist()) for seed in range(3) for step in range(3)
    ]
    assert all(1 >= a > b > c > 0 for a, b, c in draws)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (0.0, 1.0), 1.0), "num_times must be at least 1, but is 0"),
        ((3, (0.5, 0.5), 1.0), r"low < high <= 1, but is \(0.5, 0.5\)"),
        ((3, (-0.1, 1.0), 1.0), r"but is \(-0.1, 1.0\)"),
        ((3, (0.0, 1.1), 1.0), r"but is \(0.0, 1.1\)"),
        ((3, (0.0, 1.0), 0.0), "shift must be positive, but is 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_times(*arguments, seed=0, step=0)
