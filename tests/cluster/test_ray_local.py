"""`--workers` on this machine: drivers that are killed or stopped leave no process and no file, and the run goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headwater.benchmarks.breaking.faults import contents
from headwater.extractor.cluster import pool as ray_pool
from headwater.extractor.cluster import ray as ray_cluster
from headwater.extractor.cluster.pool import RayPool
from headwater.extractor.model.weights import load_checkpoint
from headwater.extractor.request import RunConfig
from headwater.extractor.run import extract
from headwater.store.manifest import read_manifest
from headwater.store.reader import open_run
from headwater.store.scratch import MARK, scratch_folder
from headwater.store.verify import verify

GUARD = """
import fcntl, os, socket, struct, subprocess, sys
tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH", b"out", 0x1001))
for line in ("link set lo up", "addr add 10.213.0.1/24 dev out", "link set out up", "route add default via 10.213.0.2"):
    subprocess.run(["ip", *line.split()], check=True)
def outside():
    found = set()
    try:
        while packet := os.read(tun, 65536):
            found |= {socket.inet_ntoa(packet[16:20])} if packet[0] >> 4 == 4 else set()
    except BlockingIOError:
        return found
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("169.254.169.254", 80))
if outside() != {"169.254.169.254"}:
    sys.exit("the guard sees nothing")
"""  # a network of its own, all of whose roads lead into our hands
WATCHED = (
    GUARD
    + """
from headwater.cli.entry import main
code = main(sys.argv[1:])
if called := outside():
    sys.exit(f"contacted {called}")
