"""Projections are a run of their own: right values, verified, streamed, resumed to the same bytes."""

import json

import numpy as np
import pytest

import headwater
from headwater.analysis.measures.project import project
from headwater.analysis.measures.svd import svd
from headwater.benchmarks.breaking.faults import contents
from headwater.store.manifest import RunError


@pytest.mark.parametrize("layout", ["plain", "padded", "packed", "last"])
@pytest.mark.parametrize("site", ["resid", "z"])
def test_projections_are_those_of_the_rows(analysis_run, tmp_path, layout, site):
    run = analysis_run(layout)
    at = run.leads(site)[1:]
    directions = svd(run, site, at=at, k=3)
    got = project(run, directions, tmp_path / "out", k=2)
    one = directions.sel(centring="centred", positions="without_first")
    rows = run[site][1:].astype(np.float64) - one["mean"].values[:, None, None]
    head = "h" if site == "z" else ""
    want = np.einsum(f"lsp{head}d,l{head}kd->lsp{head}k", rows, one.direction.values[..., :2, :])
    name, axis = f"{site}_projection", run.spec(site).axis
    assert got.sites == (name,) and got.leads(name) == at and got.complete.all()
    found = got[name][:]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    np.testing.assert_allclose(found, want, 1e-6, 1e-6)
    there = got.to_xarray()
    np.testing.assert_array_equal(there[name], found)
    assert there[name].dims == (*run.spec(site).dims[:-1], "rank")
    back = there["direction"].values @ np.swapaxes(there["direction"].values, -1, -2)
    np.testing.assert_allclose(back, np.broadcast_to(np.eye(2), back.shape), 0, 1e-9)
    np.testing.assert_allclose(there["centre"], one["mean"])
    np.testing.assert_array_equal(there[f"{axis}_fraction"], run.plain(f"{axis}_fraction")[1:])
    for text in ("tokens", "row_start", "length", "document", "offset"):
        np.testing.assert_array_equal(there[text], run.plain(text))


def test_commands_take_it_like_any_other_run(analysis_run, tmp_path, cli):
    run = analysis_run("packed")
    out = tmp_path / "out"
    answer = cli("project", run.path, "--out", out, "--k", 2, "--at", "0,2", "--json")
    assert answer.code == 0 and json.loads(answer.out)["array"] == "resid_projection"
    assert "resid_projection" in cli("info", out).out and cli("status", out).code == 0
    assert cli("verify", out).code == 0
    made = headwater.open_run(out)
    ((values, index),) = headwater.stream(made, "resid_projection", 10_000, at=2, index=True)
    np.testing.assert_array_equal(values, made["resid_projection"][1][index[:, 1], index[:, 2]])
    assert len(index) == (run.plain("row_start") <= np.arange(run.manifest.n_positions)).sum()
    assert (out / "tokenizer.json").read_bytes() == (run.path / "tokenizer.json").read_bytes()
    shard = next(path for path in sorted((out / "resid_projection/c").rglob("*")) if path.is_file())
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    damaged = cli("verify", out, "--repair")
    assert (
        "does not match its checksum" in damaged.out + damaged.err
        and not headwater.open_run(out).complete.all()
    )
    assert cli("project", run.path, "--out", out, "--k", 2, "--at", "0,2").code == 0
    assert cli("verify", out).code == 0 and headwater.open_run(out).complete.all()
    refused = cli("extract", "--out", out)
    assert refused.code == 2 and "`headwater project` made it from another run" in refused.err


def test_an_interrupted_projection_goes_on_to_the_same_bytes(analysis_run, tmp_path):
    run = analysis_run("plain")
    directions = svd(run, k=3)
    whole = contents(project(run, directions, tmp_path / "whole").path)

    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        project(run, directions, tmp_path / "half", observe=stop)
    half = headwater.open_run(tmp_path / "half")
    assert half.complete.sum() == 4 and np.isnan(half["resid_projection"][:, 4:]).all()
    assert contents(project(run, directions, tmp_path / "half").path) == whole
    seen = []
    project(run, directions, tmp_path / "half", observe=seen.append)
    assert not seen
    with pytest.raises(RunError, match="holds another run, with fingerprint"):
        project(run, directions, tmp_path / "half", k=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(RunError, match="not a Headwater run"):
        project(run, directions, tmp_path / "notes")
    with pytest.raises(ValueError, match="k is 4; expected 1 to 3"):
        project(run, directions, tmp_path / "more", k=4)
    with pytest.raises(ValueError, match="was made with another one"):
        project(run, directions.assign_attrs(model_digest="x"), tmp_path / "more")
    assert not (tmp_path / "more").exists()
