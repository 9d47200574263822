# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import pytest


NOTEBOOK = Path(__file__).parents[2] / "recipes" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_shows_pictures_and_training_helps(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "IProgress" not in printed
    before, after = (float(re.search(rf"mean reward {when}: +([\d.]+)", printed)[1]) for when in ("before", "after"))
    assert after > before