sys.exit(code)
"""
)
N_BLOCKS = (
    128  # so many that a driver is still at work when a signal reaches it, also on a busy machine
)
PATIENCE = 300


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, tiny_gpt2):
    """A request of 128 blocks, and the bytes of that run as one process makes them."""
    home = tmp_path_factory.mktemp("long")
    np.save(
        home / "ids.npy", np.random.default_rng(5).integers(0, 200, (N_BLOCKS, 32)).astype(np.int32)
    )
    config = RunConfig(
        out=str(home / "whole"),
        model=str(tiny_gpt2),
        tokens=str(home / "ids.npy"),
        sites=("resid", "pattern", "loss"),
        block=1,
        threads=1,
    )
    return config, contents(extract(config).path)


class Driver:
    """A real `headwater extract --workers 2`; what it starts is known by open files in the folder of its Ray."""

    def __init__(self, config, out, command=("-m", "headwater")):
        self.home = Path(out).parent / "home"
        self.home.mkdir(exist_ok=True)
        self.ledger = Path(out) / "headwater/ledger"
        flags = [
            "--model",
            config.model,
            "--tokens",
            config.tokens,
            "--sites",
            ",".join(config.sites),
            "--block",
            "1",
        ]
        before = [] if command[0] == "-m" else ["unshare", "--net"]
        self.process = subprocess.Popen(
            [
                *before,
                sys.executable,
                *command,
                "extract",
                *flags,
                "--out",
                out,
                "--threads",
                "1",
                "--workers",
                "2",
            ],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "HOME": str(self.home), "RAY_ADDRESS": "10.255.255.1:6379"},
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def wait_for(self, n_blocks):
        end = time.monotonic() + PATIENCE
        while not self.ledger.is_dir() or len(list(self.ledger.iterdir())) < n_blocks:
            assert self.process.poll() is None and time.monotonic() < end, (
                self.process.communicate()
            )
            time.sleep(0.005)

    def folder(self):
        """The folder of its Ray, whose lock it holds."""
        (lock,) = (
            name
            for name in open_files(self.process.pid)
            if re.fullmatch(r"/tmp/hw-ray-\w+/lock", name)
        )
        return Path(lock).parent


def open_files(pid):
    try:
        return [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return []


def check_gone(folder, but=b"nothing"):
    """Wait until no process has a file open there."""
    end = time.monotonic() + PATIENCE
    while alive := [
        name
        for name in map(command_of, filter(str.isdecimal, os.listdir("/proc")))
        if name[1]
        and but not in name[1]
        and any(f.startswith(f"{folder}/") for f in open_files(name[0]))
    ]:
        assert time.monotonic() < end, alive
        time.sleep(0.1)


def command_of(pid):
    try:
        return pid, Path("/proc", pid, "cmdline").read_bytes().strip(b"\0")
    except OSError:
        return pid, b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_nothing_but_finished_blocks(number, long_run, tmp_path):
    config, expected = long_run
    driver = Driver(config, tmp_path / "run")
    driver.wait_for(2)
    folder = driver.folder()
    if number == signal.SIGINT:
        os.killpg(driver.process.pid, number)  # as a terminal does
    else:
        driver.process.send_signal(number)
    out, err = driver.process.communicate(timeout=PATIENCE)
    assert (driver.process.returncode, out) == (130, ""), err
    assert "blocks are kept" in err.splitlines()[-1] and "Traceback" not in err, err
    assert not list(driver.home.iterdir()), "such as a token that changes every later Ray"
    check_gone(folder)
    assert not folder.exists() and not list((tmp_path / "run/headwater/tmp").glob("weights-*"))
    done = len(open_run(tmp_path / "run").ledger.committed())
    assert 2 <= done < N_BLOCKS and not verify(open_run(tmp_path / "run")).problems
    run = extract(replace(config, out=str(tmp_path / "run")))
    assert contents(run.path) == expected and not verify(run).problems


def test_a_killed_driver_leaves_no_process_and_the_next_one_contacts_nobody(long_run, tmp_path):
    config, expected = long_run
    driver = Driver(config, tmp_path / "run")
    driver.wait_for(2)
    folder = driver.folder()
    driver.process.kill()
    driver.process.communicate()
    assert folder.exists()
    alone = ["unshare", "--net", sys.executable, "-c", GUARD]
    guarded = (
        shutil.which("unshare") is not None
        and subprocess.run(alone, capture_output=True).returncode == 0
    )
    rerun = Driver(config, tmp_path / "run", ("-c", WATCHED) if guarded else ("-m", "headwater"))
    _, err = rerun.process.communicate(timeout=PATIENCE)
    assert rerun.process.returncode == 0, err
    assert re.search(r"128 blocks, \d+ done already", err) and re.search(
        r"128/128 blocks .* [012] worker", err
    ), err
    check_gone(
        folder, but=b"Agent"
    )  # Ray's two agents look for their head for a minute, then end as well
    run = open_run(tmp_path / "run")
    assert contents(run.path) == expected and not verify(run).problems
    assert not list((run.path / "headwater/tmp").iterdir())
    with suppress(OSError), scratch_folder("hw-ray-", ray_cluster.OWN_FOLDERS):
        assert not folder.exists()  # the next run deletes it


def test_ray_is_sent_nowhere(many_blocks, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    seen, before = {}, dict(os.environ)
    monkeypatch.setattr(ray, "init", lambda **options: (seen.update(options, **os.environ), 1 / 0))
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with pytest.raises(ZeroDivisionError):
        extract(replace(many_blocks[0], out=str(tmp_path / "run"), workers=2))
    assert (
        seen["RAY_USAGE_STATS_ENABLED"] == "0"
        and seen["http_proxy"] == seen["HTTP_PROXY"] == "http://127.0.0.1:9"
    )
    assert seen["_node_ip_address"] == "127.0.0.1" and not seen["include_dashboard"]
    assert os.environ.get("http_proxy") == before.get("http_proxy")


@pytest.mark.parametrize("what", ["init", "remote"])
def test_nothing_is_left_when_ray_does_not_start(what, many_blocks, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    config = many_blocks[0]
    monkeypatch.setattr(ray_cluster, "OWN_FOLDERS", tmp_path)

    def broken(*arguments, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(ray, what, broken)
    if what == "remote":
        monkeypatch.setattr(ray, "init", lambda **options: None)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match=r"^no$"):
        extract(replace(config, out=str(tmp_path / "run"), workers=2))
    assert not list((tmp_path / "run/headwater/tmp").iterdir()) and not list(
        tmp_path.glob("hw-ray-*")
    )
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_folder_of_a_dead_process_is_deleted_and_that_of_a_living_one_kept(tmp_path):
    (tmp_path / "hw-ray-dead").mkdir()
    (tmp_path / "hw-ray-dead/lock").write_bytes(MARK)
    with scratch_folder("hw-ray-", tmp_path) as first:
        with scratch_folder("hw-ray-", tmp_path) as second:
            assert set(tmp_path.iterdir()) == {first, second}
        assert set(tmp_path.iterdir()) == {first}
    assert not list(tmp_path.iterdir())


def test_a_fault_of_every_block_ends_the_run(many_blocks):
    config, _ = many_blocks
    run = Path(config.out)
    pool = RayPool(config, run, read_manifest(run), load_checkpoint(config.model))
    with pytest.raises(ray_pool.BlocksFailed, match="30 attempts in a row failed"):
        for attempt in range(ray_pool.FAILURES_IN_A_ROW):
            pool._note_failure(attempt, "no", ray_pool.deque())
            pool._check_hope()
