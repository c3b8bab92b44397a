"""The comparison with peers at its smallest: checked values, one timed round, real kills. Peers that need environments
of their own are outside the suite; transformers, which the tests have, stands for them."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from headwater.benchmarks.lib import limits
from headwater.benchmarks.peers import (
    bench_peers,
    bench_survive,
    environments,
    peer_inputs,
    survive,
    truth,
)
from headwater.benchmarks.peers.drivers import serve
from headwater.benchmarks.storage import bench_store

HERE = [peer for peer in environments.PEERS if not peer.packages]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


LIAR = """
import time
import numpy as np

def load(model):
    return None

def residual(model, tokens, out, batch):
    ids = np.load(tokens)
    kept = np.lib.format.open_memmap(out + "/x.npy", "w+", np.float32, (*ids.shape, 128))
    for row, values in zip(ids, kept):
        values[:] = row[:, None] + 1
        time.sleep(0.01)

def read(out, site, layer, sequence, position, batch):
    return np.load(out + "/x.npy", mmap_mode="r")[sequence, position]
"""


@pytest.fixture
def liar(tmp_path):
    """A peer whose values are wrong, and whose file is whole from the start, with zeros where nothing was captured."""
    (tmp_path / "liar.py").write_text(LIAR)
    return environments.Peer("liar", str(tmp_path / "liar.py"), "np.memmap")


def test_every_workload_is_checked_and_timed(cache, tmp_path, liar, monkeypatch):
    monkeypatch.setattr(bench_peers, "limits", lambda folder: limits.limits(folder, 8, 1))
    works = {
        name: peer_inputs.Workload(w.function, w.sites, 64, 2)
        for name, w in peer_inputs.WORKLOADS.items()
    }
    absent = environments.Peer("absent", "use_nnsight.py", "nothing", ("no-such-package",))
    monkeypatch.setattr(bench_peers, "version_of", lambda peer, python: "1")
    tables = list(
        bench_peers.iter_tables(
            works, "tiny", (1, 1), cache, tmp_path, [*HERE, liar, absent], keep=True
        )
    )
    assert [name for name, _ in tables] == ["peers"] * len(works) + ["limits"]
    rows, found = [row for name, part in tables if name == "peers" for row in part], tables[-1][1]
    for row in rows:
        if row["case"] == "liar":
            assert (
                "values are wrong" if row["workload"] in ("residual", "short") else "not capture"
            ) in row["problem"]
        elif row["case"] == "absent":
            assert "--prepare" in row["problem"]
        else:
            assert not row["problem"] and row["x_plain"] > 0 and row["tokens_per_second"] > 0, row
            if row["case"] != "plain":
                assert row["values_checked"] > 0 and row["read_ms"] > 0 and row["MB_on_disk"] > 0
                assert 1 < row["lines"] < 60
        assert row["x_plain"] == "" or not row["problem"]
    assert len(rows) == 5 * len(works)
    assert {limit["unit"] for limit in found} == {"MB/s", "GFLOP/s"} and all(
        limit["rate"] > 0 for limit in found
    )


def test_truth_finds_what_is_wrong(cache):
    model, ids = peer_inputs.prepare_model("tiny", cache), cache / "few.npy"
    np.save(ids, np.arange(24, dtype=np.int32).reshape(2, 12))
    known = truth.Truth.of(model, ids, cache / "few.npz", 4)
    for site in ("resid", "pattern", *truth.STATISTICS):
        for place in known.places((site,), 6):
            at = list(known.positions[place[2]]).index(place[3])
            right = known.expected(*place[:3], at)
            assert known.problem(place, right) is None
            wrong = (right + 1) % 12 if site == "attn_argmax" and place[3] else right + 0.01
            if site != "attn_argmax" or place[3]:
                assert known.problem(place, wrong) is not None, place
    assert known.places(("resid",), 99) == known.places(("resid",), 99)


def test_killed_captures_are_read_back_and_run_again(cache, tmp_path, liar):
    work = bench_survive.make_work("tiny", 128, 128, 1, cache, tmp_path)
    (ours,) = survive.survive([environments.HEADWATER], work, cache, tmp_path)
    assert not ours["problem"] and ours["silently_wrong"] == 0 and ours["rerun"] == "right"
    assert ours["right"] + ours["missing"] == 128
    (theirs,) = survive.survive([liar], work, cache, tmp_path)
    assert theirs["silently_wrong"] > 0 and theirs["missing"] == 0


def test_every_driver_has_what_serve_asks_for_and_lines_are_counted():
    for peer in (environments.PLAIN, *environments.PEERS):
        source = (environments.DRIVERS / peer.driver).read_text("utf-8")
        names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert {"load", "plain"} <= names or {"load", "read", "residual"} <= names
    source = '"""Doc."""\nimport numpy as np\nN, M = 1, 2\n\ndef load(x):\n    """Doc."""\n    return x\n\n\n'
    source += "def a(m):\n    return help(m)\n\n\ndef help(m):\n    return np.sum(m)\n\n\ndef unused(m):\n    pass\n"
    assert serve.lines_of_code(source, "a") == 7
    assert serve.lines_of_code(source, "load") == 3


def test_every_store_gives_back_what_was_written(tmp_path):
    rows = bench_store.run(4, 1, tmp_path, d_model=64)
    assert [row["case"] for row in rows] == [store.name for store in bench_store.STORES]
    assert all(
        not row["problem"] and row["write_MB_per_second"] > 0 and row["vector_ms"] > 0
        for row in rows
    )
    assert not [path for path in Path(tmp_path).rglob("*.npy")]
