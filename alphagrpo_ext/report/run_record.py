# SPDX-License-Identifier: Apache-2.0

"""
How a run was started: its command line, its settings, and the versions of what it ran with.

A report is passed around, so it holds no secret: nothing of the environment, and no value whose name or form is that of a
password, key or token.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


HIDDEN = "(hidden)"
_PACKAGES = ("torch", "transformers", "trl", "alphagrpo-ext")
_SECRET_WORD = r"(?:token|(?:api)?key|secret|password|passwd|passphrase|credentials?|authorization)"
_SECRET_NAME = re.compile(rf"(?:.*[_.\- ])?{_SECRET_WORD}", re.IGNORECASE)
_SECRETS_IN_TEXT = (
    # The user, and the password, of an address.
    (re.compile(r"(://)[^/@\s]+(?=@)"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(bearer\s+)[^\s\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # `token=...` of an address, and `"token": "..."` of JSON.
    (
        re.compile(
            rf"((?<![a-z0-9]){_SECRET_WORD}[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&}}\]\"']+)", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
    # As Hugging Face, OpenAI, GitHub and GitLab write theirs.
    (re.compile(r"\b(?:hf|sk|gh[opsu]|github_pat|glpat)[_-][\w-]{12,}"), HIDDEN),
)


@dataclass(frozen=True)
class RunRecord:
    """
    How a run was started.

    Args:
        command (`str`): The script and its arguments.
        versions (`dict[str, str]`): Versions by package, and git revisions of what is in a checkout.
        changed, unchanged (`dict[str, str]`): Settings that differ from their defaults, and the others.
    """

    command: str
    versions: dict[str, str]
    changed: dict[str, str]
    unchanged: dict[str, str]


def describe_run(settings: Mapping[str, Any], changed: Collection[str], argv: Sequence[str]) -> RunRecord:
    """
    Describe the run of this process.

    Args:
        settings (`Mapping[str, Any]`): Settings by name.
        changed (`Collection[str]`): Names of those that differ from their defaults.
        argv (`Sequence[str]`): The script and its arguments, as `sys.argv` has them.
    """
    texts = {name: HIDDEN if value and is_secret(name) else _setting_text(value) for name, value in settings.items()}
    return RunRecord(
        command=shlex.join(without_secrets(argv)),
        versions=_versions(argv),
        changed={name: text for name, text in texts.items() if name in changed},
        unchanged={name: text for name, text in texts.items() if name not in changed},
    )


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: its last word is `token`, `key`, `password` or the like."""
    return _SECRET_NAME.fullmatch(name) is not None


def without_secrets(argv: Sequence[str]) -> list[str]:
    """
    Hide the secrets of a command line: every value of an argument with a secret's name, and what looks like a secret elsewhere.

    Args:
        argv (`Sequence[str]`): The script and its arguments.
    """
    result, hides = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if argument.startswith("-"):
            hides = is_secret(name)
            result.append(f"{name}={HIDDEN}" if hides and equals else _hide_in_text(argument))
        else:
            result.append(HIDDEN if hides else _hide_in_text(argument))
    return result


def git_revision(file: Path) -> str | None:
    """
    The git revision that a file belongs to, with `"-dirty"` if the checkout has changes. `None` if git does not track the file,
    as it does not track a package that is installed inside of a checkout.
    """
    git = ["git", "--no-optional-locks", "-C", str(file.parent)]
    try:
        for command in (
            ["ls-files", "--error-unmatch", file.name],
            ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"],
        ):
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions(argv: Sequence[str]) -> dict[str, str]:
    result = {"Python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    script, package = Path(argv[0] if argv else ""), Path(__file__).parents[1]
    revisions: dict[str, str] = {}
    for name, file in (("alphagrpo_ext", package / "__init__.py"), (script.name, script)):
        revision = git_revision(file) if file.is_file() else None
        if revision and revision not in revisions.values():
            revisions[f"git revision of {name}"] = revision
    return result | revisions


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _setting_text(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, dict | list | tuple):
        return json.dumps(_hide_in_tree(value), default=str)
    return _hide_in_text(str(value))


def _hide_in_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): HIDDEN if item and is_secret(str(key)) else _hide_in_tree(item) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_hide_in_tree(item) for item in value]
    return _hide_in_text(value) if isinstance(value, str) else value


def _hide_in_text(text: str) -> str:
    for pattern, replacement in _SECRETS_IN_TEXT:
        text = pattern.sub(replacement, text)
    return text
