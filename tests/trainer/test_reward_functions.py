# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForSequenceClassification
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from alphagrpo_ext.trainer.checks.validation import validate_rewards
from alphagrpo_ext.trainer.reward_functions import (
    ARGUMENTS,
    check_parameters,
    judging_starts,
    preflight_rewards,
    reward_attribute,
    reward_hooks,
    reward_name,
    trl_reward_functions,
)
from alphagrpo_ext.trainer.rewards import judges_images
from support.trainers import brightness


class Measure:
    """A reward whose methods and calls are reward functions."""

    text_only = True

    def __init__(self) -> None:
        self.checked: list[Any] = []

    def __call__(self, prompts: list[str], **kwargs: Any) -> list[float]:
        return [0.5] * len(prompts)

    def score(self, prompts: list[str], **kwargs: Any) -> list[float]:
        return self(prompts)

    async def later(self, prompts: list[str], **kwargs: Any) -> list[float]:
        return [0.5] * len(prompts)

    def validate_dataset(self, dataset: Any) -> None:
        self.checked.append(dataset)

    def validate_image_size(self, height: int, width: int) -> None:
        self.checked.append((height, width))

    async def start(self, images: Any, rows: Any) -> None:
        self.checked.append(rows)


class AsyncMeasure(Measure):
    async def __call__(self, prompts: list[str], **kwargs: Any) -> list[float]:
        return [0.5] * len(prompts)


def decorated(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def decorated_async(function: Callable) -> Callable:
    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    return call


def run_to_the_end(function: Callable) -> Callable:
    """A decorator that makes an asynchronous function an ordinary one."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)

        async def wait() -> Any:
            return await result

        return asyncio.run(wait()) if inspect.isawaitable(result) else result

    return call


class Wrapper:
    """A callable object around a function."""

    def __init__(self, function: Callable) -> None:
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


WRAPPERS = {
    "partial": lambda function: functools.partial(function, scale=1.0),
    "decorated": decorated,
    "decorated_async": decorated_async,
    "run_to_the_end": run_to_the_end,
    "object": Wrapper,
    "bound": lambda function: Wrapper(function).__call__,
}
BASES = {
    "object": lambda measure: measure,
    "method": lambda measure: measure.score,
    "call": lambda measure: measure.__call__,
    "coroutine method": lambda measure: measure.later,
}


def rewards_of_trl(functions: list[Any], loop: asyncio.AbstractEventLoop) -> torch.Tensor:
    """What TRL's own code makes of reward functions, of two samples."""
    trainer = SimpleNamespace(
        accelerator=PartialState(),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=0),
        environments=None,
        reward_funcs=functions,
        reward_processing_classes=[None] * len(functions),
        reward_func_names=[get_callable_name(function) for function in functions],
        async_loop=loop,
        _log_completion_extra=None,
        _log_metric=None,
    )
    return GRPOTrainer._calculate_rewards(trainer, [{"prompt": "a"}] * 2, ["a"] * 2, ["b"] * 2, [[1]] * 2)


@pytest.fixture(scope="module")
def loop() -> Any:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@given(
    base=st.sampled_from(sorted(BASES)),
    is_async=st.booleans(),
    wrappers=st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=4),
)
def test_a_wrapped_function_keeps_what_it_says_and_is_called_rightly(
    loop: asyncio.AbstractEventLoop, base: str, is_async: bool, wrappers: list[str]
) -> None:
    if "run_to_the_end" in wrappers:
        # An asynchronous function cannot call one that starts an event loop.
        assume("decorated_async" not in wrappers[wrappers.index("run_to_the_end") :])
    measure = AsyncMeasure() if is_async else Measure()
    if is_async and base == "method":
        base = "call"
    function = BASES[base](measure)
    for wrapper in wrappers:
        function = WRAPPERS[wrapper](function)

    assert reward_attribute(function, "text_only") is True
    assert judges_images([function]).tolist() == [False]
    for name in ("validate_dataset", "validate_image_size", "start"):
        assert reward_hooks([function, measure], name) == [getattr(measure, name)]
    assert judging_starts([function]) == [measure.start]
    (called,) = trl_reward_functions(function)
    expected = {"method": "score", "coroutine method": "later"}.get(base, type(measure).__name__)
    assert reward_name(function) == reward_name(called) == get_callable_name(called) == expected
    assert reward_hooks([called], "start") == [measure.start]
    assert rewards_of_trl([called], loop).tolist() == [[0.5], [0.5]]


