# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from alphagrpo_ext.models.model_card import CardContent, write_model_card
from recipe_tools.run_folder import how_to_go_on
from recipe_tools.training import load_rewards


def test_rewards_are_imported_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards_of_a_test.py").write_text(
        "def brightness(images, **kwargs):\n    return [0.5] * len(images)\n"
        "class Kept:\n    def __call__(self, images, **kwargs):\n        return [1.0] * len(images)\n"
        "NUMBER = 3\n"
    )
    monkeypatch.chdir(tmp_path)

    def load(*names: str) -> list:
        return load_rewards(
            SimpleNamespace(reward="DVReward", script_args=SimpleNamespace(reward=list(names), formats=[]))
        )

    judged, own, kept = load("dvreward", "own_rewards_of_a_test:brightness", "own_rewards_of_a_test.Kept")
    assert judged == "DVReward"
    assert own(images=[1, 2]) == [0.5, 0.5]
    assert kept(images=[1]) == [1.0]
    for name, message in (
        ("brightness", "give 'dvreward', 'likelihood', 'answer', or a function as module:function"),
        ("no_such_module_of_a_test:f", "No module named 'no_such_module_of_a_test'"),
        ("own_rewards_of_a_test:f", "has no attribute 'f'"),
        ("own_rewards_of_a_test:NUMBER", "NUMBER is int, not a function"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name)


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    assert how_to_go_on(tmp_path).startswith("There is no checkpoint yet. With --save_strategy steps")
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert f"{tmp_path / 'checkpoint-10'}: the same command with --resume_from_checkpoint last" in how_to_go_on(
        tmp_path
    )


@pytest.mark.parametrize(
    ("base", "named"), [("bagel-shapes", None), ("ByteDance-Seed/BAGEL-7B-MoT", "ByteDance-Seed/BAGEL-7B-MoT")]
)
def test_model_card_says_how_to_load_and_what_it_scores(tmp_path: Path, base: str, named: str | None) -> None:
    content = CardContent(
        base,
        task="reasoning_t2i",
        prompt='a "red" cat',
        facts={"steps": 3},
        command="accelerate launch x.py",
        table="all 1 -> 2",
        picture="a.png",
    )
    write_model_card(tmp_path, content)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == named
    assert card.data.library_name == "alphagrpo-ext"
    for part in (
        f'alphagrpo_ext.pipeline("{tmp_path}")',
        'pipe("a \\"red\\" cat")',
        "all 1 -> 2",
        "(a.png)",
        "- steps: 3",
    ):
        assert part in card.content
