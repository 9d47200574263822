# SPDX-License-Identifier: Apache-2.0

"""
The page of a report: one HTML file that needs no framework, no server and no network.

The data is JSON in a `<script>` element that the browser does not run. Each image is in an element of its own after the page's
script, so that the browser draws the page before it has read the images.

Prompts and texts are not trusted. The script inserts text as `textContent` only, the JSON is escaped, and a content security
policy (CSP) allows the page's own script and style, by their digests, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from alphagrpo_ext.files import write_text
from alphagrpo_ext.report.charts import make_charts
from alphagrpo_ext.report.records import Comparison, TrajectoryGroup
from alphagrpo_ext.report.run_record import RunRecord
from alphagrpo_ext.report.store import ReportStore, choose_groups, without_nan


PAGE_NAME = "report.html"
MAX_BYTES = 18_000_000
_IMAGE_FIELDS = ("image", "given_image")


def write_report(output_dir: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Path:
    """
    Write `report.html` in the folder of a run from the data in its folder `report`, during the run or after it.

    Args:
        output_dir (`str` or `PathLike`): Folder of the run.
        max_bytes (`int`, *optional*, defaults to `18_000_000`):
            Largest size of the page in bytes. A larger page leaves groups of trajectories out; see [`choose_groups`].

    Returns:
        `Path`: The page.

    Raises:
        `FileNotFoundError`: If the folder `report` does not exist.
    """
    store = ReportStore(output_dir)
    if not store.folder.is_dir():
        raise FileNotFoundError(f"{store.folder} does not exist: train with report=True to have something to report")
    logs, groups, comparison, run = store.logs(), store.groups(), store.comparison(), store.run()
    path = Path(output_dir) / PAGE_NAME
    title = Path(output_dir).resolve().name
    page = render_page(title, logs, groups, comparison, run)
    count = sum(len(group.trajectories) for group in groups)
    while len(page.encode()) > max_bytes and len(groups) > 1:
        count = count * 4 // 5
        groups = choose_groups(groups, count)
        page = render_page(title, logs, groups, comparison, run)
    write_text(path, page)
    return path


def render_page(
    title: str,
    logs: Sequence[dict[str, Any]],
    groups: Sequence[TrajectoryGroup],
    comparison: Comparison | None = None,
    run: RunRecord | None = None,
) -> str:
    """
    Render the page.

    Args:
        title (`str`): Name of the run.
        logs (`Sequence[dict[str, Any]]`): The trainer's `log_history`.
        groups (`Sequence[TrajectoryGroup]`): Trajectories for the gallery.
        comparison ([`Comparison`], *optional*): An evaluation before and after training.
        run ([`RunRecord`], *optional*): How the run was started.

    Returns:
        `str`: The page.
    """
    image_indices: dict[str, int] = {}
    data = {
        "title": title,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": max((entry.get("step", 0) for entry in logs), default=0),
        "charts": [asdict(chart) for chart in make_charts(logs)],
        "groups": [_with_image_indices(asdict(group), image_indices) for group in groups],
        "comparison": comparison and _with_image_indices(asdict(comparison), image_indices),
        "run": run and asdict(run),
    }
    style, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        f"base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": style,
        "data": json_island(data),
        "script": script,
        "images": "\n".join(
            f'<script type="text/plain" id="image-{index}">{url}</script>' for url, index in image_indices.items()
        ),
    }
    # All placeholders are replaced in one pass, so that a placeholder in a prompt stays text.
    return re.sub(r"<!-- (\w+) -->", lambda placeholder: parts[placeholder[1]], _resource("page.html"))


def json_island(data: Any) -> str:
    """
    Encode data as JSON for a `<script>` element. No text in the data can end the element or start another one, because `<`, `>`
    and `&` are escaped. So are the two line separators that JavaScript treats as line breaks and JSON does not.
    """
    text = json.dumps(without_nan(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _with_image_indices(value: Any, indices: dict[str, int]) -> Any:
    """
    Replace each image in nested data by its index, so that the page holds every distinct image once.

    Args:
        value (`Any`): Nested lists and dictionaries.
        indices (`dict[str, int]`): Index of each data URL so far. New images are added.
    """
    if isinstance(value, list):
        return [_with_image_indices(item, indices) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: indices.setdefault(item, len(indices))
        if key in _IMAGE_FIELDS and item is not None
        else _with_image_indices(item, indices)
        for key, item in value.items()
    }


def _resource(name: str) -> str:
    return files("alphagrpo_ext.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
