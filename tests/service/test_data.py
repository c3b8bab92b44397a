"""A real server: runs as Zarr over HTTP, slices, figures with their Python, results; all against the run itself."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.ipc
import pytest
import xarray
import zarr

import headwater
from headwater.analysis.engine.results import kept_results, save
from headwater.analysis.measures.sinks import sinks
from headwater.benchmarks.lib.serving import Server
from headwater.service.catalog import Catalog
from headwater.service.settings import make_settings

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def server(analysis_run):
    root = analysis_run("plain").path.parent
    analysis_run("packed"), analysis_run("last")
    with Server(root) as server:
        yield server


def read(server, path):
    status, headers, body = server.fetch(path)
    assert status == 200, body
    return np.load(io.BytesIO(body), allow_pickle=False), headers


def test_runs_are_listed_and_described(server, analysis_run):
    listed = {run["name"]: run for run in server.client.get("/runs")["runs"]}
    assert {"plain", "packed", "last"} <= listed.keys()
    run, found = analysis_run("plain"), listed["plain"]
    assert found["state"] == "complete" and found["complete"] == 10 and found["n_blocks"] == 5
    assert found["n_bytes"] == sum(
        size for e in run.ledger.entries() for size, _ in e.files.values()
    )
    about = server.client.get("/runs/plain/about")
    assert [a["name"] for a in about["arrays"]] == list(run.sites) and about["coordinates"][
        "depth"
    ] == [0, 1, 2, 3]
    assert (
        about["fingerprint"] == run.manifest.fingerprint
        and about["sources"][0]["path"] == "ids.npy"
    )
    assert str(run.path.parent) not in json.dumps(listed)


def test_another_machine_opens_a_run_as_zarr(server, analysis_run):
    run = analysis_run("plain")
    group = zarr.open_group(f"{server.url}/runs/plain", mode="r")
    np.testing.assert_array_equal(group["pattern"][1, 3:5], run["pattern"][1, 3:5])
    with xarray.open_zarr(f"{server.url}/runs/plain", chunks=None) as opened:
        np.testing.assert_array_equal(opened.resid.sel(depth=2)[4].values, run["resid"][2, 4])
        assert opened.complete.values.all()


def test_a_file_is_read_in_ranges(server, analysis_run):
    spec = analysis_run("plain").spec("resid")
    path = f"plain/{spec.shard_path(0, 0)}"
    whole = (analysis_run("plain").path.parent / path).read_bytes()
    for wanted, part in (
        ("bytes=16-99", whole[16:100]),
        ("bytes=-24", whole[-24:]),
        ("bytes=4096-", whole[4096:]),
    ):
        status, headers, body = server.fetch(f"/runs/{path}", range=wanted)
        assert (status, body) == (206, part) and headers["content-range"].endswith(f"/{len(whole)}")
    assert server.fetch(f"/runs/{path}", range=f"bytes={len(whole)}-")[0] == 416


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ("pattern?layer=1&sequence=3&head=2", (1, 3, 2)),
        ("pattern?layer=1:&sequence=-1&query=5:9", (slice(1, None), 9, slice(None), slice(5, 9))),
        ("resid?depth=3&sequence=2:4&position=0&d_model=:7", (3, slice(2, 4), 0, slice(0, 7))),
        ("attn_argmax?layer=0&sequence=0", (0, 0)),
    ],
)
def test_slices_are_the_runs_values(server, analysis_run, query, key):
    run = analysis_run("plain")
    site = query.partition("?")[0]
    values, headers = read(server, f"/runs/plain/arrays/{query}")
    np.testing.assert_array_equal(values, run[site][key])
    assert (
        values.dtype == run[site].dtype
        and len(headers["x-headwater-dims"].split(",")) == values.ndim
    )
    _, _, body = server.fetch(f"/runs/plain/arrays/{query}&format=arrow")
    table = pyarrow.ipc.open_stream(body).read_all()
    arrow = np.array(table["values"].to_pylist()).reshape(
        json.loads(table.schema.metadata[b"shape"])
    )
    np.testing.assert_array_equal(arrow, values)
    assert table.column_names[:-1] == headers["x-headwater-dims"].split(",")[:-1]


def test_small_arrays_are_read_in_part(server, analysis_run):
    values, _ = read(server, "/runs/packed/arrays/tokens?sequence=1:3&position=2:9")
    np.testing.assert_array_equal(values, analysis_run("packed").tokens[1:3, 2:9])


@pytest.mark.parametrize(
    ("path", "status", "part"),
    [
        ("plain/arrays/pattern?layer=7", 400, "layer 7 is not in this array; it holds 0, 1, 2"),
        ("plain/arrays/pattern?sequence=10", 400, "0 to 9"),
        ("plain/arrays/pattern?query=9:3", 400, "takes nothing"),
        ("plain/arrays/pattern?d_model=1", 400, "pattern has no dimension 'd_model'"),
        ("plain/arrays/pattern?layr=1", 400, "'layr' is no parameter"),
        ("plain/arrays/pattern?layer=x", 422, "query.layer"),
        ("plain/arrays/patern", 404, "no array 'patern'"),
        ("nowhere/arrays/pattern", 404, "no run 'nowhere'"),
        ("plain/figures/norm?sequence=10", 400, "0 to 9"),
        ("plain/figures/token?sequence=0&position=40", 400, "has no token there"),
        ("plain/results/sinks2", 404, "no result 'sinks2'"),
    ],
)
def test_wrong_requests_say_what_is_wrong(server, path, status, part):
    code, _, body = server.fetch(f"/runs/{path}")
    assert code == status and part in json.loads(body)["detail"]


@pytest.mark.parametrize("name", ["plain", "packed"])
@pytest.mark.parametrize("kind", ["tokens", "sinks", "norm", "massive", "cosine", "token"])
@pytest.mark.filterwarnings("ignore")  # of what xarray says of means over nothing but NaN
def test_python_of_a_figure_makes_its_numbers(server, name, kind):
    figure = server.client.get(f"/runs/{name}/figures/{kind}?sequence=2&position=3")
    names: dict = {}
    exec(figure["python"], names)
    drawn = figure["arrays"]["value"]
    assert list(names["value"].shape) == [len(figure["coordinates"][d]) for d in drawn["dims"]]
    shown = np.array(drawn["values"], float)
    assert np.isfinite(shown).any()
    np.testing.assert_allclose(shown, names["value"].values, 1e-5, 1e-6)


@pytest.mark.parametrize(
    "drop", [("attn_sink", "resid_norm", "attn_received"), ("pattern", "resid")]
)
def test_figures_come_from_what_a_run_holds(analysis_run, monkeypatch, drop):
    """Patterns and statistics give the same figures, since they are of the same values."""
    from headwater.service.data.figures import make_figure

    run = headwater.open_run(analysis_run("packed").path)
    whole = {kind: make_figure(run, kind, 1, 4) for kind in ("sinks", "norm", "token")}
    for name in drop:
        del run._specs[name]
    for kind, figure in whole.items():
        other = make_figure(run, kind, 1, 4)
        np.testing.assert_allclose(other.arrays["value"][1], figure.arrays["value"][1], 2e-3, 1e-4)


def test_cosine_between_depths_leaves_the_first_position_out(analysis_run):
    from headwater.service.data.figures import make_figure

    run = analysis_run("plain")
    x = run["resid"][:, 4].astype(np.float64)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    found = make_figure(run, "cosine", 4, None).arrays
    np.testing.assert_allclose(
        found["without_first"][1], np.einsum("atd,btd->ab", x[:, 1:], x[:, 1:]) / 39, 1e-5
    )
    np.testing.assert_allclose(found["value"][1], np.einsum("atd,btd->ab", x, x) / 40, 1e-5)


def test_thumbnails_hold_the_largest_probability(server, analysis_run, monkeypatch):
    from headwater.service.data import figures

    small, _ = read(server, "/runs/plain/thumbnails?sequence=1&layer=2")
    pattern = analysis_run("plain")["pattern"][2, 1]
    np.testing.assert_array_equal(small, pattern)  # 40 positions fit
    monkeypatch.setattr(figures, "THUMBNAIL", 10)
    found = figures.thumbnails(analysis_run("plain"), 1, 2)
    np.testing.assert_array_equal(found, pattern.reshape(3, 10, 4, 10, 4).max((2, 4)))


def test_only_the_chunks_that_are_shown_are_read(analysis_run, monkeypatch):
    from headwater.service.data import figures, slices
    from headwater.service.settings import Limits

    run = headwater.open_run(analysis_run("plain").path)
    seen = set()
    inner = run.shard
    monkeypatch.setattr(
        run, "shard", lambda spec, *at: seen.add(spec.shard_path(*at)) or inner(spec, *at)
    )
    figures.thumbnails(run, 5, 1)
    slices.read_slice(run, "resid", {"depth": "2", "sequence": "5"}, False, Limits())
    assert seen == {run.spec("pattern").shard_path(0, 2), run.spec("resid").shard_path(0, 2)}


def test_a_second_slice_opens_nothing_again(analysis_run, monkeypatch):
    from headwater.service.data.slices import read_slice

    catalog = Catalog(make_settings(str(analysis_run("plain").path.parent)))

    def read():
        for wanted in (
            {"layer": "1", "head": "2", "sequence": "3"},
            {"layer": "1:", "head": "0", "sequence": "4"},
        ):
            values = read_slice(
                catalog.open("plain"), "pattern", wanted, False, catalog.limits
            ).values
        tokens = read_slice(
            catalog.open("plain"), "tokens", {"sequence": "2"}, False, catalog.limits
        ).values
        return values, tokens

    first = read()
    monkeypatch.setattr(zarr, "open_array", None)
    for before, after in zip(first, read(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_results_are_served_as_json_and_as_zarr(server, analysis_run):
    run = analysis_run("plain")
    result = sinks(run)
    save(run, result)
    analyses = server.client.get("/runs/plain/about")["analyses"]
    assert "sinks" in analyses and analyses == list(kept_results(run).results)
    shown = server.client.get("/runs/plain/results/sinks")
    name = next(n for n, v in result.data_vars.items() if v.dims[-2:] == ("layer", "head"))
    np.testing.assert_allclose(
        np.array(shown["variables"][name]["values"], float), result[name].values
    )
    assert shown["attributes"]["fingerprint"] == run.manifest.fingerprint
    with xarray.open_zarr(f"{server.url}/runs/plain.analysis/sinks", chunks=None) as opened:
        np.testing.assert_array_equal(opened[name].values, result[name].values)


def test_slices_are_priced_before_they_are_read(analysis_run):
    from headwater.service.data.slices import TooLargeError, read_slice
    from headwater.service.settings import Limits

    run = analysis_run("plain")
    with pytest.raises(TooLargeError, match="an answer has at most 1 kB"):
        read_slice(run, "resid", {"depth": "0"}, False, Limits(slice_bytes=1000))
    with pytest.raises(TooLargeError, match="in chunks of 192 kB, but at most 100 kB are read"):
        read_slice(
            run,
            "pattern",
            {"query": "0", "key": "0", "layer": "0"},
            False,
            Limits(read_bytes=100_000),
        )
