"""Compute blocks on Ray actors.

Actors pull blocks two deep, write their own shards and their own ledger entries; nothing but block numbers and entries
passes through Ray. Ids are read from the run, weights from a file of each node.
"""

from __future__ import annotations

import errno
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from headwater.extractor.cluster.actor import BlockActor
from headwater.extractor.cluster.in_flight import TICK_SECONDS, Outcome, Seats
from headwater.extractor.cluster.members import Roster
from headwater.extractor.cluster.ray import Cluster, connection, last_line, shorten
from headwater.extractor.cluster.weights import published
from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.request import RunConfig
from headwater.store.ledger import Entry, Ledger
from headwater.store.manifest import Manifest
from headwater.store.place import Place
from headwater.store.writer import INTERNAL

MAX_FAILURES = 3
FAILURES_IN_A_ROW = 30
DEATHS_IN_A_ROW = 10
DEATHS_OF_EACH = 3
MOST_LISTED = 8
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Notify = Callable[[str], None]


class BlocksFailed(RuntimeError):
    """Some blocks failed every time; the others are committed."""


class RayPool:
    """A pool of actors for one run: `with RayPool(...) as pool: for entry in pool.run(blocks): ...`.

    `notify` is told about once a second what the workers do. Entering starts Ray or joins a cluster; leaving ends
    what was started and deletes every temporary file, also when entering fails half-way.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Place,
        manifest: Manifest,
        checkpoint: Checkpoint,
        notify: Notify | None = None,
    ) -> None:
        self._run: Place = run.absolute()
        self._manifest = manifest
        self._config = config
        self._checkpoint = checkpoint
        self._notify = notify or (lambda text: None)
        self._told = 0.0
        self._nonce = f"seen-{uuid.uuid4().hex}"
        self._ledger = Ledger(self._run, manifest.fingerprint)
        self._attempts = Counter(self._ledger.tried())
        self._failures: Counter[int] = Counter()
        self._in_a_row = self._deaths = 0
        self._most_deaths = max(DEATHS_IN_A_ROW, DEATHS_OF_EACH * (config.workers or 1))
        self._reasons: dict[int, str] = {}
        self.roster = Roster()

    def __enter__(self) -> RayPool:
        seen = self._run / INTERNAL / "tmp" / self._nonce
        n = self._config.workers or 1
        with ExitStack() as stack:
            stack.callback(seen.unlink, missing_ok=True)
            seen.touch()
            cluster = stack.enter_context(
                connection(self._config.ray, n, self._config.device != "cpu")
            )
            self._weights = stack.enter_context(
                published(self._run, self._checkpoint, cluster.local)
            )
            threads = self._config.threads or cluster.fair_threads(n)
            self._seats = Seats(cluster, n, lambda: self._hire(cluster, threads))
            stack.callback(self._seats.dismiss_all)
            self._seats.fill()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, blocks: Sequence[int]) -> Iterator[Entry]:
        """Yield the entry of each block as it is committed, in any order.

        `blocks` have no entry yet. A block that fails three times, or is running three times while its worker dies, is
        given up; the others go on, and BlocksFailed is raised at the end, or when nothing but failures or deaths of
        workers come. Raises WorkersLost when no worker is left to go on, and OSError when the run's disk is full.
        """
        waiting = deque(blocks)
        while waiting or self._seats.busy:
            self._seats.welcome()
            self._seats.hand_out(waiting, self._begin)
            self._tell()
            for outcome in self._seats.collect():
                for entry in self._settle(outcome, waiting):
                    self._in_a_row = self._deaths = 0
                    self.roster.add(entry)
                    yield entry
        self._seats.close()
        if self._reasons:
            listed = "; ".join(
                f"block {b} ({self._sequences(b)}): {why}"
                for b, why in sorted(self._reasons.items())[:MOST_LISTED]
            )
            more = len(self._reasons) - MOST_LISTED
            raise BlocksFailed(
                f"{len(self._reasons)} of {self._manifest.n_blocks} blocks failed {MAX_FAILURES} times, the "
                f"others are committed. {listed}{f'; and {more} more' if more > 0 else ''}"
            )

    def _begin(self, actor: Any, block: int) -> Any:
        self._attempts[block] += 1
        return actor.work.remote(block, self._attempts[block])

    def _settle(self, outcome: Outcome, waiting: deque[int]) -> Iterator[Entry]:
        """Yield what was committed; put back, or give up, what was not."""
        if outcome.value is not None:
            yield Entry(**outcome.value)
        elif outcome.cause is not None:
            said = f"{last_line(outcome.cause)} (on {outcome.worker})"
            if isinstance(outcome.cause, OSError) and outcome.cause.errno in NO_ROOM:
                if self._run.local is not None:
                    raise outcome.cause  # the disk of the run is every worker's
                where = f"the temporary directory of {outcome.worker} is full ({outcome.cause})"
                others = self._seats.retire(outcome.worker, where)
                waiting.extendleft(reversed((*outcome.items, *others)))
                return
            self._note_failure(outcome.items[0], said, waiting)
            self._check_hope()
        else:
            yield from self._recover(outcome, waiting)

    def _recover(self, outcome: Outcome, waiting: deque[int]) -> Iterator[Entry]:
        """Yield those of a lost worker's blocks that it committed; its first other one failed, the rest wait again."""
        committed = self._ledger.committed()
        for block in outcome.items:
            if block in committed:
                yield self._ledger.read(block)
        lost = [block for block in outcome.items if block not in committed]
        waiting.extendleft(reversed(lost[1:]))
        if lost:
            why = f"its worker {outcome.worker} died ({outcome.lost})"
            self._note_failure(lost[0], why, waiting)
            self._deaths += 1
        if self._deaths >= self._most_deaths:
            raise BlocksFailed(
                f"{self._deaths} workers in a row died before they finished a block, so the rest was not tried; what "
                f"was committed before is kept. The last was {self._last_failure}"
            )

    def _note_failure(self, block: int, why: str, waiting: deque[int]) -> None:
        why = shorten(why)
        self._failures[block] += 1
        if self._failures[block] < MAX_FAILURES:
            self.roster.n_retries += 1
            waiting.append(block)
        else:
            self._reasons[block] = why
        self._last_failure = f"block {block} ({self._sequences(block)}): {why}"

    def _check_hope(self) -> None:
        """Stop where the fault is not one of single blocks."""
        self._in_a_row += 1
        if self._in_a_row >= FAILURES_IN_A_ROW:
            raise BlocksFailed(
                f"{self._in_a_row} attempts in a row failed, so the rest was not tried; what was committed before is "
                f"kept. The last was {self._last_failure}"
            )

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= TICK_SECONDS:
            self._told = now
            seats = self._seats
            roster = self.roster
            roster.n_lost, roster.n_refused = seats.n_lost, seats.n_refused
            roster.refusal = seats.refusal
            self._notify(
                roster.text(
                    [seat.name for seat in seats.working], seats.n_starting, seats.running()
                )
            )

    def _hire(self, cluster: Cluster, threads: int) -> Any:
        settings = asdict(self._config)
        digest = self._manifest.model["digest"]
        n_gpus = int(self._config.device != "cpu")
        return cluster.hire(
            BlockActor,
            threads,
            n_gpus,
            str(self._run),
            settings,
            digest,
            self._weights,
            self._nonce,
            threads,
            cluster.local,
        )

    def _sequences(self, block: int) -> str:
        first, last = self._manifest.block_range(block)
        return f"sequences {first} to {last - 1}"
