# SPDX-License-Identifier: Apache-2.0

"""The page in a real browser, from a file, without a network."""

import base64
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alphagrpo_ext.report import (
    Comparison,
    ImagePair,
    ReportStore,
    ReportTurn,
    RunRecord,
    ScoreTable,
    TrajectoryGroup,
    write_report,
)
from alphagrpo_ext.report.thumbnails import data_url
from report.conftest import photograph


webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None,
        reason="no chromium and chromedriver: apt-get install chromium chromium-driver",
    ),
]

ATTACK = "</script><img src=x onerror=\"document.title='attacked'\"><b>bold</b>"
NUM_LARGE = 500
SCORES = ScoreTable(
    [
        "Category",
        "Samples (* few)",
        "Reward before",
        "after",
        "change",
        "p",
        "Strict pass before",
        "after",
        "change",
        "p",
    ],
    [
        [
            name,
            "14*",
            "0.652",
            "0.851",
            "+0.199 [+0.100, +0.300]",
            "0.0312",
            "10.0%",
            "50.0%",
            "+40.0 [+9.9, +70.0]",
            "0.0010",
        ]
        for name in ("color attribution", "all")
    ],
)
# Of the accessible name, as far as these elements go: https://www.w3.org/TR/accname-1.2/.
UNNAMED_CONTROLS = """
const name = (node) => (node.getAttribute("aria-label") || (node.labels && [...node.labels].map((l) => l.textContent).join(" "))
  || node.textContent || "").trim();
return [...document.querySelectorAll("a, button, input, select, summary, [role=slider], [role=region], [tabindex]")]
  .filter((node) => !name(node)).map((node) => node.outerHTML);
"""
# WCAG 2.1, 1.4.3: 4.5 to 1 for text of this size. Of each text that is seen, with the nearest background that is painted.
LOW_CONTRAST = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => channels(color).slice(0, 3).map((value) => {
  const share = value / 255;
  return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
}).reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
const background = (node) => {
  for (; node; node = node.parentElement) {
    const color = getComputedStyle(node).backgroundColor, parts = channels(color);
    if (parts.length < 4 || parts[3] === 1) return color;
  }
  return "rgb(255, 255, 255)";
};
const low = new Set();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !node.checkVisibility() || ["SCRIPT", "STYLE"].includes(node.tagName)) continue;
  const style = getComputedStyle(node);
  const [dark, light] = [luminance(node instanceof SVGElement ? style.fill : style.color), luminance(background(node))].sort((a, b) => a - b);
  const ratio = (light + 0.05) / (dark + 0.05);
  if (ratio < 4.5) low.add(`${node.tagName}.${node.getAttribute("class")}: ${ratio.toFixed(2)}`);
}
return [...low];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def logs() -> list[dict[str, float]]:
    metrics = (
        "reward",
        "holdout/reward",
        "dvreward/semantic/Count",
        "image/ratio_mean",
        "timing/rollout",
        "loss",
        "mine/x",
    )
    return [{"step": step, **dict.fromkeys(metrics, 0.5 + step / 100)} for step in range(1, 31)]


@pytest.fixture
def page(tmp_path: Path, make_group: Callable[..., TrajectoryGroup], logs: list[dict[str, float]]) -> Path:
    """Twelve groups of four, of which the last member got worse and fails a question about a count."""
    store = ReportStore(tmp_path)
    store.restart(0)
    groups = [make_group(step, prompt=f"prompt {step}", rewards=[0.9, 0.8, 0.7, 0.3]) for step in range(1, 11)]
    groups.append(make_group(11, prompt=ATTACK, rewards=[0.9, 0.8, 0.7, 0.6]))
    groups.append(make_group(12, prompt="prompt 12", rewards=[0.6, 0.6, 0.6, 0.6], earlier_step=3, earlier_reward=0.9))
    store.add_groups(groups)
    store.save_logs(logs)
    images = [data_url(photograph(seed, 24)) for seed in range(4)]
    store.save_comparison(
        Comparison(
            SCORES,
            [
                ImagePair(ATTACK, "shapes", ReportTurn("", images[0]), ReportTurn(ATTACK, images[1]), 0.2, 0.8),
                ImagePair("a circle", "count", ReportTurn("", images[2]), ReportTurn("", images[3]), 0.8, 0.2),
            ],
        )
    )
    store.save_run(
        RunRecord("train.py --task x", {"torch": "2.13"}, {"max_steps": "30"}, {"seed": "42", "adam": ATTACK})
    )
    return write_report(tmp_path)


