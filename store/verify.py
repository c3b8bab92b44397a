"""Check a run against its ledger and manifest, byte by byte, and uncommit what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import google_crc32c

from headwater.store.ledger import Damage, Entry, Ledger
from headwater.store.place import Place, PlaceLike, place_of
from headwater.store.reader import Run
from headwater.store.sealed import broken_results, delete_folder, results_folder
from headwater.store.segments import FOLDER as SEGMENTS
from headwater.store.shard import CRC_BYTES, crc32c, decode_index, shard_sum
from headwater.store.writer import INTERNAL

READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written: its path, what is wrong, and the block or the result it belongs to.

    Paths are inside the run, those of results beside it: `RUN.analysis/…`.
    """

    path: str
    what: str
    block: int | None
    result: str | None = None

    @property
    def repairable(self) -> bool:
        """Whether what is damaged can be taken out and computed again."""
        known = self.block is not None or self.result is not None
        return known or self.path.startswith(f"{SEGMENTS}/")


@dataclass(frozen=True)
class Report:
    """What a check found: blocks in the plan and in the ledger, files and bytes read, problems, what to know."""

    n_blocks: int
    n_committed: int
    n_files: int
    n_bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


def verify(
    run: Run, quick: bool = False, workers: int = 1, progress: Callable[[int], None] | None = None
) -> Report:
    """Compare every file of the run, and of the results beside it, with its recorded length and checksum.

    `quick` looks only at lengths and shard indexes of the run. A shard that no entry of the ledger names is not looked
    at: it belongs to a block that is not committed, and resume writes it again.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    statics = dict(run.manifest.statics)
    if others := foreign_members(run):
        statics.pop("zarr.json", None)
        notes.append(
            f"zarr.json lists {', '.join(others)} too, which another program added. The run is whole; results are "
            f"better kept beside it."
        )
    entries = list(_entries(run, problems))
    jobs: list[tuple[str, int, int, int | None]] = [
        (path, size, crc, None) for path, (size, crc) in statics.items()
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
        if block is None:
            n_chunks = 0
        else:
            n_chunks = grids.get(path.split("/")[0], 0)
        what = _check_file(run.path / path, path, size, crc, n_chunks, quick)
        if progress is not None:
            progress(size)
        return size, None if what is None else Problem(path, what, block)

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(check, jobs))
    problems += [problem for _, problem in results if problem is not None]
    if not quick:
        problems += [
            Problem(f"{results_folder(run.path).name}/{name}/{file}", what, None, name)
            for name, file, what in broken_results(run.path)
        ]
    return Report(
        n_blocks=run.manifest.n_blocks,
        n_committed=len(run.ledger.committed()),
        n_files=len(jobs),
        n_bytes=sum(size for size, _ in results),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def repair(run: Run, report: Report) -> list[int]:
    """Uncommit every block with a problem, so that resume computes it again; return those blocks.

    A damaged segment of the ledger is deleted, and the blocks that it held are computed again too; a damaged result is
    deleted, and the next analysis makes it anew.
    """
    blocks = sorted({p.block for p in report.problems if p.block is not None})
    take_out(run.path, run.ledger, blocks)
    for problem in report.problems:
        if problem.path.startswith(f"{SEGMENTS}/"):
            run.ledger.drop_segment(problem.path)
    for result in sorted({p.result for p in report.problems if p.result is not None}):
        delete_folder(results_folder(run.path) / result)
    return blocks


def take_out(run: PlaceLike, ledger: Ledger, blocks: list[int]) -> None:
    """Uncommit blocks; `complete` says so first."""
    if blocks:
        # `complete` first: a crash in between leaves a block that is committed and that its readers leave out.
        (place_of(run) / "complete" / "c").delete_all(map(str, blocks))
        ledger.remove(*blocks)


def foreign_members(run: Run) -> list[str]:
    """Name the arrays that another program added to the root's zarr.json, where it lists ours as before."""
    try:
        root = json.loads((run.path / "zarr.json").read_bytes())
        listed = root["consolidated_metadata"]["metadata"]
        statics = run.manifest.statics
        names = {p.removesuffix("/zarr.json") for p in statics if p.endswith("/zarr.json")}
        own = {name: json.loads(run.read_static(f"{name}/zarr.json")) for name in names}
        kept = {name: listed[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    if kept == own:
        return sorted(set(listed) - names)
    return []


def _entries(run: Run, problems: list[Problem]) -> Iterator[Entry]:
    for found in run.ledger.examine():
        if isinstance(found, Damage):
            problems.append(Problem(found.path, str(found.error), found.block))
        elif found.block >= run.manifest.n_blocks:
            path = f"{INTERNAL}/ledger/{found.block:08d}.{found.attempt}.json"
            problems.append(Problem(path, "names a block that the plan does not have", found.block))
        else:
            yield found


def _check_file(
    path: Place, name: str, size: int, crc: int, n_chunks: int, quick: bool
) -> str | None:
    """Return what is wrong with a file, or None; `n_chunks` is 0 for what is no shard."""
    try:
        found = path.size()
        if found != size:
            return f"has {found} bytes, expected {size}"
        with path.open("rb") as file:
            if quick and n_chunks:
                file.seek(size - 16 * n_chunks - CRC_BYTES)
                decode_index(file.read(), n_chunks)
            if quick or _is_whole(file, name, crc, n_chunks):
                return None
            return "does not match its checksum"
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
