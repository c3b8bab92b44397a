"""Check a run against its ledger and manifest, byte by byte, and uncommit what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import google_crc32c

from headwater.store.ledger import Damage, Entry
from headwater.store.place import Place, delete_all, open_place, size_of
from headwater.store.reader import Run
from headwater.store.segments import FOLDER as SEGMENTS
from headwater.store.shard import CRC_BYTES, crc32c, decode_index, shard_sum
from headwater.store.writer import INTERNAL

READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was committed: a path in the run, what is wrong, and the block it belongs to."""

    path: str
    what: str
    block: int | None

    @property
    def repairable(self) -> bool:
        """Whether what is damaged can be taken out and computed again."""
        return self.block is not None or self.path.startswith(f"{SEGMENTS}/")


@dataclass(frozen=True)
class Report:
    """What a check found: blocks in the plan and in the ledger, files and bytes read, and the problems."""

    n_blocks: int
    n_committed: int
    n_files: int
    n_bytes: int
    problems: tuple[Problem, ...]


def verify(run: Run, quick: bool = False, workers: int = 1, progress: Callable[[int], None] | None = None) -> Report:
    """Compare every file of the run with its recorded length and checksum.

    `quick` looks only at lengths and shard indexes. A shard that no entry of the ledger names is not looked at: it
    belongs to a block that is not committed, and resume writes it again.
    """
    problems: list[Problem] = []
    entries = list(_entries(run, problems))
    jobs: list[tuple[str, int, int, int | None]] = [
        (path, size, crc, None) for path, (size, crc) in run.manifest.statics.items()
    ]
    jobs += [(path, size, crc, e.block) for e in entries for path, (size, crc) in e.files.items()]
    for entry in entries:
        first, last = run.manifest.block_range(entry.block)
        expected = {path for spec in run.manifest.arrays for path in spec.block_shards(first, last)}
        problems += [
            Problem(path, "is not in the ledger entry of its block", entry.block)
            for path in sorted(expected - entry.files.keys())
        ]
    grids = {spec.name: prod(spec.grid) for spec in run.manifest.arrays}

    def check(job: tuple[str, int, int, int | None]) -> tuple[int, Problem | None]:
        path, size, crc, block = job
        n_chunks = 0 if block is None else grids.get(path.split("/")[0], 0)
        what = _check_file(run.path / path, path, size, crc, n_chunks, quick)
        if progress is not None:
            progress(size)
        return size, None if what is None else Problem(path, what, block)

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(check, jobs))
    problems += [problem for _, problem in results if problem is not None]
    n_bytes = sum(size for size, _ in results)
    return Report(run.manifest.n_blocks, len(run.ledger.committed()), len(jobs), n_bytes, tuple(problems))


def repair(run: Run, report: Report) -> list[int]:
    """Uncommit every block with a problem, so that resume computes it again; return those blocks.

    A damaged segment of the ledger is deleted: the blocks that it held are computed again too.
    """
    blocks = sorted({p.block for p in report.problems if p.block is not None})
    delete_all(run.path / "complete" / "c", map(str, blocks))
    run.ledger.remove(*blocks)
    for problem in report.problems:
        if problem.block is None and problem.repairable:
            run.ledger.drop_segment(problem.path)
    return blocks


def _entries(run: Run, problems: list[Problem]) -> Iterator[Entry]:
    for found in run.ledger.examine():
        if isinstance(found, Damage):
            problems.append(Problem(found.path, str(found.error), found.block))
        elif found.block >= run.manifest.n_blocks:
            path = f"{INTERNAL}/ledger/{found.block:08d}.{found.attempt}.json"
            problems.append(Problem(path, "names a block that the plan does not have", found.block))
        else:
            yield found


def _check_file(path: Place, name: str, size: int, crc: int, n_chunks: int, quick: bool) -> str | None:
    """Return what is wrong with a file, or None; `n_chunks` is 0 for what is no shard."""
    try:
        found = size_of(path)
        if found != size:
            return f"has {found} bytes, expected {size}"
        with open_place(path) as file:
            if quick and n_chunks:
                file.seek(size - 16 * n_chunks - CRC_BYTES)
                decode_index(file.read(), n_chunks)
            return None if quick or _is_whole(file, name, crc, n_chunks) else "does not match its checksum"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"


def _is_whole(file: BinaryIO, name: str, crc: int, n_chunks: int) -> bool:
    """Say whether a file has the sum that was noted of it."""
    if n_chunks:
        try:
            return shard_sum(file, n_chunks) == crc
        except ValueError:
            return False
    if "/c/" in name:
        data = file.read()
        return crc32c(data[:-CRC_BYTES]) == data[-CRC_BYTES:] == crc.to_bytes(CRC_BYTES, "little")
    actual = 0
    while part := file.read(READ_BYTES):
        actual = google_crc32c.extend(actual, part)
    return actual == crc
