"""Figures, report, comparison: they show the results that are kept, and the page opens in a browser on its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest

from headwater.analysis.engine.analysis import Shown
from headwater.analysis.engine.results import RunResults, kept_results, load, save
from headwater.analysis.measures.contexts import context_rows
from headwater.analysis.plots.catalogue import draw, holds, save_figures
from headwater.analysis.plots.draw import render
from headwater.analysis.suite.compare import compare, steps_of
from headwater.analysis.suite.registry import analyses, plots
from headwater.analysis.weights.coherence import Settings, coherence
from headwater.analysis.weights.directions import weights
from headwater.store.reader import open_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROBE = """<script>window.onload = () => {
  const figures = [...document.images].map(i => {
    const b = i.getBoundingClientRect();
    return [i.complete, i.naturalWidth, Math.round(b.width), Math.round(b.height)] });
  const rows = document.querySelectorAll("table.contexts tbody tr").length;
  document.body.setAttribute("data-probe",
    JSON.stringify({figures, rows, width: document.documentElement.scrollWidth})) }</script>"""


@pytest.fixture(scope="module")
def pair(analysis_run, tmp_path_factory):
    """Two analysed runs of one model: packed documents with every site, and their residual streams alone."""
    pytest.importorskip("matplotlib")
    from headwater.cli.entry import main

    home = tmp_path_factory.mktemp("report")
    for name in ("run-100", "run-20"):
        shutil.copytree(analysis_run("packed").path, home / name)
    assert main(["analyze", str(home / "run-100")]) == 0
    assert main(["analyze", str(home / "run-20"), "cosine", "sinks", "lens"]) == 0
    return home / "run-100", home / "run-20"


def test_every_figure_can_be_drawn_from_one_run(pair, tiny_gpt2, tmp_path):
    run = kept_results(pair[0])
    results = run.results | {
        "top": run.results["top_mlp_post"],
        "weights": weights(str(tiny_gpt2), 2, 2),
    }
    settings = Settings(2, 2, n_random=20, n_bootstrap=20, n_sets=200)
    results["coherence"] = coherence(str(tiny_gpt2), open_run(pair[0]), None, settings)
    drawn = draw([RunResults("tiny", results)])
    ours = {plot.name for kind, plot in plots() if kind.section}
    assert {one.plot.name for one in drawn} == ours and len(ours) > 15
    for one in drawn:
        for axis in one.figure.axes:
            for line in axis.lines:
                values = np.asarray(line.get_ydata(), float)
                assert line.get_label() == "×" or not len(values) or np.isfinite(values).any(), (
                    one.name
                )
    paths = save_figures(drawn[:2], tmp_path, "svg")
    assert all(path.read_bytes().startswith(b"<?xml") for path in paths)
    before = [path.read_bytes() for path in paths]
    assert [
        path.read_bytes()
        for path in save_figures(draw([RunResults("tiny", results)])[:2], tmp_path, "svg")
    ] == before


def test_curves_are_the_values_of_the_results(pair):
    runs = [kept_results(path) for path in pair]
    (one,) = draw(runs, ["phases"])
    assert one.labels == ("run-100", "run-20")
    lines = one.figure.axes[0].lines
    data = runs[1].results["cosine"].isel(centring=1, positions=1, outliers=1)
    assert len(lines) == 4
    np.testing.assert_array_equal(lines[3].get_ydata(), data.consecutive)
    np.testing.assert_array_equal(lines[3].get_xdata(), data.step_fraction)
    (sinks,) = draw(runs[:1], ["sink_layers"])
    share = runs[0].results["sinks"].share_by_layer.sel(query_set="last_64")
    np.testing.assert_array_equal(sinks.figure.axes[0].lines[2].get_ydata(), share)


def test_the_page_opens_in_a_browser_and_asks_for_nothing(cli, pair, tmp_path):
    page = tmp_path / "report.html"
    done = cli("report", pair[0], "--out", page)
    assert done.code == 0 and done.out.strip() == str(page)
    text = page.read_text("utf-8")
    manifest, results = open_run(pair[0]).manifest, kept_results(pair[0])
    n_figures = sum(holds(results, kind, plot) for kind, plot in plots())
    for shown in (
        manifest.fingerprint[:16],
        manifest.model["digest"][:16],
        "run-100",
        "participation ratio",
    ):
        assert shown in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    page.write_text(text.replace("</body>", f"{PROBE}</body>"), "utf-8")
    log = tmp_path / "net.json"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--disable-background-networking",
        "--enable-logging=stderr",
        "--window-size=1000,900",
        f"--log-net-log={log}",
        "--net-log-capture-mode=Everything",
        "--dump-dom",
        page.as_uri(),
    ]
    opened = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="([^"]*)"', opened.stdout)
    assert found, opened.stderr[-2000:]
    probe = json.loads(found[1].replace("&quot;", '"'))
    assert len(probe["figures"]) == n_figures and probe["width"] <= 1000 and probe["rows"] > 10
    assert all(
        done and natural > 300 and wide > 500 and high > 100
        for done, natural, wide, high in probe["figures"]
    )
    assert "CONSOLE" not in opened.stderr
    asked = re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text("utf-8", "replace"))
    assert not [url for url in asked if "google" not in url and "gvt1" not in url], asked


def test_runs_are_put_side_by_side(cli, pair):
    runs = [kept_results(path) for path in pair]
    got = compare(runs, "sinks", "first_token_share", query_set="second_half", n_grid=5)
    want = runs[0].results["sinks"].first_token_share.sel(query_set="second_half").mean("head")
    np.testing.assert_allclose(got["value"][0], want)
    np.testing.assert_allclose(got.fraction[0], runs[0].results["sinks"].layer_fraction)
    assert got.step.values.tolist() == [-1, -1]
    assert got.on_grid.shape == (2, 5)
    with pytest.raises(ValueError, match="run-20 has no svd"):
        compare(runs, "svd", "participation_ratio")
    with pytest.raises(ValueError, match="can't be put over depth"):
        compare(runs, "sinks", "l_in")
    rows = json.loads(cli("compare", *pair, "--json", "--steps", "100,20").out)
    assert list(rows[0]["values"].items()) == [("run-20", 20), ("run-100", 100)]
    assert {row["analysis"] for row in rows[1:]} >= {"cosine", "sinks", "lens"}
    plain = cli("compare", *pair).out.splitlines()
    assert "training step" not in "".join(plain) and plain[0].split() == ["run-100", "run-20"]
    assert sum("too few layers" in line for line in plain) >= 4  # l_in and l_out of both
    assert any(
        line.startswith("sinks: strongest share ") and len(line.split()) == 5 for line in plain
    )
    assert all(len(row["values"]) == 2 for row in rows)
    assert "first token" not in cli("compare", *pair, "--steps", "7,8").out
    cli("compare", *pair, "--steps", "7").error(2, "1 steps are given for 2 runs")
    cli("compare", pair[0]).error(2, "takes two runs or more")


def test_plot_writes_files_and_refuses_what_is_not_there(cli, pair, tmp_path):
    done = cli(
        "plot", *pair, "--figures", "sink_map,sink_layers", "--out", tmp_path, "--format", "pdf"
    )
    names = [path.rpartition("/")[2] for path in done.out.split()]
    assert names == ["sink_map-run-100.pdf", "sink_map-run-20.pdf", "sink_layers.pdf"]
    assert all((tmp_path / name).read_bytes().startswith(b"%PDF") for name in names)
    cli("plot", pair[0], "--figures", "sinkmap").error(2, "there is no plot 'sinkmap'", "sink_map")
    cli("plot", pair[1], "--figures", "spectra").error(
        2, "no result to draw", "headwater analyze RUN svd"
    )
    cli("plot", pair[0], "--format", "gif").error(2, "the format is 'gif'", "png, svg, pdf")
    shutil.copytree(pair[0], tmp_path / "bare")
    cli("plot", tmp_path / "bare").error(2, "has no results yet", "headwater analyze")


def test_what_is_of_several_runs_takes_no_place_of_one(cli, pair):
    for command, name in (("plot", "plots"), ("report", "report.html")):
        one = cli(command, pair[1], *(["--figures", "phases"] if command == "plot" else []))
        assert f"{pair[1]}.analysis/{name}" in one.out, one.err
    before = (pair[1].with_name("run-20.analysis") / "report.html").read_bytes()
    assert "plots-with-run-100/phases" in cli("plot", *pair[::-1], "--figures", "phases").out
    both = cli("report", *pair[::-1]).out.strip()
    assert both.endswith("run-20.analysis/report-with-run-100.html")
    assert (pair[1].with_name("run-20.analysis") / "report.html").read_bytes() == before


def test_every_analysis_is_shown():
    for name, kind in analyses().items():
        assert kind.section and kind.headline is not Shown.headline, name
    drawn = {kind.name for kind, _ in plots()}
    assert set(analyses()) - drawn == {"cka", "svd_tokens", "favourites", "top"}


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (("run", "run2"), [-1, -1]),
        (("step-100", "step-20"), [100, 20]),
        (("checkpoint-7", "x_step_12.5"), [7, 12]),
        (("gpt2", "footstep4"), [-1, -1]),
    ],
)
def test_only_a_name_that_says_step_has_one(names, steps):
    assert steps_of([RunResults(name, {}) for name in names]).tolist() == steps


def test_pdf_figures_embed_fonts_that_publishers_take(pair):
    (drawn,) = draw([kept_results(pair[1])], ["phases"])
    page = render(drawn.figure, "pdf")
    assert (b"/Type3" not in page and b"/Subtype /CIDFontType2" in page) or b"/TrueType" in page


def test_report_runs_on_the_cluster_that_is_named(cli, pair, monkeypatch):
    asked = []

    @contextmanager
    def open_pool(workers, address):
        asked.append((workers, address))
        yield "threads"

    monkeypatch.setattr("headwater.analysis.engine.pools.open_pool", open_pool)
    assert cli("report", pair[1], "--ray", "auto", "--workers", 3).code == 0
    assert asked == [(3, "auto")]


def test_results_of_another_run_at_the_same_path_are_left_out(pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "run")
    shutil.copytree(pair[1].with_name("run-20.analysis"), tmp_path / "run.analysis")
    assert set(kept_results(tmp_path / "run").results) >= {"cosine", "lens"}
    old = load(tmp_path / "run", "lens").load().assign_attrs(fingerprint="another")
    save(tmp_path / "run", old)
    assert "lens" not in kept_results(tmp_path / "run").results


def test_context_rows_hold_the_tokens_around(pair):
    data = kept_results(pair[0]).results["top_mlp_post"]
    rows = context_rows(data, 3, 2)
    assert len(rows) == 6
    run = open_run(pair[0])
    for row in rows:
        value = run["mlp_post"][run.leads("mlp_post").index(row["layer"]), row["sequence"]][
            row["position"], row["unit"]
        ]
        assert value == pytest.approx(row["value"])
        assert row["token"] and isinstance(row["before"], str)


def test_weights_kept_beside_a_run_of_the_model_are_in_its_report(cli, pair, tiny_gpt2, tmp_path):
    """They lie in RUN.analysis, the figure shows the transition beside them, and other weights are left out."""
    run, kept = tmp_path / "run", tmp_path / "run.analysis"
    shutil.copytree(pair[1], run)
    shutil.copytree(pair[1].with_name("run-20.analysis"), kept)
    assert "The weights" not in report_of(cli, run, tmp_path)
    done = json.loads(
        cli("weights", "--model", tiny_gpt2, "--corpus", run, "--directions", 2, "--json").out
    )
    assert [one["path"] for one in done] == [str(kept / "weights"), str(kept / "coherence")]
    found = kept_results(run)
    (drawn,) = draw([found], ["coherence"])
    axes = drawn.figure.axes
    share = load(run, "sinks").first_token_share.sel(query_set="second_half").mean("head")
    assert len(axes) == 3
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), share)
    np.testing.assert_allclose(axes[2].lines[0].get_xdata(), load(run, "sinks").layer_fraction)
    moved = found.results["coherence"].load().assign(l_in=((), 1.0))
    (drawn,) = draw([RunResults("moved", {"coherence": moved})], ["coherence"])
    assert [axis.lines[-1].get_xdata()[0] for axis in drawn.figure.axes] == [0.5] * 3
    text = report_of(cli, run, tmp_path)
    assert "The weights" in text and "coherence: definitions and arguments" in text
    assert found.results["sinks"].attrs["fingerprint"][:16] in text
    save(run, moved.assign_attrs(model_digest="x"))
    assert "coherence" not in kept_results(run).results and "weights" in kept_results(run).results


def report_of(cli, run, folder):
    assert cli("report", run, "--out", folder / "page.html").code == 0
    return (folder / "page.html").read_text("utf-8")
