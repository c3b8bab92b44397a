"""What a worker does alone, without Ray: names nobody else has, bytes of one kind of processor, and a stop in time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

import headwater
from headwater.benchmarks.breaking import faults
from headwater.extractor import budget
from headwater.extractor import pool as pools
from headwater.extractor import run as driver
from headwater.extractor.block import Worker
from headwater.extractor.cluster.in_flight import Outcome, Seat, Seats
from headwater.extractor.cluster.pool import DEATHS_IN_A_ROW, BlocksFailed, RayPool
from headwater.extractor.cluster.ray import WorkersLost
from headwater.extractor.model.forward_device import load_model
from headwater.extractor.model.weights import load_checkpoint
from headwater.extractor.sites import RequestError
from headwater.store.files import json_sum
from headwater.store.ledger import Entry, Ledger
from headwater.store.manifest import read_manifest
from headwater.store.objects import ObjectPath
from headwater.store.place import place_of
from headwater.store.segments import table_of
from headwater.store.verify import verify

# A worker on a node of another processor, as torch is told to take it: refused, then accepted.
OTHER_PROCESSOR = """
import json, sys
from headwater.extractor.cluster.actor import BlockActor
from headwater.extractor.request import make_config
from headwater.extractor.cluster.weights import published
from headwater.extractor.model.weights import load_checkpoint
from headwater.store.manifest import RunError
from headwater.store.place import place_of
config = json.loads(sys.argv[1])
run, checkpoint = place_of(config["out"]), load_checkpoint(config["model"])
(run / "headwater/tmp/nonce").touch()
def start(**changes):
    with published(run, checkpoint, True) as weights:
        return BlockActor(str(run), config | changes, checkpoint.digest, weights, "nonce", 1, True)
try:
    start()
except RunError as error:
    print(error)
print(start(other_processor=True).work(2, 1)["made_by"]["processor"])
"""


class Stop(Exception):
    """Ends an extraction."""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A request of three blocks, and the bytes that its run has."""
    config = faults.make_case(tmp_path_factory.mktemp("case"))
    return config, faults.contents(headwater.extract(config).path)


@pytest.fixture
def begun(case, tmp_path):
    """The request of a run whose first block is committed."""
    config = replace(case[0], out=str(tmp_path / "run"))

    def stop(progress):
        if progress.entry is not None:
            raise Stop

    with pytest.raises(Stop):
        headwater.extract(config, stop)
    return config


def test_an_orphan_of_the_same_pid_cannot_commit_what_another_writes(begun, case, monkeypatch):
    """Two containers share a run and a process id; the first one's driver is dead, it itself is not."""
    run = driver.place_of(begun.out)
    manifest, checkpoint = read_manifest(run), load_checkpoint(begun.model)
    model = load_model(checkpoint, begun.compute, begun.device)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    plan = driver.plan_of(begun, checkpoint.config, manifest)
    orphan, worker = Worker(run, manifest, plan, model), Worker(run, manifest, plan, model)
    finish_orphan, finish = orphan.writer.finish, worker.writer.finish
    made = []

    def finish_late():
        place_of(run).clear_temporary()  # by the next driver, which holds the lock
        made.append(worker.extract_block(1, 1))
        return finish_orphan()

    def finish_after_the_orphan():
        with pytest.raises(FileNotFoundError):
            finish_orphan()
        return finish()

    orphan.writer.finish, worker.writer.finish = finish_late, finish_after_the_orphan
    with pytest.raises(FileNotFoundError):
        orphan.extract_block(1, 1)
    assert Ledger(run, manifest.fingerprint).commit(made[0])
    orphan.close(), worker.close()
    assert not verify(headwater.open_run(run)).problems
    assert faults.contents(headwater.extract(begun).path) == case[1]


def test_a_worker_of_another_processor_is_refused_or_named(begun, cli):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    request = json.dumps(asdict(begun) | {"edits": []})
    command = [sys.executable, "-c", OTHER_PROCESSOR, request]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusal, other = done.stdout.splitlines()
    assert "was made with processor" in refusal and "--other-processor" in refusal
    assert f"node {os.uname().nodename} is {other}" in refusal
    run = headwater.extract(begun)
    assert {e.block: e.made_by["processor"] == other for e in run.ledger.entries()} == {
        0: False,
        1: False,
        2: True,
    }
    said = f"mixed    block 2 made with processor {other}: last bits may differ"
    assert said in cli("info", begun.out).out.splitlines()
    checked = cli("verify", begun.out)
    assert said in checked.out.splitlines() and checked.code == 0
    for command in ("info", "verify"):
        mixed = json.loads(cli(command, begun.out, "--json").out)["mixed"]
        assert mixed == [{"made_by": {"processor": other}, "blocks": [2]}]