def open_page(browser: Any, page: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("browser")
    browser.get(page.as_uri())


def change(browser: Any, control: str, value: str | bool) -> str:
    """Set a control as a user does; returns what the gallery then says that it shows."""
    browser.execute_script(
        """
        const control = document.getElementById(arguments[0]);
        if (control.type === "checkbox") control.checked = arguments[1]; else control.value = arguments[1];
        control.dispatchEvent(new Event("input", { bubbles: true }));
        """,
        control,
        value,
    )
    return browser.execute_script("return document.getElementById('count').textContent")


def test_loads_from_a_file_without_an_error(browser: Any, page: Path) -> None:
    open_page(browser, page)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelectorAll('.chart').length") == 4
    assert browser.execute_script("return document.querySelectorAll('.group').length") == 8
    # Nothing was fetched but the file.
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name.slice(0, 5))")
    assert set(fetched) <= {"data:"}


def test_filters(browser: Any, page: Path) -> None:
    open_page(browser, page)
    assert change(browser, "order", "oldest") == "48 trajectories in 12 groups"
    # Ten last members that are below their initial image, and the group that is below an earlier step.
    assert change(browser, "worse", True) == "14 trajectories in 11 groups"
    assert change(browser, "worse", False) == "48 trajectories in 12 groups"
    assert change(browser, "tag", "Count") == "48 trajectories in 12 groups"
    assert change(browser, "answer", "no") == "12 trajectories in 12 groups"
    assert change(browser, "tag", "Spatial") == "0 trajectories in 0 groups"
    browser.execute_script("document.querySelector('#filters [type=reset]').click()")
    wait = WebDriverWait(browser, 60)
    count = "return document.getElementById('count').textContent"
    assert wait.until(lambda driver: driver.execute_script(count) == "48 trajectories in 12 groups")
    assert change(browser, "words", "DRAFT 2") == "12 trajectories in 12 groups"
    assert change(browser, "step", "3") == "1 trajectory in 1 group"
    change(browser, "step", "")
    change(browser, "words", "")
    browser.execute_script("document.getElementById('more').click()")
    assert browser.execute_script("return document.querySelectorAll('.group').length") == 12
    assert not browser.execute_script("return document.getElementById('more').checkVisibility()")


def test_members_stand_by_advantage(browser: Any, page: Path) -> None:
    open_page(browser, page)
    text = browser.execute_script(
        "return [...document.querySelectorAll('.group:first-child .advantage b')].map((b) => b.textContent)"
    )
    assert text == ["+1.00", "+0.00", "−1.00", "−2.00"]


def test_slider_changes_what_is_seen_by_keyboard_and_pointer(browser: Any, page: Path) -> None:
    open_page(browser, page)
    slider = browser.find_element("css selector", "#groups input[type=range]")
    frame = browser.find_element("css selector", "#groups .card .picture")
    browser.execute_script("arguments[0].scrollIntoView({ behavior: 'instant', block: 'center' })", frame)
    loaded = "return [...arguments[0].querySelectorAll('img')].every((image) => image.naturalWidth)"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(loaded, frame))
    assert slider.get_attribute("aria-valuetext") == "50% initial image"
    between = frame.screenshot_as_png
    slider.send_keys(Keys.HOME)
    refined = frame.screenshot_as_png
    assert slider.get_attribute("aria-valuetext") == "0% initial image"
    slider.send_keys(Keys.END)
    initial = frame.screenshot_as_png
    assert slider.get_attribute("aria-valuetext") == "100% initial image"
    frame.click()
    assert slider.get_attribute("aria-valuetext") == "0% initial image"
    # Each half of the picture in the middle is that of the image that is named below it.
    columns = [np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int) for png in (initial, between, refined)]
    quarter = columns[0].shape[1] // 4
    left, right = (slice(None), slice(8, quarter)), (slice(None), slice(-quarter, -8))
    assert (columns[0][left] == columns[1][left]).all() and (columns[1][right] == columns[2][right]).all()
    assert (columns[1][left] != columns[2][left]).any() and (columns[0][right] != columns[1][right]).any()


