"""A server whose root is a prefix in an object store, a real S3 server (moto): the same answers as from a directory."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import headwater
from headwater.analysis.engine.results import load, save
from headwater.analysis.measures.sinks import sinks
from headwater.benchmarks.breaking.faults import contents
from headwater.benchmarks.lib.serving import Server
from headwater.service.catalog import Catalog
from headwater.service.data.figures import make_figure, thumbnails
from headwater.service.settings import make_settings
from headwater.store.place import place_of

pytest.importorskip("obstore")
pytest.importorskip("moto.server")
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYs3cr3tOfTheTest"
ROOT = "s3://bucket/runs"
DOCUMENT = {
    "model": "models/tiny",
    "text": ["texts/fox.txt"],
    "sites": ["resid", "pattern", "loss"],
    "block": 8,
    "threads": 1,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A bucket, and the environment that leads to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "AKIATEST",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "no_proxy": "127.0.0.1",
            "AWS_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "s3_with_faults.py")]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            _, address = json.loads(process.stdout.readline())
            patch.setenv("AWS_ENDPOINT_URL", address)
            urllib.request.urlopen(
                urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=60
            ).close()
            yield address
            process.stdin.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_gpt2, tiny_text):
    """The folder beside the root, with a model and a text."""
    home = tmp_path_factory.mktemp("state")
    shutil.copytree(tiny_gpt2, home / "models" / "tiny")
    (home / "texts").mkdir()
    shutil.copy(tiny_text, home / "texts" / "fox.txt")
    return home


@pytest.fixture(scope="module")
def local(tmp_path_factory, home):
    """A run on disk, with a kept result."""
    config = headwater.RunConfig(
        **DOCUMENT
        | {
            "out": str(tmp_path_factory.mktemp("local") / "one"),
            "model": str(home / "models/tiny"),
            "text": (str(home / "texts/fox.txt"),),
        }
    )
    run = headwater.extract(config)
    save(run, sinks(run))
    return run, config


@pytest.fixture(scope="module")
def server(store, local, home):
    run, config = local
    made = headwater.extract(replace(config, out=f"{ROOT}/deep/one")).path
    for name in ("runs/two", "other/run"):
        for item in made.iterdir():
            (place_of(f"s3://bucket/{name}") / str(item.relative_to(made))).write_bytes(
                item.read_bytes()
            )
    save(f"{ROOT}/deep/one", sinks(run))
    (place_of(ROOT) / "two" / run.spec("resid").shard_path(0, 1)).unlink()
    for name in ("secret.txt", "runs/notes.txt", "runs/deep/one/notes.txt"):
        place_of(f"s3://bucket/{name}").write_bytes(b"secret")
    with Server(ROOT, "--state", str(home)) as server:
        yield server


def stored(url):
    """What a run promises: its objects outside the bookkeeping."""
    run = place_of(url)
    found = {item.relative_to(run).as_posix(): item for item in run.iterdir()}
    return {
        name: item.read_bytes() for name, item in found.items() if not name.startswith("headwater/")
    }


def test_runs_are_listed_and_described(server, local):
    run, _ = local
    catalog = Catalog(make_settings(str(run.path.parent)))
    listed = {run["name"]: run for run in server.client.get("/runs")["runs"]}
    assert list(listed) == ["deep/one", "two"]
    here, there = catalog.describe("one"), server.client.get("/runs/deep/one/about")
    for name in ("name", "made", "made_by", "damage"):
        del here[name], there[name]
    assert there == json.loads(json.dumps(here))
    assert there["analyses"] == ["sinks"] and there["state"] == "complete"
    end = time.monotonic() + 120
    while not all(
        (
            found := {run["name"]: run["damage"] for run in server.client.get("/runs")["runs"]}
        ).values()
    ):
        assert time.monotonic() < end, found
        time.sleep(0.1)
    assert found["deep/one"]["n_problems"] == 0
    assert found["two"]["problems"] == [
        {"path": run.spec("resid").shard_path(0, 1), "what": "is missing"}
    ]


def test_slices_figures_and_results_are_those_of_the_disk(server, local):
    run, _ = local
    for query, site, key in (
        ("layer=1&sequence=3&head=1", "pattern", (1, 3, 1)),
        ("depth=2", "resid", 2),
        ("sequence=2:5&position=4", "loss", (slice(2, 5), 4)),
    ):
        status, _, body = server.fetch(f"/runs/deep/one/arrays/{site}?{query}")
        assert status == 200, body
        np.testing.assert_array_equal(np.load(io.BytesIO(body), allow_pickle=False), run[site][key])
    _, _, body = server.fetch("/runs/deep/one/arrays/tokens?sequence=1:3")
    np.testing.assert_array_equal(np.load(io.BytesIO(body), allow_pickle=False), run.tokens[1:3])
    _, _, body = server.fetch("/runs/deep/one/thumbnails?sequence=1&layer=0")
    np.testing.assert_array_equal(
        np.load(io.BytesIO(body), allow_pickle=False), thumbnails(run, 1, 0)
    )
    for kind in ("tokens", "sinks", "norm", "massive", "cosine", "token"):
        figure = server.client.get(f"/runs/deep/one/figures/{kind}?sequence=2&position=3")
        expected = json.loads(json.dumps(make_figure(run, kind, 2, 3).to_json("deep/one", "")))
        assert figure["arrays"] == expected["arrays"] and figure.get("strings") == expected.get(
            "strings"
        )
    shown, kept = server.client.get("/runs/deep/one/results/sinks"), load(run, "sinks")
    name = next(n for n, v in kept.data_vars.items() if v.dims[-2:] == ("layer", "head"))
    np.testing.assert_array_equal(
        np.array(shown["variables"][name]["values"], float), kept[name].values
    )


def test_another_machine_opens_a_run_as_zarr(server, local):
    run, _ = local
    group = zarr.open_group(f"{server.url}/runs/deep/one", mode="r")
    for site in ("pattern", "resid", "loss"):
        np.testing.assert_array_equal(group[site][...], run[site][...])
    kept = zarr.open_group(f"{server.url}/runs/deep/one.analysis/sinks", mode="r")
    assert kept.attrs["fingerprint"] == run.manifest.fingerprint


def test_a_file_is_read_in_ranges(server, local, monkeypatch):
    shard = local[0].spec("resid").shard_path(0, 0)
    path, whole = f"/runs/deep/one/{shard}", (local[0].path / shard).read_bytes()
    n = len(whole)
    for wanted, part in (
        (f"bytes=16-{n + 9}", whole[16:]),
        ("bytes=16-99", whole[16:100]),
        ("bytes=-24", whole[-24:]),
    ):
        status, headers, body = server.fetch(path, range=wanted)
        assert (status, body) == (206, part) and headers["content-range"].endswith(f"/{n}")
    for wanted in ("", "bytes=", "lines=1-2", "bytes=0-1,4-5"):
        assert server.fetch(path, range=wanted)[::2] == (200, whole)
    for wanted in (f"bytes={n}-", "bytes=-0", "bytes=9-3"):
        status, headers, body = server.fetch(path, range=wanted)
        assert (status, body, headers["content-range"]) == (416, b"", f"bytes */{n}")
    status, headers, body = server.fetch(path, "HEAD")
    assert (status, body, headers["content-length"]) == (200, b"", str(n))
    tagged = {"range": "bytes=0-9", "if-range": headers["etag"]}
    assert server.fetch(path, **tagged)[::2] == (206, whole[:10])
    assert server.fetch(path, **tagged | {"if-range": '"old"'})[::2] == (200, whole)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "%2e%2e/secret.txt",
        "..%2fsecret.txt",
        "deep/one/../../notes.txt",
        "notes.txt",
        "../other/run/zarr.json",
        "%2e%2e/other/run/zarr.json",
        "s3:/bucket/other/run/zarr.json",
        "deep/one/notes.txt",
        "s3%3a%2f%2fbucket%2fother%2frun/zarr.json",
        "deep/one/headwater/manifest.json",
        "/other/run/zarr.json",
        "deep/one.analysis/../../notes.txt",
        "deep/one%5c..%5cnotes.txt",
        "deep/one/zarr.json%00",
        "deep//one",
        "a/" * 9 + "zarr.json",
    ],
)
def test_no_name_leads_out_of_the_prefix(server, path):
    for tail in ("", "/about", "/arrays/loss", "/results/sinks", "/figures/tokens?sequence=0"):
        status, _, body = server.fetch(f"/runs/{path}{tail}")
        assert status in (400, 404, 422) and b"secret" not in body.replace(b"secret.txt", b""), (
            tail,
            body,
        )


@pytest.mark.parametrize(
    ("kind", "document", "part"),
    [
        ("extract", {"out": "../x"}, "no name under the server's root"),
        ("extract", {"out": "s3://bucket/other/x"}, "no name under the server's root"),
        ("extract", {"out": "/tmp/x"}, "no name under the server's root"),
        (
            "extract",
            {"out": "x", "text": ["s3://bucket/secret.txt"]},
            "is not under the server's root",
        ),
        ("extract", {"out": "x", "text": ["/etc/passwd"]}, "is not under the server's root"),
        (
            "extract",
            {"out": "x", "text": [".headwater/jobs.sqlite"]},
            "is not under the server's root",
        ),
        ("verify", {"run": "../other/run"}, "there is no run '../other/run' here"),
        (
            "verify",
            {"run": "s3://bucket/other/run"},
            "there is no run 's3://bucket/other/run' here",
        ),
    ],
)
def test_a_job_stays_in_the_prefix_and_in_the_folder_beside_it(server, kind, document, part):
    with pytest.raises(ValueError) as refusal:
        server.client.post("/jobs", {"kind": kind, "document": document})
    assert part in str(refusal.value)


def test_jobs_write_and_analyse_runs_of_the_prefix(server, local, home):
    run, _ = local
    assert server.client.put("/texts/sent.txt", b"the fox")["text"] == "texts/sent.txt"
    assert (home / "texts/sent.txt").read_bytes() == b"the fox"

    def run_job(kind, **document):
        job = server.client.post("/jobs", {"kind": kind, "document": document})
        done = server.finish(job["id"])
        assert done["state"] == "done", done
        return done

    job = run_job("extract", **DOCUMENT, out="made/here")
    assert job["run"] == "made/here" and job["progress"]["done"] == run.manifest.n_blocks
    assert stored(f"{ROOT}/made/here") == contents(run.path)
    assert job["result"]["fingerprint"] == run.manifest.fingerprint
    assert "made/here" in [run["name"] for run in server.client.get("/runs")["runs"]]
    run_job("analyze", run="made/here", analyses=["sinks"])
    result, kept = load(f"{ROOT}/made/here", "sinks"), load(run, "sinks")
    for name in kept.data_vars:
        np.testing.assert_array_equal(result[name], kept[name])
    assert run_job("verify", run="made/here")["result"]["n_problems"] == 0
    ablated = run_job(
        "ablate", run="made/here", target="resid[1] position=first", scales="0,1", max_sequences=2
    )
    assert list(ablated["result"]["results"]) == ["ablate"]
    assert server.client.get("/runs/made/here/about")["analyses"] == [
        "ablate",
        "false_sinks",
        "sinks",
    ]
    repaired = run_job("verify", run="two", quick=True, repair=True)
    assert repaired["result"]["uncommitted"] == [1]
    assert run_job("extract", out="two")["result"]["n_blocks"] == run.manifest.n_blocks
    assert stored(f"{ROOT}/two") == contents(run.path)
    assert SECRET not in json.dumps(server.client.get("/jobs"))


def test_what_cannot_be_served_is_said(store, server, tmp_path, cli):
    cli("serve", "s3://nowhere/runs", "--state", tmp_path / "s").error(
        1, "s3://nowhere/runs: there is no such bucket"
    )
    cli("serve", "s3://", "--state", tmp_path / "s").error(2, "s3:// names no bucket")
    cli("serve", tmp_path, "--state", tmp_path / "s").error(2, "keeps its own queue")
    cli("serve", ROOT, "--state", server.flags[1]).error(2, f"{ROOT} is served already")
    assert not (tmp_path / "s").exists()
    with Server(ROOT, "--state", str(tmp_path / "t" / "u")) as other:
        assert len(other.client.get("/runs")["runs"]) >= 2
        said = other.stop()
    assert f"serving {ROOT} at " in said and SECRET not in said and "AKIATEST" not in said