def test_reward_models_stay_as_they_are() -> None:
    models = ["a/model", torch.nn.Linear(1, 1)]
    assert trl_reward_functions(models) == models
    assert trl_reward_functions(None) is None


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            0.5,
            TypeError,
            r"'score' returned float \(0.5\), but has to return a list of 2 rewards, a number or None",
        ),
        (torch.tensor(0.5), TypeError, r"'score' returned Tensor \(tensor\(0.5"),
        ("ab", TypeError, r"'score' returned str \(ab\)"),
        ([0.5], ValueError, "'score' returned 1 rewards for 2 samples"),
        ([0.5, "good"], TypeError, r"'score' returned str \(good\) as the reward of sample 1"),
        ([[0.5], 1], TypeError, r"'score' returned list \(\[0.5\]\) as the reward of sample 0"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused_by_the_functions_name(
    loop: asyncio.AbstractEventLoop, is_async: bool, returned: Any, error: type[Exception], message: str
) -> None:
    def score(prompts: list[Any], **kwargs: Any) -> Any:
        return returned

    async def later(prompts: list[Any], **kwargs: Any) -> Any:
        return returned

    later.__name__ = "score"
    with pytest.raises(error, match=message):
        rewards_of_trl(trl_reward_functions(later if is_async else score), loop)


@pytest.mark.parametrize(
    "returned", [(0.5, 1), np.array([0.5, 1]), torch.tensor([0.5, 1]), [torch.tensor(0.5), np.float32(1)], [0.5, True]]
)
def test_every_form_of_numbers_is_a_reward(loop: asyncio.AbstractEventLoop, returned: Any) -> None:
    functions = trl_reward_functions(lambda prompts, **kwargs: returned)
    assert rewards_of_trl(functions, loop).tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images: [], "does not take prompts, completions, .* log_metric, count, .*add \\*\\*kwargs"),
        (lambda images, answer, **kwargs: [], "needs answer, which train_dataset has no column for; .* count"),
        (lambda image, **kwargs: [], "needs image, which"),
        (lambda count, images, scale=1, **kwargs: [], None),
        (lambda *args, **kwargs: [], None),
        (functools.partial(lambda images, scale, **kwargs: [], scale=2), None),
        (max, None),
    ],
)
def test_functions_that_cannot_be_called_are_found_before(function: Any, message: str | None) -> None:
    columns = ["prompt", "count", "image"]
    if message is None:
        check_parameters([function], columns, "train_dataset")
    else:
        with pytest.raises(TypeError, match=message):
            check_parameters([function], columns, "train_dataset")


def test_arguments_of_reward_functions_are_those_that_they_get(make_trainer: Callable[..., Any]) -> None:
    seen = []

    def reward(**kwargs: Any) -> list[float]:
        seen.append(kwargs.keys())
        return [float(len(text)) for text in kwargs["completions"]]

    trainer = make_trainer(reward_funcs=reward)
    trainer.train()
    assert seen[0] == {*ARGUMENTS, *trainer.train_dataset.column_names} - {"prompt"}
    with pytest.raises(TypeError, match=r"the reward function 'narrow' does not take .*: add \*\*kwargs"):

        def narrow(images: list[Any]) -> list[float]:
            return [0.0 for _ in images]

        make_trainer(reward_funcs=narrow)


def test_names_are_distinct_and_that_of_a_partial_counts() -> None:
    named = functools.partial(brightness, scale=2)
    named.__name__ = "bright"
    later = Measure().later
    functions = trl_reward_functions(
        [brightness, functools.partial(brightness, scale=1), named, later, functools.partial(later), decorated(later)]
    )
    names = [get_callable_name(function) for function in functions]
    assert names == ["brightness", "brightness_2", "bright", "later", "later_2", "later_3"]
    assert [is_async_callable(function) for function in functions] == [False] * 3 + [True] * 3


def test_the_outermost_attribute_decides() -> None:
    measure = Measure()
    outer = functools.partial(measure.score)
    outer.text_only = False
    outer.validate_dataset = None
    assert judges_images([outer]).tolist() == [True]
    assert reward_hooks([outer], "validate_dataset") == []
    assert reward_hooks([outer], "validate_image_size") == [measure.validate_image_size]
    # A closure says nothing about what is in it.
    assert reward_attribute(lambda **kwargs: measure(**kwargs), "text_only") is None


def test_an_objects_methods_are_those_of_its_reward_and_are_called_once() -> None:
    measure = Measure()
    validate_rewards([measure, measure.score, functools.partial(measure.later)], {"train_dataset": "rows"}, [(8, 16)])
    assert measure.checked == ["rows", (8, 16)]


