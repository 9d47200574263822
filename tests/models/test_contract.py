# SPDX-License-Identifier: Apache-2.0

"""
Rollout, trainer, objectives and judges use nothing of a model, a processor or a cache that the contract does not name.
"""

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedModel

from alphagrpo_ext.models.contract import Cache, Family, Guidance, UnifiedModel, UnifiedProcessor
from alphagrpo_ext.models.loading import load_model
from reward_models.judges.policy import PolicyJudge
from reward_models.likelihood.policy import PolicyScorer
from reward_models.likelihood.reward import LikelihoodReward
from support.toy_family import make_toy_processor
from support.trainers import make_trainer  # noqa: F401


CALLERS = ("alphagrpo_ext.rollout.", "alphagrpo_ext.objectives.", "alphagrpo_ext.trainer.", "reward_models.")


def members(*interfaces: type) -> set[str]:
    """Names of the methods and attributes of interfaces."""
    return {name for interface in interfaces for name in (*vars(interface), *interface.__annotations__)}


ALLOWED = {
    "model": members(UnifiedModel) | set(dir(PreTrainedModel)) | {"config", "training"},
    "processor": members(UnifiedProcessor),
    "cache": members(Cache),
    "guidance": members(Guidance),
    "family": members(Family),
}


@pytest.fixture
def guard() -> Iterator[Callable[[Any, str], Any]]:
    """
    Makes an object of a kind note every attribute that callers outside the family read. At the end of a test, all of
    them must have been in the contract.
    """
    used: dict[str, set[str]] = {kind: set() for kind in ALLOWED}

    def guard(value: Any, kind: str) -> Any:
        class Guarded(type(value)):
            def __getattribute__(self, name: str) -> Any:
                caller = sys._getframe(1).f_globals.get("__name__", "")
                if caller.startswith(CALLERS) and not name.startswith("__"):
                    used[kind].add(name)
                found = super().__getattribute__(name)
                makes = {"prefill": "cache", "head": "cache", "guidance": "guidance"}.get(name)
                if makes and kind in ("model", "cache") and caller.startswith(CALLERS):
                    return lambda *args, **kwargs: guard(found(*args, **kwargs), makes)
                return guard(found, "family") if (kind, name) == ("model", "family") else found

        Guarded.__name__, Guarded.__qualname__ = type(value).__name__, type(value).__qualname__
        object.__setattr__(value, "__class__", Guarded)
        return value

    yield guard
    for kind, names in used.items():
        assert names, f"nothing of the {kind} was used"
        assert names <= ALLOWED[kind], f"not in the contract of the {kind}: {sorted(names - ALLOWED[kind])}"


@pytest.fixture(params=["bagel", "toy"])
def policy(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and its processor."""
    if request.param == "bagel":
        return load_model("bagel-shapes")
    request.getfixturevalue("installed_toy_family")
    return request.getfixturevalue("toy_model"), make_toy_processor()


@pytest.mark.parametrize("task", ["reasoning_t2i", "self_reflection"])
def test_callers_use_the_contract_alone(
    policy: tuple[Any, Any],
    guard: Callable[[Any, str], Any],
    make_trainer: Callable,  # noqa: F811
    task: str,
) -> None:
    """A rollout, a packed forward, an update with a guidance branch, and the policy as its own judge and reader."""
    model, processor = guard(policy[0], "model"), guard(policy[1], "processor")
    judge = PolicyJudge(model, processor, min_answer_mass=0.0)

    def yes(images: list[Image.Image], **columns: Any) -> list[float]:
        questions = ["is it red?", "is it blue?"]
        return [sum(asyncio.run(judge.answer(image, questions))) for image in images]

    trainer = make_trainer(
        model=model,
        processing_class=processor,
        reward_funcs=[yes, LikelihoodReward(PolicyScorer(model, processor, "vae_vit"))],
        task=task,
        num_reflection_rounds=2,
        cfg_text_scale=2.0,
        generation_learning_rate=1e-4,
    )
    trainer.train()
    assert trainer.recorder.updates
