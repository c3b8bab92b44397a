"""What survives kill -9: a capture is really killed, what it left is read back by another process, then run again.

A sequence is right where every depth reads back as in an undisturbed capture, missing where a read fails or says that
nothing is there (NaN), and silently wrong otherwise. `kept` is the share of surviving bytes that a rerun left alone.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.peers.environments import Peer, PeerMissing, python_of
from headwater.benchmarks.peers.peer_process import PeerProcess
from headwater.benchmarks.peers.truth import Place

FRACTIONS = (0.25, 0.5, 0.75)
LIMIT = 120.0


@dataclass(frozen=True)
class Work:
    """What is captured: a model of `n_depths` depths, `n` sequences of `seq_len` tokens, `batch` at once."""

    model: Path
    tokens: Path
    n: int
    seq_len: int
    n_depths: int
    batch: int
    kills: int

    @property
    def places(self) -> list[Place]:
        """The first and last position of every sequence at every depth."""
        return [
            ("resid", depth, s, p)
            for s in range(self.n)
            for depth in range(self.n_depths)
            for p in (0, self.seq_len - 1)
        ]


def survive(peers: Sequence[Peer], work: Work, cache: Path, folder: Path) -> list[Row]:
    """Kill every peer at several moments; return a row for each kill."""
    rows: list[Row] = []
    for peer in peers:
        try:
            python = python_of(peer, cache, install=False)
            rows += _kill_one(peer, python, work, folder / peer.name)
        except PeerMissing as error:
            rows.append({"case": peer.name, "problem": str(error)})
    columns = dict.fromkeys(
        ("case", "written", "right", "missing", "silently_wrong", "kept", "rerun", "problem"), ""
    )
    return [{"sequences": work.n, "storage": _storage(peers, row)} | columns | row for row in rows]


def _storage(peers: Sequence[Peer], row: Row) -> str:
    return next(peer.storage for peer in peers if peer.name == row["case"])


def _kill_one(peer: Peer, python: str, work: Work, folder: Path) -> list[Row]:
    folder.mkdir(parents=True)
    rows = []
    with closing(_started(peer, python, work, folder)) as reader:
        out = _begin(reader, work, folder / "whole").ask("step")["out"]
        expected, _ = reader.read(out, work.places, work.batch)
        total = _size(folder / "whole")
        for i in range(work.kills):
            target = folder / f"killed-{i}"
            _capture_and_kill(peer, python, work, target, FRACTIONS[i % len(FRACTIONS)] * total)
            rows.append(
                {"case": peer.name, "written": round(_size(target) / total, 3)}
                | _inspect(reader, work, target, expected)
            )
            shutil.rmtree(target)
    return rows


def _started(peer: Peer, python: str, work: Work, folder: Path) -> PeerProcess:
    process = PeerProcess(peer, python, folder / "log")
    process.ask("load", model=str(work.model), workloads=["residual"])
    return process


def _begin(process: PeerProcess, work: Work, out: Path) -> PeerProcess:
    process.ask(
        "begin",
        workload="residual",
        tokens=str(work.tokens),
        out=str(out),
        batch=work.batch,
        whole=True,
    )
    return process


def _capture_and_kill(peer: Peer, python: str, work: Work, target: Path, size: float) -> None:
    """Start a capture in a process of its own and kill that once `size` bytes are there."""
    with closing(_started(peer, python, work, target.parent)) as process:
        _begin(process, work, target).tell("step")
        end = time.monotonic() + LIMIT
        while _size(target) < size and process.process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)


def _inspect(
    reader: PeerProcess, work: Work, target: Path, expected: list[np.ndarray | None]
) -> Row:
    """Read back what a killed process left, then capture again into the same folder."""
    out = str(target / "0")
    found, _ = reader.read(out, work.places, work.batch, missing=True)
    states = _states(work, found, expected)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in _files(target)}
    kept = 0
    try:
        _begin(reader, work, target).ask("step")
        again, _ = reader.read(out, work.places, work.batch)
        same = all(
            np.array_equal(a, b)
            for a, b in zip(again, expected, strict=True)
            if a is not None and b is not None
        )
        rerun = "wrong"
        if same:
            rerun = "right"
        kept = sum(
            size
            for path, (changed, size) in before.items()
            if path.exists() and (path.stat().st_mtime_ns, path.stat().st_size) == (changed, size)
        )
    except PeerMissing as error:
        rerun = f"refused: {error}".replace(f"{target.parent.parent}/", "")[:120]
    share = round(kept / max(sum(size for _, size in before.values()), 1), 3)
    counts = {name: states.count(name) for name in ("right", "missing", "silently_wrong")}
    return counts | {"kept": share, "rerun": rerun}


def _states(
    work: Work, found: list[np.ndarray | None], expected: list[np.ndarray | None]
) -> list[str]:
    states = []
    per = len(found) // work.n
    for s in range(work.n):
        pairs = list(
            zip(found[s * per : (s + 1) * per], expected[s * per : (s + 1) * per], strict=True)
        )
        present = [(a, b) for a, b in pairs if a is not None and not np.isnan(a).all()]
        if any(not np.array_equal(a, b) for a, b in present if b is not None):
            states.append("silently_wrong")
        else:
            states.append("right" if len(present) == len(pairs) else "missing")
    return states


def _files(folder: Path) -> list[Path]:
    """List the files in a folder whose folders may be renamed or deleted meanwhile."""
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def _size(folder: Path) -> int:
    total = 0
    for path in _files(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total