def test_curves_are_read_by_keyboard(browser: Any, page: Path) -> None:
    open_page(browser, page)
    chart = browser.find_element("css selector", ".chart svg")
    assert chart.get_attribute("aria-label") == "Reward, by step"
    assert chart.get_attribute("aria-valuetext") == "step 30: training 0.8, hold-out judge 0.8"
    browser.execute_script("arguments[0].focus()", chart)
    browser.switch_to.active_element.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert chart.get_attribute("aria-valuetext") == "step 2: training 0.52, hold-out judge 0.52"


def test_comparison_is_filtered(browser: Any, page: Path) -> None:
    open_page(browser, page)
    change(browser, "comparison-worse", True)
    text = browser.execute_script("return document.getElementById('pairs').innerText")
    assert "a circle" in text and "bold" not in text
    assert browser.execute_script("return document.querySelectorAll('#scores tbody tr').length") == 2


def test_markup_in_a_prompt_is_text(browser: Any, page: Path) -> None:
    open_page(browser, page)
    headings = browser.execute_script("return [...document.querySelectorAll('.group h3')].map((h) => h.textContent)")
    assert ATTACK in headings
    assert browser.title.endswith("training report")
    assert (
        browser.execute_script("return document.querySelectorAll('.group b b, .group h3 *, img[src=x]').length") == 0
    )
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_contrast(browser: Any, page: Path, scheme: str) -> None:
    open_page(browser, page, scheme=scheme)
    browser.execute_script("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert browser.execute_script(UNNAMED_CONTROLS) == []
    assert browser.execute_script("return [...document.images].filter((image) => !image.alt.trim()).length") == 0
    assert browser.execute_script("return document.documentElement.lang") == "en"
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
    assert browser.execute_script(LOW_CONTRAST) == []


@pytest.mark.parametrize("width", [320, 390])
def test_narrow_screen_shows_every_score_and_does_not_scroll_sideways(browser: Any, page: Path, width: int) -> None:
    open_page(browser, page, width=width)
    browser.execute_script("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    right = browser.execute_script(
        """
        const ends = (cell) => { const range = document.createRange(); range.selectNodeContents(cell); return range.getBoundingClientRect().right; };
        return [...document.querySelectorAll("#scores td")].map(ends);
        """
    )
    assert len(right) == 18 and 0 < max(right) < width


def test_what_was_trained_for_comes_first(browser: Any, page: Path) -> None:
    open_page(browser, page)
    sections = browser.execute_script("return [...document.querySelectorAll('main > section')].map((node) => node.id)")
    assert sections == ["comparison", "gallery", "curves", "run"]
    assert browser.find_element("id", "scores-note").text == "* few"


def test_run_is_described_and_closed_at_first(browser: Any, page: Path) -> None:
    open_page(browser, page)
    assert not browser.find_element("id", "command").is_displayed()
    browser.execute_script("document.querySelectorAll('#run details').forEach((details) => (details.open = true))")
    text = browser.find_element("id", "run").text
    assert (
        text.index("train.py --task x") < text.index("torch 2.13") < text.index("max_steps 30") < text.index("seed 42")
    )
    assert "differ from the defaults (1)" in text and "at their defaults (2)" in text and ATTACK in text


def test_labels_of_axes_are_whole_and_apart(browser: Any, tmp_path: Path) -> None:
    series = {
        "reward": lambda i: -0.00012 * i,
        "image/ratio_mean": lambda i: 1 + 1e-7 * i,
        "mine/large": lambda i: -1.2e6 - i,
        "mine/huge": lambda i: 3e17 * i,
        "mine/tiny": lambda i: 4e-9 * i,
    }
    store = ReportStore(tmp_path)
    store.restart(0)
    store.save_logs([{"step": 5000 * i, **{name: value(i) for name, value in series.items()}} for i in range(1, 31)])
    open_page(browser, write_report(tmp_path))
    browser.execute_script("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    charts = "return document.querySelectorAll('.chart svg').length"
    assert WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(charts) == len(series))
    frames = browser.execute_script(
        """
        const sides = (node) => { const box = node.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; };
        return [...document.querySelectorAll(".chart svg")].map((svg) => [sides(svg), [...svg.querySelectorAll("text")].map((text) => [text.textContent, ...sides(text)])]);
        """
    )
    for (left, top, right, bottom), labels in frames:
        assert len(labels) > 3
        for _, *box in labels:
            assert box[0] >= left and box[1] >= top and box[2] <= right and box[3] <= bottom
        for place, (name, *box) in enumerate(labels):
            for other, *its in labels[:place]:
                assert box[0] > its[2] or box[2] < its[0] or box[1] >= its[3] or box[3] <= its[1], (name, other)
        # Labels of the same axis differ.
        assert len({name for name, *_ in labels}) >= len(labels) - 1


def test_images_are_there_without_scrolling(browser: Any, page: Path) -> None:
    open_page(browser, page, width=390)
    heights = "return [document.documentElement.scrollHeight, innerHeight, scrollY]"
    height, window, position = browser.execute_script(heights)
    assert height > 4 * window and position == 0
    loaded = "return [...document.images].every((image) => image.complete && image.naturalWidth)"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(loaded))


