# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
from PIL import Image

from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.evaluation.store import evaluate_once, load_evaluations, save_evaluations


def evaluation(reward: float | None, round: int = 0) -> Evaluation:
    image = Image.effect_noise((7, 5), 60).convert("RGB")
    samples = [
        EvaluatedSample(index, seed, "count", "two circles", "a plan", image, reward, reward and reward > 0.5)
        for seed in range(2)
        for index in range(2)
    ]
    return Evaluation(samples, round)


def test_evaluations_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [evaluation(0.1 + 0.2), evaluation(None, round=1)]
    save_evaluations(tmp_path / "kept", "digest", written)
    read = load_evaluations(tmp_path / "kept", "digest")
    for actual, expected in zip(read, written, strict=True):
        assert actual.summary() == expected.summary()
        assert actual.round == expected.round
        for sample, original in zip(actual.samples, expected.samples, strict=True):
            assert sample.image.tobytes() == original.image.tobytes()
            parts = [{k: v for k, v in vars(s).items() if k != "image"} for s in (sample, original)]
            assert parts[0] == parts[1]


def test_kept_evaluation_is_taken_only_by_a_run_that_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = []

    def run(reuse: bool, digest: str) -> float:
        def evaluate() -> list[Evaluation]:
            made.append(len(made) + 1)
            return [evaluation(made[-1] / 10)]

        (result,) = evaluate_once(tmp_path / "kept", digest, reuse, evaluate)
        return result.total.reward

    one, other = settings_digest("model", [1]), settings_digest("model", [2])
    assert run(True, one) == pytest.approx(0.1)
    assert run(True, one) == pytest.approx(0.1)
    assert run(False, one) == pytest.approx(0.2)
    assert run(True, one) == pytest.approx(0.2)
    assert run(True, other) == pytest.approx(0.3)
    assert "made with other settings" in caplog.text
    assert made == [1, 2, 3]


def test_unfinished_folder_is_not_taken(tmp_path: Path) -> None:
    save_evaluations(tmp_path / "kept", "digest", [evaluation(0.5), evaluation(0.5)])
    # A process that is killed while it writes leaves images and no index.
    (tmp_path / "kept" / "evaluations.json").unlink()
    assert load_evaluations(tmp_path / "kept", "digest") is None
    save_evaluations(tmp_path / "kept", "digest", [evaluation(0.5)])
    assert len(load_evaluations(tmp_path / "kept", "digest")) == 1
    assert len(list((tmp_path / "kept").iterdir())) == 1 + 4


def test_an_evaluation_whose_image_is_damaged_or_missing_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_evaluations(tmp_path, "digest", [evaluation(0.5)])
    damaged = tmp_path / "0-1-1.png"
    damaged.write_bytes(damaged.read_bytes()[:80])
    assert load_evaluations(tmp_path, "digest") is None
    assert str(damaged) in caplog.text
    damaged.unlink()
    assert load_evaluations(tmp_path, "digest") is None


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2))
    sample = EvaluatedSample(0, 1, "all", "a", "b", image, 0.5, True, (0.1 + 0.2, None), (1.0,))
    save_evaluations(tmp_path / "kept", "digest", [Evaluation([sample])])
    (read,) = load_evaluations(tmp_path / "kept", "digest")
    assert (read.samples[0].semantic, read.samples[0].quality) == ((0.1 + 0.2, None), (1.0,))