def test_entries_say_what_made_them_in_files_and_in_segments(tmp_path):
    old = {"processor": "a", "torch": "1", "headwater": "0"}
    ledger = Ledger(tmp_path, "f")
    for block in range(6):
        made_by = {} if block == 5 else old | {"products": "torch", "processor": "ab"[block // 3]}
        ledger.commit(Entry(block, 1, "f", block, block + 1, 1, {}, made_by=made_by))
    expected = {(("processor", "b"),): [3, 4]}
    assert ledger.mixed(old) == expected
    entries = list(ledger.entries())
    assert ledger.compact(1) == 6
    assert ledger.mixed(old) == expected and list(Ledger(tmp_path, "f").entries()) == entries


def test_entries_of_other_versions_are_read(tmp_path):
    ledger = Ledger(tmp_path, "f")
    ledger.commit(Entry(0, 1, "f", 0, 1, 1, {}))
    path = ledger.folder / "00000000.1.json"
    raw = json.loads(path.read_bytes())
    for changes in ({"made_by": None}, {"of_the_future": [1]}):
        body = {k: v for k, v in (raw | changes).items() if v is not None and k != "crc32c"}
        path.write_text(json.dumps(body | {"crc32c": json_sum(body)}))
        assert next(ledger.entries()) == Entry(0, 1, "f", 0, 1, 1, {})
    path.unlink()
    old = table_of([(Entry(1, 1, "f", 1, 2, 1, {}), False)]).drop_columns(["made_by"])
    ledger._segments.add(old)
    assert list(ledger.entries()) == [Entry(1, 1, "f", 1, 2, 1, {})] and not ledger.mixed({})


def make_pool(config):
    """A pool whose actors are never started."""
    run = driver.place_of(config.out)
    return RayPool(config, run, read_manifest(run), load_checkpoint(config.model))


def test_a_run_whose_workers_all_die_stops_with_the_reason(begun):
    pool, waiting = make_pool(begun), deque()
    with pytest.raises(BlocksFailed, match=f"{DEATHS_IN_A_ROW} workers in a row died") as caught:
        for n in range(99):
            lost = Outcome((1 + n % 2,), f"node:{n}", lost="no memory" + "!" * 10_000)
            list(pool._recover(lost, waiting))
    assert "its worker node:9 died (no memory" in str(caught.value)
    assert "what was committed before is kept" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_message_lists_a_few_of_many_blocks(begun, monkeypatch):
    pool = make_pool(begun)
    pool._seats = SimpleNamespace(busy=False, close=lambda: None)
    monkeypatch.setattr(pool, "_reasons", dict.fromkeys(range(1000), "no"))
    with pytest.raises(BlocksFailed, match=r"block 0 .*; and 992 more$") as caught:
        list(pool.run([]))
    assert len(str(caught.value)) < 1000


def test_a_full_temporary_directory_costs_a_worker_not_the_run(begun):
    pool, waiting = make_pool(begun), deque([5])
    killed, full = [], OSError(errno.ENOSPC, "No space left on device")
    pool._seats = Seats(SimpleNamespace(ray=SimpleNamespace(kill=killed.append)), 2, None)
    pool._seats._seats = [
        Seat("first", None, time.monotonic(), "a:1", deque([("r", 2)])),
        Seat("second", None, time.monotonic(), "b:2"),
    ]
    with pytest.raises(OSError, match="No space left"):  # the disk of the run is everybody's
        list(pool._settle(Outcome((1,), "a:1", cause=full), waiting))
    pool._run = ObjectPath("s3://bucket/run")
    assert not list(pool._settle(Outcome((1,), "a:1", cause=full), waiting))
    assert list(waiting) == [1, 2, 5] and killed == ["first"] and not pool._reasons
    list(pool._settle(Outcome((3,), "b:2", cause=full), waiting))
    with pytest.raises(WorkersLost, match=r"no worker is left: the temporary directory of b:2 is"):
        pool._seats.welcome()


def test_memory_is_asked_for_once_and_on_a_cluster_not_of_the_driver(case, tmp_path, monkeypatch):
    config = replace(case[0], out=str(tmp_path / "run"), workers=6)
    needed = driver.plan_run(config).host_bytes
    monkeypatch.setattr(budget, "available_memory", lambda: needed)
    monkeypatch.setattr(driver, "open_pool", lambda *of, notify=None: pools._in_process(*of[:4]))
    assert headwater.extract(config).complete.all()
    monkeypatch.setattr(budget, "available_memory", lambda: 1)
    on_cluster = replace(config, out=str(tmp_path / "ray"), ray="auto")
    assert headwater.extract(on_cluster).complete.all()
    with pytest.raises(RequestError, match="of memory, but"):
        headwater.extract(replace(config, out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
