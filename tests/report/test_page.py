# SPDX-License-Identifier: Apache-2.0

import base64
import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from alphagrpo_ext.report import ReportStore, TrajectoryGroup, write_report
from alphagrpo_ext.report.page import json_island, render_page
from alphagrpo_ext.report.thumbnails import data_url


MakeGroup = Callable[..., TrajectoryGroup]
ATTACK = "</script><img src=x onerror=\"document.title='attacked'\"><!-- images -->"


def data_of(page: str) -> dict:
    (island,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(island)


@given(st.text() | st.sampled_from([ATTACK, "<!--<script>", "\u2028\u2029"]))
def test_no_text_leaves_its_element(text: str) -> None:
    island = json_island({"text": text})
    assert not set("<>&\u2028\u2029") & set(island)
    assert json.loads(island) == {"text": text}


def test_numbers_that_json_lacks_are_none() -> None:
    assert json_island([float("nan"), float("inf"), 1.5]) == "[null,null,1.5]"


def test_page_holds_each_image_once(make_group: MakeGroup) -> None:
    page = render_page("run", [{"step": 1, "reward": 0.5}], [make_group(size=4)])
    # Four refined images, and the one that all of them were given.
    assert page.count("data:image/png;base64,") == 5
    (group,) = data_of(page)["groups"]
    assert len({trajectory["given_image"] for trajectory in group["trajectories"]}) == 1


def test_page_refers_to_nothing_outside(make_group: MakeGroup) -> None:
    page = render_page("run", [], [make_group()])
    without_data = re.sub(r'<script type="(application/json|text/plain)".*?</script>', "", page, flags=re.DOTALL)
    assert re.findall(r"https?://[^\"'\s]+", without_data) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in page


def test_markup_and_marks_of_the_template_stay_text(make_group: MakeGroup) -> None:
    page = render_page(ATTACK, [], [make_group(prompt=ATTACK)])
    assert "<img src=x" not in page
    assert data_of(page)["groups"][0]["prompt"] == ATTACK
    assert page.count('id="image-0"') == 1


def test_page_stays_within_its_limit(tmp_path: Path, make_group: MakeGroup) -> None:
    store = ReportStore(tmp_path)
    store.restart(0)
    store.add_groups([make_group(step, image_size=128) for step in range(1, 9)])
    whole = write_report(tmp_path).stat().st_size
    limit = whole // 2
    page = write_report(tmp_path, max_bytes=limit)
    assert page.stat().st_size <= limit
    steps = [group["step"] for group in data_of(page.read_text())["groups"]]
    assert steps[0] == 1 and steps[-1] == 8
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_to_report_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="report=True"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("size", "expected", "kind"),
    [((24, 24), (24, 24), "png"), ((256, 128), (256, 128), "webp"), ((1024, 512), (256, 128), "webp")],
)
def test_images_are_scaled_down_to_a_limit(size: tuple[int, int], expected: tuple[int, int], kind: str) -> None:
    url = data_url(Image.new("RGB", size, "red"), max_size=256)
    header, _, content = url.partition(",")
    assert header == f"data:image/{kind};base64"
    with Image.open(BytesIO(base64.b64decode(content))) as image:
        assert image.size == expected
        red, green, blue = image.convert("RGB").getpixel((0, 0))
    assert red > 250 and max(green, blue) < 5
