# SPDX-License-Identifier: Apache-2.0

"""
Reward functions as people write them: functions, partial ones, methods, callable objects, and decorated ones of any of these.

What a reward function says about itself (`text_only`, `__name__`) and what it offers (`validate_dataset`, `validate_image_size`,
`preflight`, `start`) are attributes. Where a function wraps another one, they may be attributes of the inner one, so all
attributes are looked up here.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from trl.trainer.utils import is_async_callable


ARGUMENTS = (
    *("prompts", "completions", "completion_ids", "images", "texts", "trajectory", "task"),
    *("trainer_state", "log_extra", "log_metric"),
)
"""Names of what every reward function gets beside the columns of the dataset."""


class PreflightError(RuntimeError):
    """Raised in all processes but the main one when the main process finds that a reward function cannot give rewards."""


def reward_attribute(function: Any, name: str, default: Any = None) -> Any:
    """
    Look up an attribute of a reward function and of what it wraps.

    The outermost owner decides. `functools.partial` leads to its function, a function decorated with `functools.wraps` to the
    decorated one, and a bound method first to its function and then to its object, whose other methods belong to the reward. A
    plain closure around a function hides its attributes.

    Args:
        function: The reward function.
        name (`str`): Name of the attribute.
        default (*optional*): Value if no owner has the attribute.
    """
    for owner in _owners(function, set()):
        # A class that a class method is bound to has the methods of its objects as plain functions, which need an object.
        if isinstance(owner, type) and inspect.isfunction(inspect.getattr_static(owner, name, None)):
            continue
        value = getattr(owner, name, _MISSING)
        if value is not _MISSING:
            return value
    return default


def reward_hooks(functions: Sequence[Any], name: str) -> list[Callable]:
    """The distinct methods `name` of reward functions. Several functions of one object share its method, which is called once."""
    hooks: list[Callable] = []
    for function in functions:
        hook = reward_attribute(function, name)
        if hook is not None and hook not in hooks:
            hooks.append(hook)
    return hooks


def judging_starts(functions: Sequence[Any]) -> list[Callable]:
    """The distinct coroutine methods `start(images, rows)`. An object's method `start` of another form has another purpose."""
    return [
        start
        for start in reward_hooks(functions, "start")
        if inspect.iscoroutinefunction(start) and _takes_two(inspect.signature(start))
    ]


def reward_name(function: Any) -> str:
    """Name of a reward function in metrics and messages: its `__name__`, or the name of the innermost object's class."""
    calls = list(_calls(function))
    wrappers = [call for call in calls if hasattr(call, "__wrapped__")]
    # What a decorator calls its own function remains where the decorated object has no name.
    decorator_names = {call.__code__.co_name for call in wrappers if hasattr(call, "__code__")}
    for call in calls:
        name = getattr(call, "__name__", None)
        is_decorators = name in decorator_names and call in wrappers
        if isinstance(name, str) and name != "__call__" and not is_decorators:
            return name
    return type(calls[-1]).__name__


def trl_reward_functions(functions: Any) -> Any:
    """
    Reward functions in a form that TRL calls and names rightly, and whose results are checked (see [`checked_rewards`]).

    TRL recognises an asynchronous function behind `functools.partial` and in `__call__`, but not behind a decorator. It takes its
    names from the outermost `__name__`, and averages the metrics of functions with the same name. Here the second function of a
    name gets the suffix `_2`.

    Args:
        functions (`Callable`, `str`, or a sequence of them, *optional*): As given to the trainer.

    Returns:
        `list` or `None`: One entry per function. Reward models (modules and names) stay as they are.
    """
    if functions is None:
        return None
    counts: Counter[str] = Counter()
    result = []
    for function in listed(functions):
        if isinstance(function, str | nn.Module):
            result.append(function)
            continue
        name = reward_name(function)
        counts[name] += 1
        name = f"{name}_{counts[name]}" if counts[name] > 1 else name
        result.append(_adapted(function, name))
    return result


def check_parameters(functions: Sequence[Any], columns: Iterable[str], label: str) -> None:
    """
    Check that reward functions can be called with what they get: the columns of a dataset, and [`ARGUMENTS`].

    Args:
        functions (`Sequence`): Reward functions. Of reward models, and of what has no signature, nothing is known.
        columns (`Iterable[str]`): Columns of the dataset.
        label (`str`): Name of the dataset for messages.

    Raises:
        `TypeError`: If a function does not take what it gets, or needs what it does not get. The message names it.
    """
    given = [*ARGUMENTS, *(name for name in columns if name not in (*ARGUMENTS, "prompt", "completion", "image"))]
    for function in functions:
        if isinstance(function, str | nn.Module):
            continue
        try:
            # What a decorator passes on is its own business.
            parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        except (TypeError, ValueError):
            continue
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters) and (others := [n for n in given if n not in names]):
            raise TypeError(
                f"the reward function '{reward_name(function)}' does not take {', '.join(others)}, which every reward function "
                f"gets: add **kwargs to its parameters"
            )
        needed = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if lacking := [name for name in needed if name not in given]:
            raise TypeError(
                f"the reward function '{reward_name(function)}' needs {', '.join(lacking)}, which {label} has no column for; a "
                f"function gets {', '.join(given)}"
            )


