# SPDX-License-Identifier: Apache-2.0

"""The benchmark at a size that takes seconds: it runs, and what it compares computes the same. Nothing here is timed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.layout import BagelSequence
from alphagrpo_ext.trajectory import ImageSegment
from benchmark_parts.arguments import PARTS
from benchmark_parts.flops import counted_flops, denoising_flops, token_flops, training_flops
from benchmark_parts.measurements import brightness
from benchmark_parts.sizes import SIZES
from benchmark_parts.structures import (
    EXACT,
    gradient_of,
    num_tokens,
    pack_unshared,
    relative_difference,
    structures_of,
    token_costs,
)
from benchmark_parts.tables import ResultTable, bars_of, curves
from benchmark_parts.timing import Spread, ratio, time_interleaved
from benchmark_parts.updates.split_update import SplitUpdate
from benchmark_parts.updates.update import Update
from benchmark_parts.whole_step.presets import evaluations_per_image, reflection_trainers
from benchmark_parts.workload import GUIDANCE, build_model, self_reflection_trajectories
from recipe_tools.shapes_pretraining.families.cosmos3 import Cosmos3Shapes


SMALLEST = {name: replace(SIZES[name], num_trajectories=2, num_steps=2) for name in ("bagel-shapes", "cosmos3-shapes")}


def make_update(name: str) -> Update:
    model = build_model(SMALLEST[name])
    return Update(model, self_reflection_trajectories(model, SMALLEST[name]))


@pytest.fixture(scope="module")
def update() -> Update:
    return make_update("bagel-shapes")


@pytest.fixture(scope="module")
def cosmos3_update() -> Update:
    return make_update("cosmos3-shapes")


@pytest.fixture(params=["bagel", "cosmos3"])
def any_update(request: pytest.FixtureRequest, update: Update, cosmos3_update: Update) -> Update:
    return {"bagel": update, "cosmos3": cosmos3_update}[request.param]


def test_cosmos3_shapes_is_the_model_of_pretraining(cosmos3_update: Update) -> None:
    family = Cosmos3Shapes()
    pretrained = family.build_model(family.build_processor())
    assert cosmos3_update.model.config.to_dict() == pretrained.config.to_dict()


def test_trajectories_are_those_of_the_family(any_update: Update) -> None:
    """Given images as the vision tower reads them, and every guidance branch of the family."""
    model = any_update.model
    for trajectory in any_update.trajectories:
        given, painted = (s for s in trajectory.segments if isinstance(s, ImageSegment))
        assert given.pixel_values.shape == (3, 24, 24)
        assert given.grid == painted.grid == model.latent_grid(24, 24)
        assert tuple(painted.guidance_contexts) == model.branches[1:]
    batch = model.pack(any_update.trajectories, GUIDANCE)
    assert len(batch.velocities.step) == 2 * 2 * len(model.branches)


def test_every_trained_weight_takes_part(any_update: Update) -> None:
    _, gradient = gradient_of(any_update, "packed, exact")
    frozen = tuple(f"{name}." for name in any_update.model.family.frozen_modules)
    names = {n for n, p in any_update.model.named_parameters() if p.requires_grad and not n.startswith(frozen)}
    assert names == {name for name, values in gradient.items() if values.any()}


def test_structures_compute_the_same(any_update: Update) -> None:
    results = {name: gradient_of(any_update, name) for name in structures_of(any_update.model)}
    assert len(results) == (6 if isinstance(any_update.model, BagelModel) else 3)
    exact, detached = (results[name] for name in ("packed, exact", "packed, detached"))
    for name, (loss, gradient) in results.items():
        assert loss == pytest.approx(exact[0], rel=1e-5)
        assert relative_difference(gradient, (exact if name in EXACT else detached)[1]) < 1e-5
    assert relative_difference(detached[1], exact[1]) > 1e-3


def test_token_costs_are_those_of_the_packing(update: Update) -> None:
    """The model itself counts as many tokens as were packed, padding aside."""
    costs = token_costs(update)
    contexts, copies = num_tokens(update.model.pack(update.trajectories, GUIDANCE))
    assert costs["packed, exact"] == costs["packed, detached"] == 3 * (contexts + copies)
    assert costs["separate forwards"] == 3 * (2 * contexts + copies)
    assert costs["rebuilt with gradient"] > costs["rebuilt without gradient"] > costs["cached without gradient"]


def test_baselines_share_no_context(update: Update) -> None:
    """Equal contexts of members of a group are as many contexts, or ratios would be against something else."""
    contexts = [trajectory.segments[:-1] for trajectory in update.trajectories]
    contexts += [
        context
        for trajectory in update.trajectories
        for image in trajectory.sampled_images
        for context in image.guidance_contexts.values()
    ]
    expected = 0
    for context in contexts:
        expected += BagelSequence.from_segments(context, update.model.config).num_tokens
    assert num_tokens(pack_unshared(update.model, update.trajectories))[0] == expected
    assert num_tokens(update.model.pack(update.trajectories, GUIDANCE))[0] < expected


def test_order_of_a_micro_batch_does_not_matter(any_update: Update) -> None:
    """Equal contexts are shared wherever they stand, so trajectories of a rollout need no sorting."""
    model = any_update.model
    size = SMALLEST["bagel-shapes" if isinstance(model, BagelModel) else "cosmos3-shapes"]
    others = self_reflection_trajectories(model, size, seed=1)
    first, second = any_update.trajectories
    sorted_batch, mixed = (
        model.pack(batch, GUIDANCE).inputs
        for batch in ([first, second, *others], [first, others[0], second, others[1]])
    )
    shapes = [{name: tensor.shape for name, tensor in inputs.items()} for inputs in (sorted_batch, mixed)]
    assert shapes[0] == shapes[1]


def test_flops_are_those_of_the_layers(update: Update) -> None:
    model, text = update.model, update.model.config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    assert token_flops(model) == 2 * text.num_hidden_layers * (4 * width**2 + 3 * width * inner)
    inputs = model.pack(update.trajectories, GUIDANCE).inputs
    tokens = (inputs["blocks"] >= 0).sum().item()
    # Attention, heads and embeddings of this model add less than half.
    assert 1 < training_flops(model, inputs) / (3 * tokens * token_flops(model)) < 1.5
    one = denoising_flops(model, [10], 36, 1)
    assert denoising_flops(model, [10, 10], 36, 3) == 6 * one
    assert denoising_flops(model, [11], 36, 1) - one == 38 * 4 * width * text.num_hidden_layers


def test_counted_flops_are_those_that_ran(update: Update) -> None:
    """More than those counted from shapes, by padding and by pairs that are masked, but not much more."""
    assert counted_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5
    expected = training_flops(update.model, update.model.pack(update.trajectories, GUIDANCE).inputs)
    assert expected < counted_flops(lambda: gradient_of(update, "packed, exact")) < 1.15 * expected


def test_presets_are_compared_with_the_points_of_the_paper(tmp_path: Path) -> None:
    """A step on one group, in which every second image is a first image, and thoughts can be shared."""
    trainers = reflection_trainers(SMALLEST["bagel-shapes"], brightness, str(tmp_path), bf16=False)
    assert {name: evaluations_per_image(trainer) for name, trainer in trainers.items()} == {"paper": 39, "fast": 17}
    assert {trainer.args.branches_per_thought for trainer in trainers.values()} == {1, 2}
    for trainer in trainers.values():
        assert (
            trainer.args.num_generations == trainer.args.generation_batch_size == 2 * trainer.args.num_initial_images
        )
        assert trainer.args.for_task("reasoning_t2i").guidance.interval == (0.4, 1.0)


def test_ratios_are_taken_within_a_repetition() -> None:
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == Spread(3.0, 2.0, 4.0)
    calls = []
    seconds = time_interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, repetitions=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_pictures_show_medians_and_extremes(tmp_path: Path) -> None:
    rows = [["slow", Spread(3.0, 2.0, 5.0)], ["fast", Spread(1.0, 0.5, 1.5)]]
    bars = ResultTable("Structures: a model, float32", ["structure", "seconds"], rows, draw=bars_of("seconds"))
    assert bars.save_picture(tmp_path) == tmp_path / "structures_a_model_float32.png"
    (axes,) = bars.draw(bars).axes
    assert [bar.get_width() for bar in axes.patches] == [3.0, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["slow", "fast"]
    assert axes.get_xlabel() == "seconds"
    (segments,) = axes.collections
    assert [path.vertices[:, 0].tolist() for path in segments.get_paths()] == [[2.0, 5.0], [0.5, 1.5]]
    assert ResultTable("none", ["a"], [["b"]]).save_picture(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["structures_a_model_float32.png"]


def test_scaling_has_a_panel_a_dimension() -> None:
    rows = [
        ["width", 64, Spread(1, 1, 1), 1.0],
        ["width", 128, Spread(4, 3, 6), 2.0],
        ["steps", 1, Spread(1, 1, 1), 1],
    ]
    table = ResultTable(
        "Scaling", ["dimension", "value", "time to the first", "tokens to the first"], rows, draw=curves
    )
    width, steps = table.draw(table).axes
    assert [axes.get_xlabel() for axes in (width, steps)] == ["width", "steps"]
    times, tokens = (
        line for line in width.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata()) == 2
    )
    assert times.get_xydata().tolist() == [[64, 1], [128, 4]]
    assert tokens.get_xydata().tolist() == [[64, 1], [128, 2]]


def test_attention_is_switched_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import benchmark

    used = []
    run = SplitUpdate.run

    def noted_run(update: SplitUpdate, steps_per_forward: int) -> None:
        used.append(update.model.config.text_config._attn_implementation)
        run(update, steps_per_forward)

    monkeypatch.setitem(SIZES, "smallest", SMALLEST["bagel-shapes"])
    monkeypatch.setattr(SplitUpdate, "run", noted_run)
    (table,) = benchmark.main(
        benchmark.BenchmarkArguments(["attention"], ["smallest"], repetitions=1, output_dir=str(tmp_path))
    )
    # One call before the one that is timed.
    assert used == ["eager", "sdpa"] * 2
    assert [row[0] for row in table.rows] == ["rollout, eager", "rollout, sdpa", "update, eager", "update, sdpa"]
    for rows in (table.rows[:2], table.rows[2:]):
        assert min(ratio.median for _, _, ratio in rows) == 1.0
        assert all(seconds.median > 0 for _, seconds, _ in rows)


@pytest.mark.slow
@pytest.mark.low_priority
@pytest.mark.parametrize(
    ("name", "precision"),
    [("bagel-shapes", "float32"), ("bagel-shapes", "bfloat16"), ("cosmos3-shapes", "float32")],
)
def test_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str) -> None:
    from recipes import benchmark

    monkeypatch.setitem(SIZES, "smallest", SMALLEST[name])
    args = benchmark.BenchmarkArguments(
        sizes=["smallest"], precision=precision, repetitions=1, output_dir=str(tmp_path)
    )
    tables = benchmark.main(args)
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    assert saved["arguments"]["precision"] == precision
    assert [table["title"] for table in saved["tables"]] == [table.title for table in tables]
    assert len(tables) == len(PARTS)
    assert len(list(tmp_path.glob("*.png"))) == len(tables)
    differences = {row[0]: row[-2:] for row in saved["tables"][0]["rows"]}
    tolerance = 1e-5 if args.precision == "float32" else 3e-2
    for loss, gradient in differences.values():
        assert loss < tolerance
        assert gradient < tolerance


@pytest.mark.parametrize("settings", [{"parts": ["speed"]}, {"sizes": ["7b"]}, {"precision": "int4"}])
def test_unknown_names_are_refused(settings: dict) -> None:
    from recipes import benchmark

    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}: unknown"):
        benchmark.BenchmarkArguments(**settings)
