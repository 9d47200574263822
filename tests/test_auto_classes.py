# SPDX-License-Identifier: Apache-2.0

"""Each test has an interpreter of its own, because an Auto class that was used once stays as it is."""

import subprocess
import sys

import pytest

from alphagrpo_ext.models.loading import PACKAGED_CHECKPOINTS


FOLDER = str(PACKAGED_CHECKPOINTS["bagel-shapes"])


def run(*lines: str) -> str:
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "[name for name in ('torch', 'transformers', 'trl', 'diffusers', 'numpy') if name in sys.modules]"
    assert run("import sys, alphagrpo_ext", f"print({heavy})") == "[]\n"


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(
            ("import alphagrpo_ext", "from transformers import AutoModel, AutoProcessor"),
            id="package first",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("from transformers import AutoModel, AutoProcessor", "import alphagrpo_ext"), id="transformers first"
        ),
    ],
)
def test_auto_classes_load_a_checkpoint(imports: tuple[str, str]) -> None:
    names = run(
        *imports,
        f"print(type(AutoProcessor.from_pretrained({FOLDER!r})).__name__)",
        f"print(type(AutoModel.from_pretrained({FOLDER!r})).__name__)",
    )
    assert names.split() == ["BagelProcessor", "BagelModel"]
