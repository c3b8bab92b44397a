"""Extractions of a server on a real Ray that runs beside it, `headwater serve --ray auto`: the bytes of one process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import headwater
from headwater.benchmarks.breaking.faults import contents
from headwater.benchmarks.lib.serving import Server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of one node; `auto` is the one that RAY_ADDRESS names."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(tmp_path_factory.mktemp("node")),
        }.items():
            patch.setenv(name, value)
        cluster_utils = pytest.importorskip("ray.cluster_utils")
        handler = signal.getsignal(signal.SIGTERM)
        node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}
        made = cluster_utils.Cluster(True, head_node_args=node)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()
        signal.signal(signal.SIGTERM, handler)


def test_a_job_computes_on_ray(cluster, many_blocks, tmp_path):
    config, expected = many_blocks
    ids = Path(config.tokens)
    flags = "--ray", "auto", "--models", config.model, "--texts", str(ids.parent)
    document = {
        "model": config.model,
        "tokens": config.tokens,
        "preset": "all",
        "block": 2,
        "threads": 1,
        "out": "run",
    }
    with Server(tmp_path, *flags) as server:
        done = server.finish(
            server.client.post("/jobs", {"kind": "extract", "document": document})["id"]
        )
        assert done["state"] == "done" and "worker" in done["progress"]["workers"], done
    run = headwater.open_run(tmp_path / "run")
    assert contents(run.path) == expected
