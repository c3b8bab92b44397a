"""Scan a run: several reducers share one read of its blocks, and their states are merged in a fixed binary tree.

The tree is over block numbers, so a result has the same bits whichever pool computed it and in whatever order the
blocks arrived. Only committed blocks are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.engine.checkpoint import Checkpoint, Nodes
from headwater.analysis.engine.pools import Pool, make_pool
from headwater.analysis.engine.reducer import Reducer, State, need_sites
from headwater.analysis.engine.results import analysis_path
from headwater.analysis.engine.work import BASE_BYTES, Work, projected_bytes, waiting_states
from headwater.store.entry import digest_of
from headwater.store.manifest import RunError
from headwater.store.reader import Run, open_run
from headwater.store.version import __version__

Steps = Generator[Sequence[Reducer], list[Any], Any]


@dataclass
class ScanProgress:
    """What an observer is told: which of how many passes, how many blocks of it are done, and since when."""

    passes: int
    n_blocks: int
    done: int = 0
    at: int = 1
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Scan:
    """How to go over a run: workers and their pool, a limit of memory in bytes, whether an unfinished run will do.

    With `keep_seconds` the states of an unfinished scan are kept beside the run that often, and the same request goes
    on from there.
    """

    workers: int = 1
    pool: str | Pool | None = None
    memory: int | None = None
    partial: bool = False
    keep_seconds: float | None = None
    observe: Callable[[ScanProgress], None] | None = None

    def state_bytes(self, run: Run, most: int) -> int:
        """Return how many bytes one state may have: `most`, or less where the limit of memory asks for it."""
        if self.memory is None:
            return most
        return max(
            min(most, (self.memory - BASE_BYTES) // 2 // waiting_states(run, self.workers)), 1
        )


ONE_BY_ONE = Scan()


@dataclass(frozen=True)
class Prepared:
    """An analysis of one run, ready for the engine.

    It is a generator: it yields the reducers of a pass, is sent their results, and returns a dataset.
    `passes` is declared, and checked. `arguments` go into the result's provenance.
    """

    name: str
    passes: int
    steps: Callable[[], Steps]
    arguments: dict[str, Any]


def as_run(run: Run | str | Path) -> Run:
    """Open a run where a path is given."""
    return run if isinstance(run, Run) else open_run(run)


def analyse(run: Run, analyses: Sequence[Prepared], scan: Scan = ONE_BY_ONE) -> list[Any]:
    """Run analyses side by side, pass by pass, and return what each of them returns.

    The n-th passes of all analyses share one read of the run, or as many reads as the limit of memory asks for.
    """
    passes = max((a.passes for a in analyses), default=0)
    kept = _checkpoint(run, analyses, scan)
    running = [(i, a, a.steps()) for i, a in enumerate(analyses)]
    results: list[Any] = [None] * len(analyses)
    wanted: dict[int, list[Reducer]] = {}
    for i, analysis, steps in running:
        try:
            wanted[i] = list(next(steps))
        except StopIteration as stop:  # with nothing to read
            results[i] = stop.value
        if (i in wanted) != (analysis.passes > 0):
            raise AssertionError(
                f"{analysis.name} declares {analysis.passes} passes and wants another number"
            )
    for at in range(passes):
        reduced = iter(
            _read(run, [r for rs in wanted.values() for r in rs], scan, at + 1, passes, kept)
        )
        answers = {i: [next(reduced) for _ in rs] for i, rs in wanted.items()}
        wanted = {}
        for i, analysis, steps in running:
            if i not in answers:
                continue
            try:
                wanted[i] = list(steps.send(answers[i]))
            except StopIteration as stop:
                results[i] = stop.value
            if (i in wanted) != (at + 1 < analysis.passes):
                raise AssertionError(
                    f"{analysis.name} declares {analysis.passes} passes and wants another number"
                )
    if kept is not None:
        kept.clear()
    return results


def _read(
    run: Run, reducers: Sequence[Reducer], scan: Scan, at: int, passes: int, kept: Checkpoint | None
) -> list[Any]:
    """Reduce in as few reads as `scan.memory` allows."""
    groups: list[list[Reducer]] = []
    n_workers = make_pool(scan.pool, scan.workers).n_workers
    for reducer in reducers:
        joined = [*groups[-1], reducer] if groups else [reducer]
        if (
            scan.memory is not None
            and len(joined) > 1
            and projected_bytes(run, joined, n_workers) > scan.memory
        ):
            joined = [reducer]
        groups[-1:] = [joined] if len(joined) > 1 else [*groups[-1:], joined]
    found: list[Any] = []
    for i, group in enumerate(groups):
        found += reduce_run(run, group, scan, at, passes, kept, f".{i}" if len(groups) > 1 else "")
    return found


def _checkpoint(run: Run, analyses: Sequence[Prepared], scan: Scan) -> Checkpoint | None:
    if scan.keep_seconds is None:
        return None
    request = [[a.name, a.passes, a.arguments] for a in analyses]
    blocks = committed_blocks(run, scan.partial)
    read = digest_of(run.ledger.marks(), blocks)
    identity = [__version__, np.__version__, run.manifest.fingerprint, request, read]
    return Checkpoint(analysis_path(run, ".unfinished"), identity, scan.keep_seconds)


def reduce_run(
    run: Run,
    reducers: Sequence[Reducer],
    scan: Scan = ONE_BY_ONE,
    at: int = 1,
    passes: int = 1,
    kept: Checkpoint | None = None,
    part: str = "",
) -> list[Any]:
    """Read a run once for several reducers; return each one's final result.

    Raises RunError for a run that is not complete (unless `scan.partial`) or lacks a site, ValueError where the
    projected memory is above `scan.memory` or the data hold NaN.
    """
    blocks = committed_blocks(run, scan.partial)
    for reducer in reducers:
        need_sites(run, *reducer.sites)
    pool = make_pool(scan.pool, scan.workers)
    projected = projected_bytes(run, reducers, pool.n_workers)
    if scan.memory is not None and projected > scan.memory:
        raise ValueError(
            f"this analysis needs {projected / 1e6:,.0f} MB of memory, but the limit is {scan.memory / 1e6:,.0f} MB. "
            "Use fewer workers, fewer layers or depths, or a higher limit."
        )
    tree = Tree(
        run.manifest.n_blocks,
        lambda a, b: [r.merge(x, y) for r, x, y in zip(reducers, a, b, strict=True)],
    )
    there = tree.restore(kept.load(f"{at}{part}") if kept is not None else {})
    for block in set(range(run.manifest.n_blocks)) - set(blocks) - there:
        tree.put(block, None)
    rest = [block for block in blocks if block not in there]
    progress = ScanProgress(passes, len(blocks), len(blocks) - len(rest), at)
    for block, states in pool.map(Work(run, tuple(reducers)), rest):
        tree.put(block, states)
        progress.done += 1
        if kept is not None:
            kept.save(f"{at}{part}", tree.waiting, now=progress.done == len(blocks))
        if scan.observe is not None:
            scan.observe(progress)
    assert tree.root is not None
    return [r.finalise(state) for r, state in zip(reducers, tree.root, strict=True)]


def committed_blocks(run: Run, partial: bool) -> list[int]:
    """List the blocks to read; raise RunError where some are missing and `partial` is not set, or all are."""
    blocks = sorted(run.ledger.committed())
    n = run.manifest.n_blocks
    if len(blocks) < n and not partial:
        raise RunError(
            f"{run.path} is not complete: {len(blocks)} of {n} blocks are there. Finish it with `headwater extract "
            f"--out {run.path}`, or analyse what there is with --partial (partial=True)."
        )
    if not blocks:
        raise RunError(
            f"{run.path} has no finished block. Go on with `headwater extract --out {run.path}`."
        )
    return blocks


class Tree:
    """Merge leaves 0 … n − 1 pairwise, level by level, as they come; a leaf that is None is passed over."""

    def __init__(
        self, n_leaves: int, merge: Callable[[list[State], list[State]], list[State]]
    ) -> None:
        self._merge = merge
        self._widths = [n_leaves]
        while self._widths[-1] > 1:
            self._widths.append(-(-self._widths[-1] // 2))
        self.waiting: Nodes = {}

    @property
    def root(self) -> list[State] | None:
        """The state of all leaves, once it is there."""
        return self.waiting.get((len(self._widths) - 1, 0))

    def restore(self, nodes: Nodes) -> set[int]:
        """Take over waiting nodes; return the leaves that they cover."""
        self.waiting |= nodes
        n = self._widths[0]
        return {
            leaf
            for level, index in nodes
            for leaf in range(index << level, min((index + 1) << level, n))
        }

    def put(self, index: int, value: list[State] | None) -> None:
        """Add a leaf, and merge upwards as far as its neighbours are there."""
        for level, width in enumerate(self._widths):
            if width == 1:
                self.waiting[level, index] = value
                return
            if index ^ 1 < width:
                if (level, index ^ 1) not in self.waiting:
                    self.waiting[level, index] = value
                    return
                other = self.waiting.pop((level, index ^ 1))
                left, right = (other, value) if index % 2 else (value, other)
                value = (
                    right if left is None else left if right is None else self._merge(left, right)
                )
            index //= 2
