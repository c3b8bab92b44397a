"""Faults of a cluster, provoked on a real one of several raylets: whatever dies, the bytes are those of one process."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import headwater
from headwater.benchmarks.breaking.faults import contents
from headwater.extractor.cluster import in_flight as seats
from headwater.extractor.cluster.ray import WorkersLost
from headwater.extractor.run import extract
from headwater.store.verify import verify

SMALL = {"include_dashboard": False, "object_store_memory": 80 << 20}
PATIENT = {
    "health_check_timeout_ms": 300_000,
    "health_check_period_ms": 1000,
}  # slow is not dead; refusing is
START_SECONDS = 300


@pytest.fixture(scope="module")
def cluster():
    """A head without processors, for nodes of one processor to join."""
    with pytest.MonkeyPatch.context() as patch:
        node = tempfile.mkdtemp(prefix="hw-node-", dir="/tmp")  # short: a socket has 107 bytes
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": node,
        }.items():
            patch.setenv(name, value)
        cluster_utils = pytest.importorskip("ray.cluster_utils")
        handler = signal.getsignal(signal.SIGTERM)
        made = cluster_utils.Cluster(
            True, head_node_args={"num_cpus": 0, "_system_config": PATIENT, **SMALL}
        )
        yield made
        made.shutdown()
        shutil.rmtree(node, ignore_errors=True)
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def nodes(cluster):
    """Add nodes with one processor each; they leave after the test, and the cluster knows it before the next one."""
    added = []

    def add():
        added.append(cluster.add_node(num_cpus=1, **SMALL))
        return added[-1]

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)
    cluster.wait_for_nodes(START_SECONDS)


def nothing_left(run):
    """Whether the pool took its nonce and its weights away."""
    return not [
        name
        for name in os.listdir(Path(run) / "headwater/tmp")
        if name.startswith(("seen-", "weights-"))
    ]


def test_a_worker_killed_within_a_block_is_replaced(cluster, nodes, many_blocks, tmp_path):
    nodes()
    config, expected = many_blocks
    config, seen, killed = (
        replace(config, out=str(tmp_path / "run"), ray=cluster.address),
        set(),
        [],
    )

    def kill_once(progress):
        seen.add(progress.workers)
        if progress.entry is None or killed:
            return
        pid, end = int(progress.entry.worker.rpartition(":")[2]), time.monotonic() + 1
        while not killed and time.monotonic() < end:
            os.kill(pid, signal.SIGSTOP)
            if list(
                (tmp_path / "run/headwater/tmp").glob(f"*.{pid}-*")
            ):  # shards of a block that is under way
                os.kill(pid, signal.SIGKILL)
                killed.append(progress.entry.worker)
            else:
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.002)

    run = extract(config, kill_once)
    workers = {entry.worker for entry in run.ledger.entries()}
    assert killed[0] in workers and len(workers) == 2
    assert contents(run.path) == expected and not verify(run).problems and nothing_left(run.path)
    assert any("1 lost, 1 tried again" in text for text in seen), seen


def test_nodes_come_and_go(cluster, nodes, many_blocks, tmp_path, monkeypatch):
    import ray

    first, pools, fill = nodes(), [], seats.Seats.fill
    config, expected = many_blocks
    config, joined, lost = (
        replace(config, out=str(tmp_path / "run"), workers=2, ray=cluster.address),
        [],
        [],
    )
    monkeypatch.setattr(seats.Seats, "fill", lambda self: (pools.append(self), fill(self)))

    def change_nodes(progress):
        if progress.entry is None:
            return
        if not joined:
            joined.append(progress.entry.worker)
            nodes()
            waiting = [seat.starting for seat in pools[0]._seats if seat.starting is not None]
            assert ray.wait(waiting, timeout=START_SECONDS)[
                0
            ]  # while the first worker has two blocks at most
        elif progress.entry.worker != joined[0] and not lost:
            lost.append(first)
            cluster.remove_node(first, allow_graceful=False)

    run = extract(config, change_nodes)
    assert lost and len({entry.worker for entry in run.ledger.entries()}) >= 2
    assert contents(run.path) == expected and not verify(run).problems and nothing_left(run.path)


def test_a_poison_block_fails_three_times_and_the_others_finish(
    cluster, nodes, cli, tiny_gpt2, tmp_path
):
    nodes(), nodes()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_gpt2 / "config.json").read_bytes())
    tensors = load_file(tiny_gpt2 / "model.safetensors")
    tensors["wte.weight"][250, ::2] = 1e6  # more than float16 holds
    save_file(tensors, model / "model.safetensors")
    ids = np.random.default_rng(0).integers(0, 200, (12, 32)).astype(np.int32)
    ids[5, 9] = 250
    np.save(tmp_path / "ids.npy", ids)
    flags = [
        "extract",
        "--model",
        model,
        "--tokens",
        tmp_path / "ids.npy",
        "--sites",
        "resid,pattern",
        "--block",
        2,
        "--threads",
        1,
    ]
    on_ray = [*flags, "--out", tmp_path / "run", "--ray", cluster.address, "--workers", 2]
    for _ in range(2):
        cli(*on_ray).error(
            1, "1 of 6 blocks failed 3 times", "block 2 (sequences 4 to 5)", "resid", "float16"
        )
    run = headwater.open_run(tmp_path / "run")
    assert (
        set(run.ledger.committed()) == {0, 1, 3, 4, 5}
        and not verify(run).problems
        and nothing_left(run.path)
    )
    assert cli(*flags, "--out", tmp_path / "kept", "--on-overflow", "keep").code == 0
    here, there = contents(run.path), contents(tmp_path / "kept")
    missing = there.keys() - here.keys()
    assert "complete/c/2" in missing and not here.keys() - there.keys()
    assert all(data == there[name] for name, data in here.items() if not name.endswith("zarr.json"))


def test_a_node_that_does_not_see_the_run_is_refused(
    cluster, nodes, many_blocks, tmp_path, monkeypatch
):
    nodes()
    config = replace(many_blocks[0], out=str(tmp_path / "run"), ray=cluster.address)
    monkeypatch.setattr(seats, "MAX_REFUSALS", 0)
    monkeypatch.setattr(
        Path, "touch", lambda path: None
    )  # what a node without the run's file system sees
    with pytest.raises(
        WorkersLost,
        match=r"no worker could start: .*does not see the run at .*Put --out on storage",
    ):
        extract(config)
    assert (
        nothing_left(tmp_path / "run") and not headwater.open_run(tmp_path / "run").complete.any()
    )


def test_no_cluster_at_the_address(cli, many_blocks, tmp_path):
    config, _ = many_blocks
    flags = [
        "--model",
        config.model,
        "--tokens",
        config.tokens,
        "--out",
        tmp_path / "run",
        "--sites",
        "loss",
    ]
    cli("extract", *flags, "--ray", "127.0.0.1:9").error(
        1, "--ray 127.0.0.1:9: no Ray cluster can be joined there"
    )
    assert nothing_left(tmp_path / "run")
