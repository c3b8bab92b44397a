"""One run has one driver: a second is refused with the first one's name, and a dead one is no hindrance."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

import headwater
from headwater.benchmarks.breaking import faults
from headwater.store.lock import LockedError, hold, probe
from headwater.store.verify import verify

HOLDER = "import sys; from pathlib import Path; from headwater.store.lock import hold\n"
HOLDER += "with hold(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_driver_learns_who_is_first(tmp_path, holder, cli):
    config = faults.make_case(tmp_path)
    with pytest.raises(LockedError) as caught:
        headwater.extract(config)
    assert f"is being written by process {holder.pid} on {socket.gethostname()} since 2" in str(
        caught.value
    )
    again = cli("extract", "--model", config.model, "--text", *config.text, "--out", config.out)
    again.error(1, f"process {holder.pid} on {socket.gethostname()}", "One run has one writer")
    assert not (tmp_path / "run/zarr.json").exists()
    holder.kill()
    holder.wait()
    headwater.extract(config)
    assert cli("verify", config.out).code == 0


def test_reading_needs_no_lock_but_repair_does(tmp_path, cli):
    run = headwater.extract(faults.make_case(tmp_path))
    (run.path / "loss/c/0/0").unlink()
    with hold(run.path):
        assert cli("status", run.path).code == cli("info", run.path).code == 0
        assert cli("verify", run.path).code == 1
        cli("verify", run.path, "--repair").error(1, f"written by process {os.getpid()}")
    assert sorted(run.ledger.committed()) == [0, 1, 2]


@pytest.mark.parametrize("text", [b"", b'{"pid": 1', b"[]", b"\xff"])
def test_a_holder_that_has_not_yet_signed(tmp_path, text):
    with hold(tmp_path):
        (tmp_path / "headwater/lock").write_bytes(text)
        with (
            pytest.raises(LockedError, match="is being written by another process"),
            hold(tmp_path),
        ):
            pass


def test_the_name_of_a_dead_holder_does_not_remain(tmp_path):
    (tmp_path / "headwater").mkdir()
    (tmp_path / "headwater/lock").write_text("x" * 1000)
    with (
        hold(tmp_path),
        pytest.raises(LockedError, match=f"process {os.getpid()} "),
        hold(tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "operation"),
    [("replace", "rename a file"), ("fsync", "fsync a directory"), ("link", "make a hard link")],
)
def test_a_file_system_that_cannot_keep_the_promise_is_refused(
    tmp_path, monkeypatch, name, operation
):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(
        OSError,
        match=rf"run cannot hold a run: .* refuses to {operation} \(Operation not permitted",
    ):
        probe(tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run/headwater/tmp").iterdir())
    (tmp_path / "run/headwater/tmp" / f"probe-{os.getpid()}-2").write_text("of a process that died")
    probe(tmp_path / "run")
    assert not list((tmp_path / "run/headwater/tmp").iterdir())


def test_many_drivers_at_once_make_one_run(tmp_path):
    config = faults.make_case(tmp_path)
    command = [
        sys.executable,
        "-m",
        "headwater",
        "extract",
        "--model",
        config.model,
        "--text",
        *config.text,
        "--out",
        config.out,
        "--preset",
        "all",
        "--seq-len",
        "20",
        "--block",
        "1",
    ]
    drivers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ends = [(driver.communicate()[1].splitlines()[-1], driver.returncode) for driver in drivers]
    assert {code for _, code in ends} <= {0, 1} and 0 in {code for _, code in ends}, ends
    pids = {str(driver.pid) for driver in drivers}
    named = re.compile(r"is being written by (?:process (\d+)|another process)")
    refusals = [named.search(said) for said, code in ends if code]
    assert all(found and found[1] in pids | {None} for found in refusals), ends
    run = headwater.open_run(config.out)
    assert run.complete.all() and not verify(run).problems
    alone = headwater.extract(
        replace(
            config,
            out=str(tmp_path / "alone"),
            sites=(),
            preset="all",
            block=1,
            labels=(),
            codec="none",
        )
    )
    assert faults.contents(run.path) == faults.contents(alone.path)
