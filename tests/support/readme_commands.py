# SPDX-License-Identifier: Apache-2.0

"""The blocks and commands of the READMEs, as a reader copies them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "alphagrpo_ext/README.md",
    "alphagrpo_ext/models/README.md",
    "alphagrpo_ext/trainer/README.md",
    "reward_models/README.md",
    "recipes/README.md",
)
PROGRAMS = ("accelerate", "bash", "curl", "jupyter", "pip", "pre-commit", "pytest", "python", "vllm")
"""First words of the commands that stand in a text or a table. In a block of its own, everything is a command."""
PLACEHOLDERS = {
    "--config ...": "--config recipes/configs/reasoning_t2i_bagel.yaml",
    "--models ...": "--models bagel-shapes",
    "recipes/NAME.py": "recipes/generate.py",
    "--branches_per_thought B": "--branches_per_thought 2",
}
"""What READMEs leave open, with what stands for it."""
RECORD = """
exec 9>&1
PATH=/nowhere
command_not_found_handle() { printf '%s\\0' "$#" "$@" >&9; }
.() { command_not_found_handle . "$@"; }
"""
"""Makes bash write down the words of every command that it would start, past all redirections."""


def filled_in(code: str) -> str:
    """Code without placeholders."""
    for placeholder, value in PLACEHOLDERS.items():
        code = code.replace(placeholder, value)
    return code


@dataclass(frozen=True)
class Snippet:
    """
    Shell code of a README.

    Args:
        page (`str`): Path of the README in the repository.
        code (`str`): A block, or one command in a text or table.
    """

    page: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}: {' '.join(self.code.split())[:90]}"

    @cached_property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        """The words of every command, as bash reads them: loops are run; quotes, redirections and `NAME=VALUE` are gone."""
        with tempfile.TemporaryDirectory() as folder:
            script = f"{RECORD}\n{filled_in(self.code)}\nwait"
            result = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
        words = iter(result.stdout.split("\0")[:-1])
        return tuple(tuple(next(words) for _ in range(int(count))) for count in words)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(page: str) -> list[str]:
    """What stands between single backticks on a page, each on one line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`((?:[^`\n]|\n(?!\n))+)`", text)]


def is_command(code: str) -> bool:
    """Whether inline code is a command. A name alone is a mention, and so are `accelerate launch` and flags without a script."""
    words = re.sub(r"^(\w+=\S* )+", "", code).split()
    is_launcher = words[0] == "accelerate"
    return words[0] in PROGRAMS and len(words) > 1 and (not is_launcher or ".py" in code)


def snippets(page: str) -> list[Snippet]:
    """All shell code of a page."""
    codes = [*blocks(page, "bash"), *filter(is_command, inline_code(page))]
    return [Snippet(page, code) for code in dict.fromkeys(codes)]


def all_snippets() -> Iterator[Snippet]:
    """All shell code of all pages. What has no command that an earlier one does not have is left out."""
    seen: set[tuple[str, ...]] = set()
    for snippet in (snippet for page in PAGES for snippet in snippets(page)):
        if not seen.issuperset(snippet.commands):
            seen.update(snippet.commands)
            yield snippet
