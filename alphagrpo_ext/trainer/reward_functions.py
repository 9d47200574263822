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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable


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
    Reward functions in a form that TRL calls and names rightly; most stay as they are.

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
    if is_async_callable(function):
        if get_callable_name(function) == name:
            return function

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

    elif any(is_async_callable(inner) for inner in _calls(function)):

        async def call(*args: Any, **kwargs: Any) -> Any:
            # The decorator returns the coroutine, or runs it to its end, for which it needs a thread without an event loop.
            result = await asyncio.to_thread(function, *args, **kwargs)
            return await result if inspect.isawaitable(result) else result

    elif get_callable_name(function) == name:
        return function
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

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
