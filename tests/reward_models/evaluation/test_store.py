# SPDX-License-Identifier: Apache-2.0


from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alphagrpo_ext.files import FileInUseError
from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.shapes.prompts import prompt_rows
from reward_models.dvreward import DVReward, JudgeFailedError
from reward_models.evaluation.evaluate import evaluate, share_of_work
from reward_models.evaluation.samples import Evaluation
from reward_models.evaluation.store import EvaluationStore
from reward_models.judges import Judge


CONFIG = RolloutConfig(
    height=24,
    width=24,
    max_new_tokens=6,
    denoising=DenoisingConfig(num_timesteps=3, guidance=GuidanceConfig(text_scale=2.0)),
)
ROWS = prompt_rows("evaluation", 7, seed=0)
SEEDS = (0, 1)
NUM_BATCHES = 5


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def generator(make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor) -> RolloutGenerator:
    return RolloutGenerator(make_shapes_bagel(), shapes_processor, TASKS.get("reasoning_t2i")(think=True))


class CountingGenerator:
    """A generator that counts how often it paints, and may be killed at one of them."""

    def __init__(self, generator: RolloutGenerator, killed_at: int | None = None) -> None:
        self.generator, self.killed_at, self.num_calls = generator, killed_at, 0
        self.processor = generator.processor

    def __call__(self, *args: Any) -> Sequence[Any]:
        self.num_calls += 1
        if self.num_calls == self.killed_at:
            raise Killed
        return self.generator(*args)


def run(
    generator: RolloutGenerator,
    folder: Path,
    digest: str = "digest",
    killed_at: int | None = None,
    judge: Judge | str = "shapes",
    initial: Evaluation | None = None,
) -> tuple[Evaluation, int]:
    """The evaluation, and how many batches were painted."""
    counting = CountingGenerator(generator, killed_at)
    with EvaluationStore(folder, digest) as store:
        result = evaluate(counting, ROWS, CONFIG, DVReward(judge), SEEDS, batch_size=3, initial=initial, store=store)
    return result, counting.num_calls


