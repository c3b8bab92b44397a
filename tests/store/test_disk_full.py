"""A disk that fills up, on a real small file system: a clear error, a valid run, and resume to equal bytes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

import headwater
from headwater.benchmarks.breaking import faults
from headwater.store.verify import verify

LIMITED = "import resource, sys; from headwater.cli.entry import main; n = int(sys.argv[1])\n"
LIMITED += "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); sys.exit(main(sys.argv[2:]))"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A request, with the bytes that an uninterrupted run of it has."""
    config = faults.make_case(tmp_path_factory.mktemp("full"))
    config = replace(config, block=1, codec="zstd-1")
    return config, faults.contents(headwater.extract(config).path)


def arguments(config, out):
    flags = ["--seq-len", "20", "--block", "1", "--codec", "zstd-1", "--threads", "1"]
    return [
        "extract",
        "--model",
        config.model,
        "--text",
        config.text[0],
        "--labels",
        ",".join(config.labels),
        "--sites",
        ",".join(config.sites),
        *flags,
        "--out",
        str(out),
    ]


@pytest.fixture
def disk(tmp_path):
    """A file system in memory whose limits can be set."""
    place = tmp_path / "disk"
    place.mkdir()

    def limit(options):
        action = ["mount", "-o", f"remount,{options}", str(place)]
        if not place.is_mount():
            action = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(action, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        return place

    yield limit
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "room", ["size=150k", "size=500k", "size=700k", "nr_inodes=60", "nr_inodes=200"]
)
def test_a_full_disk(disk, case, cli, room):
    config, expected = case
    run = disk(room) / "run"
    cli(*arguments(config, run)).error(1, "the disk is full", "No space left on device")
    if (run / "headwater/manifest.json").exists():
        left = headwater.open_run(run)
        assert len(list(left.blocks())) < 10 and not verify(left).problems
        assert cli("verify", run).code == 0
    assert not [p for p in (run / "headwater/tmp").iterdir() if p.stat().st_size]
    again = cli(*arguments(config, run))
    again.error(again.code, "disk")
    disk("size=100M,nr_inodes=10k")
    resumed = cli(*arguments(config, run))
    assert resumed.code == 0, resumed
    assert faults.contents(run) == expected and cli("verify", run).code == 0


@pytest.mark.parametrize("n_bytes", [3000, 9000])
def test_files_that_may_not_grow(tmp_path, case, n_bytes):
    config, expected = case
    command = [sys.executable, "-c", LIMITED, str(n_bytes), *arguments(config, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "File too large" in last and "Traceback" not in done.stderr, (
        done
    )
    assert (
        faults.contents(headwater.extract(replace(config, out=str(tmp_path / "run"))).path)
        == expected
    )