def listed(functions: Any) -> list[Any]:
    """Reward functions as a list, from one of them or a list or tuple."""
    return list(functions) if isinstance(functions, list | tuple) else [functions]


def preflight_rewards(functions: Sequence[Any], height: int, width: int) -> None:
    """
    Let reward functions check that they can give rewards, before anything is painted.

    The method `preflight(height, width)` of each function that has one is called in the main process, and awaited if it is a
    coroutine. It raises an error that says what to change.

    Args:
        functions (`Sequence`): Reward functions.
        height, width (`int`): Size of sampled images in pixels.

    Raises:
        Exception: The error of the first function that fails, in the main process; [`PreflightError`] with its message in the
            others.
    """
    error: Exception | None = None
    if PartialState().is_main_process:
        try:
            for preflight in reward_hooks(functions, "preflight"):
                _finished(preflight(height, width))
        except Exception as raised:
            error = raised
    # The other processes would otherwise wait for the main one until a time-out.
    messages = broadcast_object_list([None if error is None else str(error)])
    if error is not None:
        raise error
    if messages[0] is not None:
        raise PreflightError(messages[0])


def checked_rewards(name: str, rewards: Any, num_samples: int | None) -> list[Any]:
    """
    The rewards that a function returned, as a list.

    Args:
        name (`str`): Name of the function.
        rewards: What it returned.
        num_samples (`int`, *optional*): Number of samples, if it is known.

    Raises:
        `TypeError`: If it is no list of numbers and `None`.
        `ValueError`: If their number is not that of the samples.
    """
    is_list = isinstance(rewards, Iterable) and not isinstance(rewards, str | Mapping)
    if not is_list or getattr(rewards, "ndim", 1) != 1:
        shown = f"{type(rewards).__name__} ({str(rewards)[:60]})"
        count = "" if num_samples is None else f"{num_samples} "
        raise TypeError(
            f"the reward function '{name}' returned {shown}, but has to return a list of {count}rewards, a number or None for each "
            f"sample"
        )
    rewards = list(rewards)
    if num_samples is not None and len(rewards) != num_samples:
        raise ValueError(
            f"the reward function '{name}' returned {len(rewards)} rewards for {num_samples} samples: return one for each"
        )
    for index, reward in enumerate(rewards):
        if reward is not None and not _is_number(reward):
            raise TypeError(
                f"the reward function '{name}' returned {type(reward).__name__} ({str(reward)[:60]}) as the reward of sample "
                f"{index}, but a reward is a number or None"
            )
    return rewards


def _is_number(value: Any) -> bool:
    if isinstance(value, Real):
        return True
    # Scalars of NumPy and tensors of one element.
    try:
        return not isinstance(value, str | bytes) and float(value) is not None
    except (TypeError, ValueError, RuntimeError):
        return False


_MISSING = object()


def _takes_two(signature: inspect.Signature) -> bool:
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def _calls(function: Any) -> Iterator[Any]:
    """Yield a function and what it calls, from the outside: through `partial`, `functools.wraps` and `__call__`."""
    seen: set[int] = set()
    while id(function) not in seen:
        seen.add(id(function))
        yield function
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif inspect.ismethod(function) and function.__name__ == "__call__":
            function = function.__self__
        else:
            return


def _owners(function: Any, seen: set[int]) -> Iterator[Any]:
    """Yield what may have a function's attributes, from the outside. `seen` ends circles."""
    chain = [call for call in _calls(function) if id(call) not in seen]
    seen.update(map(id, chain))
    yield from chain
    for call in chain:
        if inspect.ismethod(call) and id(call.__self__) not in seen:
            yield from _owners(call.__self__, seen)


def _adapted(function: Any, name: str) -> Callable:
    """A function of this name that calls another one and checks what it returns."""

    def checked(rewards: Any, arguments: Mapping[str, Any]) -> list[Any]:
        return checked_rewards(name, rewards, len(arguments["prompts"]) if "prompts" in arguments else None)

    if is_async_callable(function):

        async def call(*args: Any, **kwargs: Any) -> Any:
            return checked(await function(*args, **kwargs), kwargs)

    elif any(is_async_callable(inner) for inner in _calls(function)):

        async def call(*args: Any, **kwargs: Any) -> Any:
            # The decorator returns the coroutine, or runs it to its end, for which it needs a thread without an event loop.
            result = await asyncio.to_thread(function, *args, **kwargs)
            return checked(await result if inspect.isawaitable(result) else result, kwargs)

    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return checked(function(*args, **kwargs), kwargs)

    call.__name__, call.__wrapped__ = name, function
    return call


def _finished(result: Any) -> Any:
    """Run an awaitable to its end. In a thread, because an event loop may run in this one, as in a notebook."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, wait()).result()
