# SPDX-License-Identifier: Apache-2.0

from collections import Counter

import pytest
import torch

from alphagrpo_ext.flow.timesteps import denoising_path, draw_window, flow_timesteps


class TestFlowTimesteps:
    def test_equals_reference(self, golden):
        schedules = golden.case("schedule")
        assert schedules
        for name, arguments in schedules.items():
            timesteps = flow_timesteps(arguments["num_timesteps"], arguments["shift"])
            assert len(timesteps) == arguments["n_model_steps"] + 1
            golden.check(f"schedule/{name}/timesteps", timesteps[:-1])
            golden.check(f"schedule/{name}/dts", timesteps[:-1] - timesteps[1:])

    # At several of these shifts, rounding alone would not give 1 at the first point.
    @pytest.mark.parametrize("shift", [0.33, 0.5641, 1.0, 1.629, 3.0, 3.3, 6.6])
    @pytest.mark.parametrize("num_timesteps", [2, 3, 16, 50])
    def test_falls_from_exactly_one_to_exactly_zero(self, num_timesteps, shift):
        timesteps = flow_timesteps(num_timesteps, shift)
        assert timesteps.shape == (num_timesteps,)
        assert timesteps.dtype == torch.float32
        assert timesteps[0] == 1
        assert timesteps[-1] == 0
        assert (timesteps.diff() < 0).all()

    def test_shift_of_one_is_linear(self):
        torch.testing.assert_close(flow_timesteps(11), torch.linspace(1, 0, 11))

    def test_shift_moves_steps_towards_noise(self):
        assert (flow_timesteps(11, 3.0)[1:-1] > flow_timesteps(11)[1:-1]).all()

    @pytest.mark.parametrize("arguments, message", [((1,), "num_timesteps .* 1"), ((8, 0.0), "shift .* 0.0")])
    def test_rejects_values_out_of_range(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            flow_timesteps(*arguments)


class TestDrawWindow:
    @pytest.mark.parametrize(
        "window_size, window_range, num_steps", [(10, (0, 11), 15), (5, (0, 15), 39), (3, (2, 40), 9), (4, (1, 5), 5)]
    )
    def test_stays_inside_range_and_path(self, window_size, window_range, num_steps):
        for step in range(200):
            window = draw_window(window_size, window_range, num_steps, seed=0, step=step)
            assert len(window) == window_size
            assert window.step == 1
            assert window_range[0] <= window.start
            assert window.stop <= min(window_range[1], num_steps)

    def test_depends_on_seed_and_step_only(self):
        def draw(seed, step):
            return draw_window(3, (0, 30), 40, seed, step)

        starts = [draw(7, step).start for step in range(100)]
        torch.manual_seed(123)
        assert starts == [draw(7, step).start for step in range(100)]
        assert starts != [draw(8, step).start for step in range(100)]
        # Seed and step are not merely added up.
        assert starts[1:] != [draw(8, step).start for step in range(99)]

    def test_is_uniform_over_all_starts(self):
        num_draws = 4000
        counts = Counter(draw_window(3, (2, 9), 8, seed=1, step=step).start for step in range(num_draws))
        assert sorted(counts) == [2, 3, 4, 5]
        expected = num_draws / len(counts)
        # Five standard deviations of a binomial count.
        margin = 5 * (expected * (1 - 1 / len(counts))) ** 0.5
        assert all(abs(count - expected) < margin for count in counts.values())

    @pytest.mark.parametrize(
        "window_size, window_range, num_steps, message",
        [
            (0, (0, 5), 10, "window_size .* 0"),
            (2, (-1, 5), 10, r"window_range .* \(-1, 5\)"),
            (6, (0, 5), 10, r"window_size 6 .* window_range \(0, 5\)"),
            (1, (5, 2), 10, r"window_size 1 .* window_range \(5, 2\)"),
            (4, (0, 8), 3, "window_size 4 .* num_steps 3"),
            (4, (8, 12), 11, "window_size 4 .* num_steps 11"),
        ],
    )
    def test_rejects_windows_that_do_not_fit(self, window_size, window_range, num_steps, message):
        with pytest.raises(ValueError, match=message):
            draw_window(window_size, window_range, num_steps, seed=0, step=0)


class TestDenoisingPath:
    def test_without_ode_steps_is_the_schedule(self):
        schedule = flow_timesteps(11, 3.0)
        path = denoising_path(schedule, range(2, 5), shift=3.0)
        assert path.timesteps is schedule
        assert path.window == range(2, 5)

    @pytest.mark.parametrize("shift", [0.7, 1.0, 3.0])
    @pytest.mark.parametrize("ode_steps", [2, 3, 5, 7, 12])
    @pytest.mark.parametrize("start", range(8))
    def test_window_keeps_its_times_and_the_number_of_steps_is_fixed(self, start, ode_steps, shift):
        schedule = flow_timesteps(11, shift)
        path = denoising_path(schedule, range(start, start + 3), ode_steps, shift)
        window = path.window
        assert len(window) == 3
        assert torch.equal(path.timesteps[window.start : window.stop + 1], schedule[start : start + 4])
        assert len(path.timesteps) - 1 == 3 + ode_steps
        assert path.timesteps[0] == 1
        assert path.timesteps[-1] == 0
        assert (path.timesteps.diff() < 0).all()

    def test_steps_are_shared_out_in_proportion(self):
        def before(start, ode_steps):
            return denoising_path(flow_timesteps(41), range(start, start + 4), ode_steps).window.start

        # Number of the 36 steps outside a window that are before it: none, 1, 9, 18, 35, all.
        starts = [0, 1, 9, 18, 35, 36]
        assert [before(start, 12) for start in starts] == [0, 1, 3, 6, 11, 12]
        assert [before(start, 2) for start in starts] == [0, 1, 1, 1, 1, 2]
        assert [before(start, 1) for start in (0, 36)] == [0, 1]

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_whole_path_is_a_schedule_of_its_own(self, shift):
        path = denoising_path(flow_timesteps(50, shift), ode_steps=7, shift=shift)
        assert len(path.window) == 0
        torch.testing.assert_close(path.timesteps, flow_timesteps(8, shift))

    def test_same_number_of_steps_is_the_same_path(self):
        schedule = flow_timesteps(16, 3.0)
        torch.testing.assert_close(denoising_path(schedule, range(4, 9), 10, 3.0).timesteps, schedule)

    @pytest.mark.parametrize(
        "window, ode_steps, message",
        [
            (range(0), 0, "0 steps are too few"),
            (range(2, 5), 1, "1 steps are too few for the 2 stretches"),
            (range(10), 3, "3 steps outside the window have no place"),
        ],
    )
    def test_rejects_steps_without_a_place(self, window, ode_steps, message):
        with pytest.raises(ValueError, match=message):
            denoising_path(flow_timesteps(11), window, ode_steps)
