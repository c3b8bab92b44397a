"""Interventions as jobs of a real server, on the packaged model: what they find is kept, served and named."""

from __future__ import annotations

import json

import numpy as np
import pytest

import headwater
from headwater.analysis.results import load
from headwater.benchmarks.serving import Server

TEXT = "def add(first, second):\n    return first + second\n" * 8
PLATEAUS = {"plateau", "plateau_parts", "plateau_heads", "plateau_jacobian"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("intervened")
    (root / "source.py").write_text(TEXT)
    config = headwater.RunConfig(out=str(root / "run"), text=(str(root / "source.py"),), sites=("resid",), seq_len=16,
                                 max_sequences=2, threads=1)  # fmt: skip
    headwater.extract(config)
    return root


@pytest.fixture(scope="module")
def server(root):
    with Server(root) as server:
        yield server


def submit(server, kind, **document):
    return server.client.post("/jobs", {"kind": kind, "document": {"run": "run"} | document})


def run_job(server, kind, **document):
    """Run a job to its end; return what it found, which is served under the same names as results of the run."""
    job = server.finish(submit(server, kind, **document)["id"])
    assert job["state"] == "done" and job["price"]["host_bytes"] > 0, job
    found = job["result"]["results"]
    assert found.keys() <= set(server.client.get("/runs/run/about")["analyses"])
    for name in found:
        shown = server.client.get(f"/runs/run/results/{name}")
        assert shown["attributes"]["model_digest"] == headwater.open_run(server.root / "run").manifest.model["digest"]
        assert shown["variables"]
    return found


def values(server, analysis, name):
    """Return a variable of a result as the page gets it."""
    return np.array(server.client.get(f"/runs/run/results/{analysis}")["variables"][name]["values"], float)


def test_plateau(server, root):
    pairs = {"a": "def add", "b": "return first", "label": "add"}, {"a": [1, 2], "b": [3]}
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    found = run_job(server, "plateau", pairs="pairs.jsonl", steps=7, depths="0,1", parts=True, heads=True, jacobian=1,
                    paths="linear,random")  # fmt: skip
    assert found.keys() == PLATEAUS
    kept = load(root / "run", "plateau")
    assert kept.pair.values[0] == "add" and kept.sizes["step"] == 7 and kept.depth.values.tolist() == [0, 1]
    np.testing.assert_array_equal(values(server, "plateau", "width"), kept.width)
    np.testing.assert_allclose(found["plateau"]["width at the logits, linear"],
                               kept.width.sel(path="linear", output=-1).mean("pair"), 1e-3)  # fmt: skip


def test_patch(server, root):
    case = {"clean": [9, 2, 3], "corrupt": [9, 5, 3], "answer": 7, "wrong": 8}
    (root / "cases.jsonl").write_text(json.dumps(case) + "\n")
    found = run_job(server, "patch", pairs="cases.jsonl", sites="resid,z", by_head=True, edits=["mlp_out[0] scale=0.5"])
    assert list(found) == ["patch"]
    resid = values(server, "patch", "resid")
    np.testing.assert_array_equal(resid, load(root / "run", "patch").resid)
    np.testing.assert_allclose(resid[0, -1, -1], 1, 1e-4)  # all of the clean state, right before the logits


def test_ablate(server, root):
    found = run_job(server, "ablate", target="resid[1] position=first dim=3", scales="0,1,2", max_sequences=2,
                    effects=True, repeated=["5", "6+7"], lengths="4,8")  # fmt: skip
    assert found.keys() == {"ablate", "effects", "repeated"}
    kept = load(root / "run", "ablate")
    np.testing.assert_array_equal(values(server, "ablate", "loss"), kept.loss)
    np.testing.assert_allclose(kept.loss[0, 1], kept.loss_unchanged, 1e-6)
    np.testing.assert_allclose(kept.dloss, kept.dloss_check, 1e-4, 1e-6)


def test_what_is_wrong_with_an_intervention_is_said(server):
    with pytest.raises(ValueError, match="--sclaes"):
        submit(server, "ablate", target="z[0]", sclaes="1")
    for kind, document, part in (("plateau", {"a": "def", "b": "return", "steps": 2}, "--steps has '2'"),
                                 ("patch", {}, "--pairs is missing"), ("ablate", {"target": "z[99]"}, "z[99]")):
        job = server.finish(submit(server, kind, **document)["id"])
        assert job["state"] == "failed" and part in job["error"], job
