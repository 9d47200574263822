# SPDX-License-Identifier: Apache-2.0

"""Registries that find interchangeable parts by name: judges, tasks, image objectives, model families."""

import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar


T = TypeVar("T")


class UnknownNameError(ValueError):
    """Raised when a [`Registry`] has nothing under the name that was asked for."""


class Registry:
    """
    Maps names to objects of one kind. An object is registered by the [`~Registry.register`] decorator, is a built-in
    that is imported on first use, or comes from another package that declares an entry point.

    Args:
        kind (`str`): What the objects are, in the singular. Used in error messages, e.g. `"judge"`.
        group (`str`):
            Entry-point group in which other packages declare objects of this kind, e.g. `"alphagrpo_ext.judges"`.
        builtins (`Mapping[str, str]`, *optional*):
            Names of objects that are imported on first use, as `"module:attribute"` paths.

    Example:

    ```python
    >>> judges = Registry("judge", "alphagrpo_ext.judges")


    >>> @judges.register("constant")
    ... class ConstantJudge: ...


    >>> judges.get("constant") is ConstantJudge
    True
    ```

    A package adds its own without touching this one, in its `pyproject.toml`:

    ```toml
    [project.entry-points."alphagrpo_ext.judges"]
    my_judge = "my_package.judges:MyJudge"
    ```
    """

    def __init__(self, kind: str, group: str, builtins: Mapping[str, str] | None = None):
        self.kind = kind
        self.group = group
        self._builtins = {name: EntryPoint(name, path, group) for name, path in (builtins or {}).items()}
        self._objects: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """
        Decorator that registers a class or function under `name` and returns it unchanged.

        Args:
            name (`str`): The name. It takes precedence over an entry point of the same name.

        Raises:
            `ValueError`: If the name is taken.
        """

        def decorator(obj: T) -> T:
            path = f"{obj.__module__}:{obj.__qualname__}"
            # The module of a built-in may register it as well. That is the same object and not a duplicate.
            builtin = self._builtins.get(name)
            if name in self._objects or (builtin is not None and builtin.value != path):
                raise ValueError(f"{self.kind} '{name}' is already registered; {path} needs another name")
            self._objects[name] = obj
            return obj

        return decorator

    def get(self, name: str) -> Any:
        """
        Return the object called `name`, importing it if need be.

        Raises:
            [`UnknownNameError`]: If there is none; the message lists those that exist.
            `ValueError`: If several packages declare different objects under the name.
            `ImportError`: If the object cannot be imported.
        """
        if name not in self._objects:
            self._objects[name] = self._load(name)
        return self._objects[name]

    def names(self) -> list[str]:
        """Return all names in alphabetical order, without importing anything."""
        return sorted({*self._objects, *self._builtins, *(point.name for point in entry_points(group=self.group))})

    def _load(self, name: str) -> Any:
        # A set, because an editable install can list the same entry point twice.
        points = {*entry_points(group=self.group, name=name)}
        if name in self._builtins:
            points.add(self._builtins[name])
        if not points:
            raise UnknownNameError(self._unknown(name))
        if len(points) > 1:
            paths = ", ".join(sorted(point.value for point in points))
            raise ValueError(f"{self.kind} '{name}' is declared more than once: {paths}")
        (point,) = points
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise ImportError(f"{self.kind} '{name}' ({point.value}) could not be imported: {error}") from error

    def _unknown(self, name: str) -> str:
        names = self.names()
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"unknown {self.kind} '{name}'.{hint} Available: {', '.join(names) or 'none'}"
