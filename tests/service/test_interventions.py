"""Interventions as jobs of a real server, on the packaged model: what they find is kept, served and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import headwater
from headwater.analysis.engine.results import load
from headwater.benchmarks.lib.serving import Server
from headwater.service.jobs.pool import WorkerProcess
from headwater.store.files import json_sum

TEXT = "def add(first, second):\n    return first + second\n" * 8
PLATEAUS = {"plateau", "plateau_parts", "plateau_heads", "plateau_jacobian"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("intervened")
    (root / "source.py").write_text(TEXT)
    config = headwater.RunConfig(
        out=str(root / "run"),
        text=(str(root / "source.py"),),
        sites=("resid",),
        seq_len=16,
        max_sequences=2,
        threads=1,
    )
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
        assert (
            shown["attributes"]["model_digest"]
            == headwater.open_run(server.root / "run").manifest.model["digest"]
        )
        assert shown["variables"]
    return found


def values(server, analysis, name):
    """Return a variable of a result as the page gets it."""
    return np.array(
        server.client.get(f"/runs/run/results/{analysis}")["variables"][name]["values"], float
    )


def test_plateau(server, root):
    pairs = {"a": "def add", "b": "return first", "label": "add"}, {"a": [1, 2], "b": [3]}
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    found = run_job(
        server,
        "plateau",
        pairs="pairs.jsonl",
        steps=7,
        depths="0,1",
        parts=True,
        heads=True,
        jacobian=1,
        paths="linear,random",
    )
    assert found.keys() == PLATEAUS
    kept = load(root / "run", "plateau")
    assert (
        kept.pair.values[0] == "add"
        and kept.sizes["step"] == 7
        and kept.depth.values.tolist() == [0, 1]
    )
    np.testing.assert_array_equal(values(server, "plateau", "width"), kept.width)
    np.testing.assert_allclose(
        found["plateau"]["width at the logits, linear"],
        kept.width.sel(path="linear", output=-1).mean("pair"),
        1e-3,
    )


def test_patch(server, root):
    case = {"clean": [9, 2, 3], "corrupt": [9, 5, 3], "answer": 7, "wrong": 8}
    (root / "cases.jsonl").write_text(json.dumps(case) + "\n")
    found = run_job(
        server,
        "patch",
        pairs="cases.jsonl",
        sites="resid,z",
        by_head=True,
        edits=["mlp_out[0] scale=0.5"],
    )
    assert list(found) == ["patch"]
    resid = values(server, "patch", "resid")
    np.testing.assert_array_equal(resid, load(root / "run", "patch").resid)
    np.testing.assert_allclose(
        resid[0, -1, -1], 1, 1e-4
    )  # all of the clean state, right before the logits


def test_ablate(server, root):
    found = run_job(
        server,
        "ablate",
        target="resid[1] position=first dim=3",
        scales="0,1,2",
        max_sequences=2,
        effects=True,
        repeated=["5", "6+7"],
        lengths="4,8",
    )
    assert found.keys() == {"ablate", "effects", "repeated"}
    kept = load(root / "run", "ablate")
    np.testing.assert_array_equal(values(server, "ablate", "loss"), kept.loss)
    np.testing.assert_allclose(kept.loss[0, 1], kept.loss_unchanged, 1e-6)
    np.testing.assert_allclose(kept.dloss, kept.dloss_check, 1e-4, 1e-6)


@pytest.mark.parametrize(
    ("kind", "document", "part"),
    [
        ("ablate", {"target": "z[0]", "sclaes": "1"}, "did you mean 'scales'"),
        ("plateau", {"a": "def", "b": "return", "steps": 2}, "--steps has 2"),
        ("plateau", {"a": "def", "b": "return", "depths": "0 --edit=x"}, "--depths is"),
        ("plateau", {"a": "def"}, "--a together with --b"),
        ("patch", {}, "--pairs is missing"),
        ("patch", {"pairs": "run", "help": True}, "'help' is no setting of patch"),
        ("patch", {"pairs": "run", "edit": "resid call=os:getcwd"}, "'edit' is no setting"),
        (
            "patch",
            {"pairs": "run", "edits": [{"site": "z", "op": "call", "value": "a:b"}]},
            "no code",
        ),
        ("ablate", {"target": "z[99]"}, "z[99]"),
        ("ablate", {"target": "resid 'position=0 call=os:getcwd\\' zero"}, "positions is"),
        ("ablate", {"target": "z[0]", "scales": [0, None]}, "--scales is None"),
        ("ablate", {"target": "z[0]", "hold": "yes"}, "--hold is 'yes'"),
        ("ablate", {"target": "z[0]", "tokens": "run", "text": "run"}, "one of --run"),
    ],
)
def test_what_is_wrong_with_an_intervention_is_said_before_it_waits(server, kind, document, part):
    with pytest.raises(ValueError) as refusal:
        submit(server, kind, **document)
    assert part in str(refusal.value)


def test_a_foreign_run_is_no_code_for_jobs(server, root, tmp_path):
    """Its manifest names a function, or a path outside of the root; both are refused when it is to go on."""
    for name, edit in (
        ("calling", "resid[1] call=os:getcwd"),
        ("reading", "resid[1] set=/etc/passwd"),
    ):
        shutil.copytree(root / "run", root / name)
        path = root / name / "headwater" / "manifest.json"
        raw = json.loads(path.read_bytes())
        raw.pop("crc32c")
        raw["config"]["edits"] = [{"edit": edit, "digest": ""}]
        path.write_text(json.dumps(raw | {"crc32c": json_sum(raw)}))
        for extra in ({}, {"model": "demo"}, {"device": "cpu"}, {"allow_call": ["os:getcwd"]}):
            with pytest.raises(ValueError, match=r"no code|is not under"):
                server.client.post("/plan", {"kind": "extract", "document": {"out": name} | extra})
        shutil.rmtree(root / name)


def test_an_analysis_reads_the_model_of_a_run_only_where_jobs_may(server, root):
    shutil.copytree(root / "run", root / "elsewhere")
    path = root / "elsewhere" / "headwater" / "manifest.json"
    raw = json.loads(path.read_bytes())
    raw.pop("crc32c")
    raw["model"]["name"] = str(Path(headwater.__file__).parent / "extractor" / "demo")
    path.write_text(json.dumps(raw | {"crc32c": json_sum(raw)}))
    document = {"run": "elsewhere", "analyses": ["lens"]}
    with pytest.raises(ValueError, match="does not lie in a folder from which models"):
        server.client.post("/plan", {"kind": "analyze", "document": document})
    document["options"] = {"model": "demo"}
    assert server.client.post("/plan", {"kind": "analyze", "document": document})["price"]
    shutil.rmtree(root / "elsewhere")


def test_the_worker_calls_nothing_whatever_it_is_sent(tmp_path, tiny_gpt2, tiny_text):
    """The last door: a document that passed every check by mistake, sent to a worker itself."""
    worker = WorkerProcess(tmp_path, [tiny_gpt2])
    try:
        document = {"out": str(tmp_path / "o"), "model": str(tiny_gpt2), "text": [str(tiny_text)]}
        document["edits"] = [{"site": "resid", "op": "call", "value": "os:getcwd"}]
        request = {"do": "plan", "id": 0, "kind": "extract", "document": document}
        outcome = worker.call(request, lambda _: None, 60)
        assert outcome.kind == "refused" and "the server runs no code" in outcome.value
    finally:
        worker.close()
