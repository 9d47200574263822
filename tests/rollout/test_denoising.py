# SPDX-License-Identifier: Apache-2.0


from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.solvers import AdamsBashforth2
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.trajectory import DenoisingWindow, TextSegment


GRID = (4, 4)
UNGUIDED = GuidanceConfig(text_scale=1.0)
CONFIG = DenoisingConfig(num_timesteps=11, timestep_shift=1.0, guidance=UNGUIDED)
WINDOW = replace(CONFIG, window_start=4, window_size=2)


@pytest.fixture(scope="module")
def model(make_shapes_bagel: Callable[[], BagelModel]) -> BagelModel:
    return make_shapes_bagel()


@pytest.fixture
def paint(model: BagelModel) -> Callable[..., tuple[torch.Tensor, list[DenoisingWindow | None]]]:
    """Paints two images from the same noise at every call."""

    def paint(config: DenoisingConfig) -> tuple[torch.Tensor, list[DenoisingWindow | None]]:
        num_branches = len(model.guidance(config.guidance).branches)
        contexts = [[TextSegment([20, 21, 22])], [TextSegment([23])]] + [[]] * 2 * (num_branches - 1)
        cache = model.prefill(contexts, group_size=1, capacity=model.image_slots(GRID))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 1 + config.window_size, 16, model.latent_channels, generator=generator)
        return denoise(model, cache, noise[:, 0], GRID, config, noise[:, 1:])

    return paint


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many evaluations each step of the solver `"ab2"` looks at, from now on."""
    lengths = []
    step = AdamsBashforth2.step

    def recording(evaluations, t_next):
        lengths.append(len(evaluations))
        return step(evaluations, t_next)

    monkeypatch.setattr(AdamsBashforth2, "step", staticmethod(recording))
    return lengths


@pytest.fixture
def times(model: BagelModel, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times of all evaluations of the network from now on."""
    seen = []
    predict_velocity = model.predict_velocity

    def recording(cache, latents, grid, timestep):
        seen.append(timestep.item())
        return predict_velocity(cache, latents, grid, timestep)

    monkeypatch.setattr(model, "predict_velocity", recording)
    return seen


def test_euler_along_the_schedule_is_the_default(paint: Callable[..., tuple]) -> None:
    latents, (window, _) = paint(WINDOW)
    same, (same_window, _) = paint(replace(WINDOW, ode_solver="euler", ode_steps=None))
    assert torch.equal(latents, same)
    assert torch.equal(window.latents, same_window.latents)


@pytest.mark.parametrize("solver", ["euler", "ab2", "dpmpp_2m"])
def test_network_is_evaluated_once_a_step(paint: Callable[..., tuple], times: list[float], solver: str) -> None:
    paint(replace(CONFIG, ode_solver=solver, ode_steps=4))
    assert times == pytest.approx([1, 0.75, 0.5, 0.25])
    times.clear()
    _, (window, _) = paint(replace(WINDOW, ode_solver=solver, ode_steps=4))
    # Two steps to the window at .6, two in it, two from .4 on.
    assert times == pytest.approx([1, 0.8, 0.6, 0.5, 0.4, 0.2])
    assert window.start == 4
    assert torch.equal(window.timesteps, flow_timesteps(11)[4:7])


def test_memory_ends_at_the_window(paint: Callable[..., tuple], memory: list[int]) -> None:
    paint(replace(WINDOW, ode_solver="ab2"))
    assert memory == [1, 2, 2, 2, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (GuidanceConfig(text_scale=3.0, interval=(0.45, 1.0)), [1, 2, 2, 2, 2, 2, 1, 2, 2, 2]),
        (GuidanceConfig(text_scale=3.0, interval=(0.45, 0.85)), [1, 2, 1, 2, 2, 2, 1, 2, 2, 2]),
        (GuidanceConfig(text_scale=3.0, interval=(0.0, 1.0)), [1] + [2] * 9),
        (GuidanceConfig(text_scale=0.5, interval=(0.45, 1.0)), [1] + [2] * 9),
    ],
)
def test_memory_ends_where_guidance_changes(
    paint: Callable[..., tuple], memory: list[int], guidance: GuidanceConfig, expected: list[int]
) -> None:
    paint(replace(CONFIG, guidance=guidance, ode_solver="ab2"))
    assert memory == expected


@pytest.mark.parametrize("solver", ["ab2", "dpmpp_2m"])
@pytest.mark.parametrize(
    "guidance", [UNGUIDED, GuidanceConfig(text_scale=3.0, interval=(0.5, 1.0))], ids=["unguided", "guided"]
)
def test_fewer_steps_reach_the_same_image(paint: Callable[..., tuple], solver: str, guidance: GuidanceConfig) -> None:
    """Ten steps of second order are nearer to the path's true end than twenty of Euler's."""
    config = replace(CONFIG, guidance=guidance)

    def image(solver: str, steps: int) -> torch.Tensor:
        return paint(replace(config, ode_solver=solver, ode_steps=steps))[0]

    exact = image("ab2", 80)
    assert (image(solver, 10) - exact).norm() < (image("euler", 20) - exact).norm()


def test_path_without_window_has_as_many_steps() -> None:
    config = replace(WINDOW, ode_solver="ab2", ode_steps=4).without_window()
    assert (config.window_start, config.window_size, config.ode_steps) == (None, 0, 6)
    assert WINDOW.without_window() == CONFIG


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ode_solver": "heun"}, "unknown ODE solver 'heun'.*ab2, dpmpp_2m, euler"),
        ({"ode_steps": 0}, "ode_steps must be at least 1"),
        ({"ode_steps": 1, "window_start": 4, "window_size": 2}, "ode_steps=1: .* 2 stretches outside the window"),
        ({"ode_steps": 3, "window_start": 0, "window_size": 10}, "the window is the whole path"),
    ],
)
def test_impossible_settings_raise(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)
