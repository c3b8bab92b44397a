"""Compute the states of one block, and project the memory that a scan takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from headwater.analysis.engine.pools import IN_FLIGHT
from headwater.analysis.engine.reducer import Chunk, Reducer, State
from headwater.store.layout import ArraySpec
from headwater.store.reader import Run, open_run

BASE_BYTES = 64 << 20
AHEAD_BYTES = 256 << 20


class Work:
    """Compute the states of one block; travels to other processes as a path and the reducers."""

    def __init__(self, run: Run | str, reducers: tuple[Reducer, ...], checked: bool = True) -> None:
        self.run = open_run(run, checked) if isinstance(run, str) else run
        self.reducers = reducers

    def __reduce__(self) -> Any:
        return Work, (str(self.run.path), self.reducers, self.run.checked)

    def __call__(self, block: int) -> list[State]:
        first, last = self.run.manifest.block_range(block)
        tokens, row_start = read_text(self.run, first, last)
        states = [reducer.zero() for reducer in self.reducers]
        groups = _groups(self.run, self.reducers)
        self._ask_ahead(first, last)
        for low in range(first, last, max(n for (_, n), _ in groups)):
            high = min(low + max(n for (_, n), _ in groups), last)
            for (joint, n), members in groups:
                for start in range(low, high, n):
                    stop = min(start + n, high)
                    here = slice(start - first, stop - first)
                    chunk = Chunk(self.run, start, stop, tokens[here], row_start[here])
                    self._feed(chunk, joint, members, states)
        for reducer, state in zip(self.reducers, states, strict=True):
            _check_finite(reducer, state, self.run, first, last)
        return states

    def _ask_ahead(self, first: int, last: int) -> None:
        """Let the system read what the reducers will ask for, as far as AHEAD_BYTES go, while they compute."""
        specs = {site: self.run.spec(site) for r in self.reducers for site in r.sites}
        wanted = {
            (site, lead if specs[site].axis else 0)
            for r in self.reducers
            for site in r.sites
            for lead in _leads(self.run, r)
        }
        n_bytes = 0
        for site, lead in sorted(wanted):
            n_bytes += _sequence_bytes(specs[site]) * (last - first)
            if n_bytes > AHEAD_BYTES:
                return
            self.run.fetch_ahead(site, lead, first, last)

    def _feed(self, chunk: Chunk, joint: bool, members: list[int], states: list[State]) -> None:
        if joint:
            for i in members:
                self.reducers[i].update(states[i], chunk)
            return
        wanted = {i: set(_leads(self.run, self.reducers[i])) for i in members}
        for lead in sorted(set().union(*wanted.values())):
            chunk.lead = lead
            for i in members:
                if lead in wanted[i]:
                    self.reducers[i].update(states[i], chunk)
            chunk.forget()


def projected_bytes(run: Run, reducers: Sequence[Reducer], n_workers: int) -> int:
    """Project the peak of memory: states at work, waiting and in the tree, chunks, and working memory."""
    states = sum(r.nbytes for r in reducers) * waiting_states(run, n_workers)
    chunks = max(
        (_chunk_bytes(run, [reducers[i] for i in m], n) for (_, n), m in _groups(run, reducers)),
        default=0,
    )
    text = 16 * run.manifest.block * run.manifest.n_positions
    return (
        BASE_BYTES
        + states
        + n_workers * (chunks + text + max((r.working_bytes for r in reducers), default=0))
    )


def waiting_states(run: Run, n_workers: int) -> int:
    """Return how many states there are at once, at most: at work, in flight and waiting in the tree."""
    return max(run.manifest.n_blocks - 1, 0).bit_length() + 2 + (1 + IN_FLIGHT) * n_workers


def _chunk_bytes(run: Run, reducers: Sequence[Reducer], n: int) -> int:
    """Bytes of the values of one chunk of n sequences for reducers that go together."""
    wanted: dict[str, int] = {}
    for r in reducers:
        for site in r.sites:
            wanted[site] = max(wanted.get(site, 0), len(_leads(run, r)) if r.joint else 1)
    return sum(_sequence_bytes(run.spec(site)) * n_leads * n for site, n_leads in wanted.items())


def _sequence_bytes(spec: ArraySpec) -> int:
    lead = 0 if spec.axis is None else 1
    return int(np.prod(spec.shape[lead + 1 :], dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def _leads(run: Run, reducer: Reducer) -> tuple[int, ...]:
    """Return the leads that a reducer reads, of the site that has most."""
    if reducer.leads is not None:
        return reducer.leads
    return tuple(range(max((len(run.leads(site)) for site in reducer.sites), default=1)))


def _groups(run: Run, reducers: Sequence[Reducer]) -> list[tuple[tuple[bool, int], list[int]]]:
    """Group reducers by whether they are joint and by the sequences of their chunks."""
    block = run.manifest.block
    length = run.manifest.n_positions

    def key(i: int) -> tuple[bool, int]:
        return reducers[i].joint, min(
            1 << max(reducers[i].tokens // length, 1).bit_length() - 1, block
        )

    return [
        (k, list(members)) for k, members in groupby(sorted(range(len(reducers)), key=key), key)
    ]


def _check_finite(reducer: Reducer, state: State, run: Run, first: int, last: int) -> None:
    for value in state.values():
        if value.dtype.kind == "f" and not value.max(initial=0.0) < np.inf:
            raise ValueError(
                f"{', '.join(reducer.sites)} of {run.path} hold NaN or infinite values in sequences {first} to "
                f"{last - 1}, so {reducer.name} has no meaning there. Extract them again with --dtype float32, or "
                "without --on-overflow keep."
            )


def read_text(run: Run, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Read tokens and row_start of the sequences [first, last): int32 [sequence, position] each."""
    return run.rows("tokens", first, last), run.rows("row_start", first, last)