def test_a_method_of_a_class_has_no_object_to_check_with() -> None:
    class Rewards:
        text_only = True

        @classmethod
        def score(cls, prompts: list[str], **kwargs: Any) -> list[float]:
            return [0.0] * len(prompts)

        def validate_dataset(self, dataset: Any) -> None:
            raise AssertionError("there is no object")

        @staticmethod
        def validate_image_size(height: int, width: int) -> None:
            raise ValueError(f"{height} x {width}")

    assert reward_attribute(Rewards.score, "text_only") is True
    assert reward_hooks([Rewards.score], "validate_dataset") == []
    with pytest.raises(ValueError, match="8 x 16"):
        validate_rewards([Rewards.score], {"train_dataset": []}, [(8, 16)])


def test_a_start_of_another_form_is_not_called() -> None:
    class Server:
        async def start(self) -> None:
            raise AssertionError("not a start of judging")

        def score(self, prompts: list[str], **kwargs: Any) -> list[float]:
            return [0.0] * len(prompts)

    class Plain(Server):
        def start(self, images: Any, rows: Any) -> None:
            raise AssertionError("not a coroutine")

    assert judging_starts([Server().score, Plain().score]) == []


def test_circles_end() -> None:
    def first() -> None: ...

    def second() -> None: ...

    first.__wrapped__, second.__wrapped__ = second, first
    assert reward_attribute(first, "text_only") is None
    assert len(trl_reward_functions(first)) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_preflight_of_every_form_runs_once_and_stops(is_async: bool) -> None:
    sizes = []

    class Remote(Measure):
        def preflight(self, height: int, width: int) -> None:
            sizes.append((height, width))
            if height > 8:
                raise ConnectionError("no answer from example.org")

    class AsyncRemote(Remote):
        async def preflight(self, height: int, width: int) -> None:
            await asyncio.sleep(0)
            super().preflight(height, width)

    remote = AsyncRemote() if is_async else Remote()
    functions = [functools.partial(remote), decorated(remote.score), brightness]
    preflight_rewards(functions, 8, 16)
    assert sizes == [(8, 16)]
    with pytest.raises(ConnectionError, match="example.org"):
        preflight_rewards(functions, 9, 16)

    async def in_a_notebook() -> None:
        preflight_rewards(functions, 8, 16)

    asyncio.run(in_a_notebook())


def test_trainer_takes_reward_functions_as_people_write_them(make_trainer: Callable[..., Any]) -> None:
    started = []

    class Shining:
        def __init__(self) -> None:
            self.sizes: list[tuple[int, int]] = []

        async def score(self, images: list[Any], **kwargs: Any) -> list[float]:
            await asyncio.sleep(0)
            return brightness(images)

        def validate_image_size(self, height: int, width: int) -> None:
            self.sizes.append((height, width))

        async def start(self, images: list[Any], rows: list[Any]) -> None:
            started.extend(images)

    def length(texts: list[list[str]], scale: float, **kwargs: Any) -> list[float]:
        return [scale * sum(map(len, text)) for text in texts]

    length.text_only = True
    shining = Shining()
    trainer = make_trainer(
        reward_funcs=(
            decorated(shining.score),
            functools.partial(functools.partial(length, scale=1.0), scale=0.01),
            functools.partial(length, scale=0.02),
            Wrapper(brightness),
        )
    )
    trainer.train()
    assert shining.sizes == [(24, 24)]
    assert len(started) == 4
    assert judges_images(trainer.reward_funcs).tolist() == [True, False, False, True]
    metrics = trainer.state.log_history[0]
    names = ("score", "length", "length_2", "brightness")
    means = {name: metrics[f"rewards/{name}/mean"] for name in names}
    assert means["score"] == pytest.approx(means["brightness"])
    assert means["length_2"] == pytest.approx(2 * means["length"])


def test_reward_models_are_given_by_folder(
    make_trainer: Callable[..., Any], shapes_processor: Any, tmp_path: Path
) -> None:
    tokenizer = shapes_processor.tokenizer
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path / "reward-model"
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    given = [str(folder), functools.partial(brightness)]
    trainer = make_trainer(reward_funcs=given)
    trainer.train()
    assert {"rewards/reward-model/mean", "rewards/brightness/mean"} <= trainer.state.log_history[0].keys()
    assert judges_images(trainer.reward_funcs).tolist() == [False, True]
    # The caller's list stays as it was.
    assert given[0] == str(folder)