@pytest.fixture(scope="module")
def whole(generator: RolloutGenerator, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return run(generator, folder)[0], folder


def values(evaluation: Evaluation) -> list[tuple[Any, ...]]:
    return [(s.seed, s.index, s.text, s.reward, s.strict_pass, s.semantic, s.quality) for s in evaluation.samples]


def pixels(evaluation: Evaluation) -> list[bytes]:
    return [sample.load_image().tobytes() for sample in evaluation.samples]


def test_store_changes_nothing(generator: RolloutGenerator, whole: tuple[Evaluation, Path]) -> None:
    plain = evaluate(generator, ROWS, CONFIG, DVReward("shapes"), SEEDS, batch_size=3)
    assert values(whole[0]) == values(plain)
    assert pixels(whole[0]) == pixels(plain)
    assert all(sample.image is None for sample in whole[0].samples)
    assert all(len(s.semantic) >= 2 and len(s.quality) == 3 for s in whole[0].samples)


@pytest.mark.invariant
@pytest.mark.parametrize("killed_at", [1, 2, NUM_BATCHES])
def test_killed_evaluation_goes_on_and_equals_a_whole_one(
    generator: RolloutGenerator, whole: tuple[Evaluation, Path], tmp_path: Path, killed_at: int
) -> None:
    with pytest.raises(Killed):
        run(generator, tmp_path, killed_at=killed_at)
    result, num_painted = run(generator, tmp_path)
    assert num_painted == NUM_BATCHES - killed_at + 1
    assert values(result) == values(whole[0])
    assert pixels(result) == pixels(whole[0])
    assert run(generator, tmp_path)[1] == 0


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_torn_line_costs_its_batch_alone(
    generator: RolloutGenerator, whole: tuple[Evaluation, Path], tmp_path: Path, kept: int
) -> None:
    run(generator, tmp_path)
    path = tmp_path / "batches-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: 1 + kept]) + lines[1 + kept][:-20])
    result, num_painted = run(generator, tmp_path)
    assert num_painted == NUM_BATCHES - kept
    assert values(result) == values(whole[0])
    assert path.read_bytes() == b"".join(lines)


def test_head_that_was_torn_is_written_anew(generator: RolloutGenerator, tmp_path: Path) -> None:
    (tmp_path / "batches-0.jsonl").write_bytes(b'{"digest": "dig')
    assert run(generator, tmp_path)[1] == NUM_BATCHES
    assert run(generator, tmp_path)[1] == 0


def test_image_that_was_deleted_is_painted_again(
    generator: RolloutGenerator, whole: tuple[Evaluation, Path], tmp_path: Path
) -> None:
    run(generator, tmp_path)
    (tmp_path / "1-2.png").unlink()
    result, num_painted = run(generator, tmp_path)
    assert num_painted == 1
    assert pixels(result) == pixels(whole[0])


def test_images_that_were_damaged_are_painted_again(
    generator: RolloutGenerator, whole: tuple[Evaluation, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(generator, tmp_path)
    half, empty = tmp_path / "0-0.png", tmp_path / "0-1.png"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    empty.write_bytes(b"")
    result, num_painted = run(generator, tmp_path)
    # Both are of one batch.
    assert num_painted == 1
    assert pixels(result) == pixels(whole[0])
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [str(half), str(empty)]
    assert run(generator, tmp_path)[1] == 0


def test_other_settings_begin_anew(
    generator: RolloutGenerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(generator, tmp_path)
    (tmp_path / "left-over.png").touch()
    assert run(generator, tmp_path, digest="other")[1] == NUM_BATCHES
    assert "made with other settings" in caplog.text
    assert not (tmp_path / "left-over.png").exists()


def test_two_writers_are_refused_and_nothing_is_deleted(generator: RolloutGenerator, tmp_path: Path) -> None:
    run(generator, tmp_path)
    before = (tmp_path / "batches-0.jsonl").read_bytes()
    with EvaluationStore(tmp_path, "digest"), pytest.raises(FileInUseError, match="batches-0.jsonl"):
        run(generator, tmp_path, digest="other")
    assert (tmp_path / "batches-0.jsonl").read_bytes() == before
    assert run(generator, tmp_path)[1] == 0


def test_kept_evaluation_needs_no_model(whole: tuple[Evaluation, Path], tmp_path: Path) -> None:
    work = share_of_work(len(ROWS), SEEDS)
    with EvaluationStore(whole[1], "digest") as store:
        assert values(store.evaluation(work, round=0)) == values(whole[0])
        assert store.evaluation(share_of_work(len(ROWS) + 1, SEEDS), round=0) is None
    with EvaluationStore(tmp_path, "digest") as store:
        assert store.evaluation(work, round=0) is None


def test_refinement_starts_from_kept_images(
    make_shapes_bagel: Callable[[], BagelModel],
    shapes_processor: BagelProcessor,
    generator: RolloutGenerator,
    whole: tuple[Evaluation, Path],
    tmp_path: Path,
) -> None:
    refiner = RolloutGenerator(make_shapes_bagel(), shapes_processor, TASKS.get("self_reflection")(think=True))
    in_memory = evaluate(generator, ROWS, CONFIG, DVReward("shapes"), SEEDS, batch_size=3)
    expected = evaluate(refiner, ROWS, CONFIG, DVReward("shapes"), SEEDS, batch_size=3, initial=in_memory)
    refined, _ = run(refiner, tmp_path, initial=whole[0])
    assert values(refined) == values(expected)
    assert refined.round == 1


class SilentJudge(Judge):
    """Answers nothing, as an endpoint that is down."""

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return [None] * len(questions)


def test_batch_of_a_judge_that_is_down_is_not_kept(
    generator: RolloutGenerator, whole: tuple[Evaluation, Path], tmp_path: Path
) -> None:
    with pytest.raises(JudgeFailedError, match="left 3 of 3 images"):
        run(generator, tmp_path, judge=SilentJudge())
    result, num_painted = run(generator, tmp_path)
    assert num_painted == NUM_BATCHES
    assert values(result) == values(whole[0])


def test_line_that_is_no_batch_is_named(generator: RolloutGenerator, tmp_path: Path) -> None:
    run(generator, tmp_path)
    with (tmp_path / "batches-0.jsonl").open("a") as file:
        file.write('{"start": 0}\n')
    with pytest.raises(ValueError, match=f"line {NUM_BATCHES + 2} is not a batch"):
        run(generator, tmp_path)
