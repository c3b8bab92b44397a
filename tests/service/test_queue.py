"""What must not block the queue: a full disk, a damaged run, a damaged ledger entry, a worker that cannot start."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import headwater
from headwater.benchmarks.lib.serving import Server
from headwater.service.jobs.table import JobQueue


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_gpt2):
    root = tmp_path_factory.mktemp("queued")
    shutil.copytree(tiny_gpt2, root / "tiny")
    ids = np.random.default_rng(5).integers(0, 200, (4000, 32)).astype(np.int32)
    np.save(root / "long.npy", ids)
    np.save(root / "ids.npy", ids[:4])
    headwater.extract(
        headwater.RunConfig(
            out=str(root / "run"), model=str(root / "tiny"), tokens=str(root / "ids.npy"), block=1
        )
    )
    return root


@pytest.fixture(scope="module")
def server(root):
    with Server(root) as server:
        yield server


def submit(server, kind="extract", **document):
    return server.client.post("/jobs", {"kind": kind, "document": document})


def begin_long(server, out):
    """Queue a job that does not end by itself; return its number when it is computing."""
    job = submit(server, out=out, model="tiny", tokens="long.npy", block=1, threads=1)
    server.wait_for(job["id"], lambda job: job["progress"].get("done", 0) > 0)
    return job["id"]


def damage(path: Path):
    path.write_bytes(path.read_bytes().replace(b'"block"', b'"bl0ck"'))


def seconds_used(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_damaged_run_fails_its_job_and_the_next_one_runs(server, root):
    shutil.copytree(root / "run", root / "broken")
    (root / "broken" / "headwater" / "ledger" / "00000001.1.json").unlink()
    long = begin_long(server, "long")
    broken, good = submit(server, out="broken"), submit(server, "verify", run="run")
    damage(root / "broken" / "headwater" / "manifest.json")
    server.client.post(f"/jobs/{long}/cancel")
    ended = [server.finish(job["id"]) for job in (broken, good)]
    assert [job["state"] for job in ended] == ["failed", "done"]
    assert "manifest.json cannot be read" in ended[0]["error"]


def test_a_damaged_ledger_entry_is_repaired_by_a_job(server, root, cli):
    shutil.copytree(root / "run", root / "entry")
    damage(root / "entry" / "headwater" / "ledger" / "00000002.1.json")
    status = cli("status", root / "entry")
    assert status.code == 1 and "3 of 4 blocks" in status.out
    assert "damaged  headwater/ledger/00000002.1.json" in status.out
    found = server.finish(submit(server, "verify", run="entry", repair=True)["id"])
    assert found["result"]["uncommitted"] == [2], found
    assert server.finish(submit(server, out="entry")["id"])["state"] == "done"
    assert cli("status", root / "entry").code == 0


def test_a_full_disk_blocks_no_job_and_loses_no_end(tmp_path, root):
    """A limit on the size of files stands for the disk: no write of the server succeeds while it holds."""
    flags = ("--models", str(root), "--texts", str(root))
    with Server(tmp_path, *flags) as server:
        long = begin_long(server, "long")
        waiting = submit(server, out="next", model="tiny", tokens="ids.npy")["id"]
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, hard_limit(server.pid)))
        server.client.post(f"/jobs/{long}/cancel")
        assert server.finish(long)["state"] == "cancelled"
        server.finish(waiting)
        before = seconds_used(server.pid)
        assert server.fetch("/health")[0] == 200
        with pytest.raises(ValueError, match="queue of jobs cannot be used"):
            submit(server, "verify", run="long")
        time.sleep(1)
        assert seconds_used(server.pid) - before < 0.8
        listed = {job["id"]: job["state"] for job in server.client.get("/jobs")["jobs"]}
        assert listed[long] == "cancelled" and listed[waiting] in ("done", "failed")
        assert server.client.get("/jobs?state=running")["jobs"] == []
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert server.finish(submit(server, "verify", run="long")["id"])["state"] == "done"
        server.kill()
    queue = JobQueue(tmp_path / ".headwater" / "jobs.sqlite")
    assert queue.get(long).state == "cancelled" and queue.recover() == 0
    queue.close()


def hard_limit(pid):
    return resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]


def test_what_no_browser_reads_is_null(tmp_path):
    queue = JobQueue(tmp_path / "jobs.sqlite")
    job, _ = queue.add("verify", {}, "run", {"host_bytes": 0})
    queue.start(job.id)
    ended = queue.end(job.id, "done", {"value": float("nan"), "more": [float("inf")]})
    assert json.loads(json.dumps(ended.result)) == {"value": None, "more": [None]}
    queue.close()
