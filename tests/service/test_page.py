"""The page in a real browser: submit a job, watch it end, look at patterns, compare, take figures along."""

from __future__ import annotations

import csv
import io
import re
import shutil
import struct

import numpy as np
import pytest

import headwater
from headwater.benchmarks.lib.serving import Server

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
)
TEXT = (
    "def add(first, second):\n    return first + second\n\n\ndef twice(value):\n    return add(value, value)\n"
    * 8
) + "# naïve café × – 日本 🙂\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    (root / "source.py").write_text(TEXT)
    config = headwater.RunConfig(
        out=str(root / "other"),
        text=(str(root / "source.py"),),
        preset="statistics",
        seq_len=32,
        max_sequences=2,
        threads=1,
    )
    headwater.extract(config)
    return root


@pytest.fixture(scope="module")
def server(root):
    with Server(root) as server:
        yield server


@pytest.fixture
def page(server):
    """A page that has seen nothing; at the end it has logged no error and asked nobody but the server."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    complaints, asked = [], []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000}, color_scheme="light")
        page.set_default_timeout(60_000)
        page.on(
            "console",
            lambda message: complaints.append(message.text) if message.type != "log" else None,
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        yield page
        browser.close()
    assert complaints == []
    assert asked and all(url.startswith((f"{server.url}/", "data:", "blob:")) for url in asked), (
        asked
    )


def hover(page, drawing, n, query, key):
    """Point at a cell of an n × n pattern; return what the tooltip says."""
    cells = page.locator(f"{drawing} svg image.cells").first
    cells.scroll_into_view_if_needed()
    box = cells.bounding_box()
    page.mouse.move(
        box["x"] + (key + 0.5) * box["width"] / n, box["y"] + (query + 0.5) * box["height"] / n
    )
    return page.locator("#tip").inner_text()


def download(page, section, name):
    with page.expect_download() as found:
        section.locator(".tools").get_by_text(name, exact=True).click()
    return found.value.path().read_bytes()


def test_a_job_is_submitted_watched_and_looked_at(page, server, root):
    page.keyboard.press("b")
    page.fill("#text", TEXT)
    page.fill("#text-name", "mine.txt")
    page.click("#upload")
    page.get_by_text("texts/mine.txt, ").wait_for()
    page.fill(
        "#document",
        'text = ["texts/mine.txt"]\nout = "mine"\npreset = "patterns"\nseq_len = 32\nblock = 1\n',
    )
    page.click("#plan")
    page.get_by_text("mine: writes ").wait_for()
    page.click("#submit")
    page.locator("[data-job][data-state=done]").wait_for()
    assert page.locator("[data-job] progress").get_attribute("value") == page.locator(
        "[data-job] progress"
    ).get_attribute("max")
    page.keyboard.press("r")
    page.get_by_role("link", name="mine", exact=True).click()
    page.locator("#large svg image.cells").wait_for()
    run = headwater.open_run(root / "mine")
    for layer, head in ((0, 0), (3, 5)):
        page.locator(f'[data-cell="{layer}.{head}"]').click()
        page.locator('[aria-busy="false"]').wait_for()
        assert page.get_by_role(
            "heading", name=f"pattern of layer {layer}, head {head}"
        ).is_visible()
        for query, key in ((31, 0), (12, 12), (20, 7)):
            said = hover(page, "#large", 32, query, key)
            row = run["pattern"][layer, 0, head, query].astype(float)
            values = [float(v) for v in re.findall(r"(?:value|row|share) (\S+)", said)]
            entropy = -(row[row > 0] * np.log(row[row > 0])).sum()
            np.testing.assert_allclose(values, [row[key], entropy, row[0]], 1e-3, 1e-4)
            assert f"query {query} " in said and f"key {key} " in said
    assert "hidden" in hover(page, "#large", 32, 3, 9)


def test_figures_are_taken_along(page, server, root):
    page.goto(f"{server.url}/#/run/mine?s=1&l=2&h=1")
    section = page.locator("#large section.card")
    section.wait_for()
    run = headwater.open_run(root / "mine")
    np.testing.assert_array_equal(
        np.load(io.BytesIO(download(page, section, "data"))), run["pattern"][2, 1, 1]
    )
    png = download(page, section, "PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG") and min(width, height) > 800
    assert download(page, section, "SVG").startswith(b"<svg") and b"<image" in download(
        page, section, "SVG"
    )
    section.locator(".tools").get_by_text("Python").click()
    names: dict = {}
    exec(section.locator("pre").inner_text(), names)
    np.testing.assert_array_equal(names["value"].values, run["pattern"][2, 1, 1])
    norms = page.locator('[data-figure="mine-norm"]')
    rows = list(csv.reader(io.StringIO(download(page, norms, "data").decode())))
    assert rows[0] == ["depth", "position", "value"] and len(rows) == 1 + 7 * 32
    last = np.linalg.norm(run["resid"][6, 1, 31].astype(np.float64))
    np.testing.assert_allclose(float(rows[-1][2]), last, 1e-4)


def test_keys_tokens_and_themes(page, server, root):
    page.goto(f"{server.url}/#/run/mine")
    page.locator("#large svg image.cells").wait_for()
    for key in ("ArrowDown", "l", "]", "."):
        page.keyboard.press(key)
    page.locator('[data-figure="mine-received-0"]').wait_for()
    assert page.url.endswith("?s=1&l=1&h=1&p=0")
    page.locator('#tokens [data-position="5"]').click()
    page.locator('[data-figure="mine-received-5"]').wait_for()
    assert page.locator("#tokens span.here").get_attribute("data-position") == "5"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    page.locator("#large svg image.cells").wait_for()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()


def test_back_and_forward_show_what_the_address_says(page, server, root):
    page.get_by_role("link", name="mine", exact=True).click()
    page.locator("#large svg image.cells").wait_for()
    page.keyboard.press("ArrowRight")
    page.get_by_role("heading", name="pattern of layer 0, head 1").wait_for()
    there = page.url
    assert there.endswith("/#/run/mine?s=0&l=0&h=1")
    for _ in range(2):
        page.go_back()
        page.locator("#large").wait_for(state="detached")
        page.get_by_role("heading", name="Runs").wait_for()
        page.keyboard.press("ArrowRight")  # which no view that was left may take
        page.go_forward()
        page.get_by_role("heading", name="pattern of layer 0, head 1").wait_for()
        assert page.url == there


def test_characters_are_whole_where_a_token_is_a_part_of_one(page, server, root):
    run = headwater.open_run(root / "mine")
    sequence = run.manifest.n_sequences - 1
    page.goto(f"{server.url}/#/run/mine?s={sequence}")
    page.locator("#large svg image.cells").wait_for()
    shown = page.locator("#tokens").inner_text()
    labels = "".join(page.locator("#large svg text").all_text_contents())
    assert "日··本··␣🙂···" in shown.replace(" ", "␣") and not set("ÃæðĹ") & set(shown + labels)


@pytest.mark.parametrize(
    ("place", "there"),
    [
        ("#/", "#runs tbody a"),
        ("#/run/mine?p=3", "#maps svg"),
        ("#/jobs", "#document"),
        ("#/compare?a=mine&b=other", '[data-figure="compare-sinks"]'),
    ],
)
def test_every_view_fits_a_phone_and_names_what_it_holds(page, server, root, place, there):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{server.url}/{place}")
    page.locator(there).first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#help").bounding_box()["x"] < 360
    nameless = """[...document.querySelectorAll('input, select, textarea, main svg.chart, section svg')].filter(
        (e) => !e.labels?.length && !e.getAttribute('aria-label')).map((e) => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(nameless) == []


def test_two_runs_are_compared_and_statistics_shown(page, server, root):
    page.keyboard.press("c")
    page.select_option("#run-a", "mine")
    page.select_option("#run-b", "other")
    page.locator('[data-figure="compare-sinks"]').wait_for()
    page.get_by_role("heading", name="other: first-token share").wait_for()
    sinks = page.locator('[data-figure="compare-sinks"]')
    shares = list(csv.reader(io.StringIO(download(page, sinks, "data").decode())))
    for name, expected in (
        ("mine", headwater.open_run(root / "mine")["pattern"][4, 0, 2, :, 0]),
        ("other", headwater.open_run(root / "other")["attn_sink"][4, 0, 2]),
    ):
        shown = next(float(row[3]) for row in shares if row[:3] == [name, "4", "2"])
        np.testing.assert_allclose(shown, expected.astype(np.float64).mean(), 1e-3)
    page.goto(f"{server.url}/#/run/other")
    page.locator('[data-figure="other-attn_sink-s0-l0-h0"]').wait_for()
    page.locator("#grid svg.spark").first.wait_for()
    page.goto(f"{server.url}/docs")
    page.get_by_role("heading", name="POST /jobs", exact=True).wait_for()