def test_both_whole_images_stand_below_the_slider(browser: Any, page: Path) -> None:
    open_page(browser, page)
    first, second = browser.find_elements("css selector", "#groups .card:first-child .whole")[:2]
    assert [first.text, second.text] == ["initial", "refined"]
    slider = browser.find_element("css selector", "#groups input[type=range]")
    halves = browser.find_elements("css selector", "#groups .card:first-child .half")[:2]
    for button, value, seen in ((first, "100", [True, False]), (second, "0", [False, True])):
        button.send_keys(Keys.ENTER)
        assert slider.get_attribute("value") == value
        assert [half.is_displayed() for half in halves] == seen


def test_terms_are_explained(browser: Any, page: Path) -> None:
    open_page(browser, page)
    assert "The advantage is the reward minus the mean" in browser.find_element("id", "gallery").text
    note = browser.find_element("css selector", ".chart figcaption small")
    assert note.text.startswith("Probability of the sampled denoising steps") and note.is_displayed()


def test_paper_has_all_images(browser: Any, page: Path) -> None:
    open_page(browser, page)
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"])
    images = browser.execute_script("return [...document.images].map((image) => image.src)")
    assert images and all(images)
    assert len(re.findall(rb"/Subtype ?/Image", pdf)) >= len(set(images))
    assert not browser.find_element("id", "command").is_displayed()


def test_large_report_is_drawn_at_once(
    browser: Any,
    tmp_path: Path,
    make_group: Callable[..., TrajectoryGroup],
    logs: list[dict[str, float]],
) -> None:
    store = ReportStore(tmp_path)
    store.restart(0)
    size = 10
    store.add_groups([make_group(step, size=size, image_size=256) for step in range(1, NUM_LARGE // size + 1)])
    store.save_logs(logs)
    page = write_report(tmp_path)
    open_page(browser, page)
    assert browser.execute_script("return document.getElementById('count').textContent").startswith(f"{NUM_LARGE} ")
    (paint,) = browser.execute_script(
        "return performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)"
    )
    megabytes = page.stat().st_size / 1e6
    sys.stdout.write(f"{NUM_LARGE} trajectories: first paint after {paint / 1000:.3f} s, {megabytes:.1f} MB\n")
    assert megabytes < 20
    # A second on a machine of one's own; others share this one.
    assert paint < 10_000
