"""What the workers of a pool do, in one short text for the progress line."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from headwater.extractor.units import count
from headwater.store.ledger import Entry

SLOW_FACTOR = 3.0
SLOW_SECONDS = 5.0


class Roster:
    """Speed of each worker, blocks that were tried again, workers that were lost."""

    def __init__(self) -> None:
        self._done: dict[str, tuple[int, float]] = {}
        self._block_seconds = 0.0
        self._n_blocks = 0
        self._phases: Counter[str] = Counter()
        self.n_retries = 0
        self.n_lost = 0
        self.n_refused = 0
        self.refusal = ""

    def add(self, entry: Entry) -> None:
        """Count a finished block."""
        seconds = busy_seconds(entry)
        tokens, before = self._done.get(entry.worker, (0, 0.0))
        self._done[entry.worker] = tokens + entry.n_tokens, before + seconds
        self._block_seconds += seconds
        self._n_blocks += 1
        self._phases.update(entry.seconds)

    def rates(self, workers: Sequence[str]) -> list[float]:
        """Return the tokens per second of workers that have finished a block, the slowest first."""
        done = [self._done[name] for name in workers if name in self._done]
        return sorted(tokens / max(seconds, 1e-9) for tokens, seconds in done)

    def text(
        self, workers: Sequence[str], n_starting: int, running: Sequence[tuple[str, int, float]]
    ) -> str:
        """Describe the pool; `running` are (worker, block, seconds since it began)."""
        rates = self.rates(workers)
        parts = [count(len(workers), "worker")]
        if rates:
            parts[0] += f" at {rates[0]:,.0f}" + (f" to {rates[-1]:,.0f}" if len(rates) > 1 else "")
        if n_starting:
            parts.append(f"{n_starting} starting")
        if self.n_lost:
            parts.append(f"{self.n_lost} lost")
        if self.n_refused:
            why = f" ({self.refusal})" if self.refusal else ""
            parts.append(f"{self.n_refused} could not start{why}")
        if self.n_retries:
            parts.append(f"{self.n_retries} tried again")
        if self._phases:
            parts.append(
                f"mostly {max(sorted(self._phases), key=lambda phase: self._phases[phase])}"
            )
        if slow := self._slowest(running):
            parts.append(slow)
        return ", ".join(parts)

    def _slowest(self, running: Sequence[tuple[str, int, float]]) -> str:
        """Name the block that takes longest, if it takes several times as long as others did."""
        if not running or not self._n_blocks:
            return ""
        worker, block, seconds = max(running, key=lambda item: item[2])
        usual = self._block_seconds / self._n_blocks
        return (
            f"{worker} {seconds:.0f} s on block {block}"
            if seconds > max(SLOW_FACTOR * usual, SLOW_SECONDS)
            else ""
        )


def busy_seconds(entry: Entry) -> float:
    """Return how long a worker was at a block: computing, then waiting for its disk."""
    return entry.seconds.get("compute", 0.0) + entry.seconds.get("finish", 0.0)


def straggler(entries: Sequence[Entry]) -> dict[str, int | float | str] | None:
    """Name the block that took longest, if it took several times as long as the median one."""
    if not entries:
        return None
    usual = statistics.median(map(busy_seconds, entries))
    slowest = max(entries, key=busy_seconds)
    if busy_seconds(slowest) <= SLOW_FACTOR * max(usual, 1e-9):
        return None
    seconds = busy_seconds(slowest)
    times = busy_seconds(slowest) / max(usual, 1e-9)
    return {
        "block": slowest.block,
        "worker": slowest.worker,
        "seconds": round(seconds, 3),
        "times": round(times, 1),
    }


def by_worker(entries: Sequence[Entry]) -> dict[str, dict[str, int | float | str]]:
    """Sum up a ledger: worker → blocks, tokens, seconds, tokens_per_second, slowest (its longest phase)."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.worker, []).append(entry)
    table: dict[str, dict[str, int | float | str]] = {}
    for worker, group in sorted(groups.items()):
        tokens = sum(e.n_tokens for e in group)
        seconds = sum(map(busy_seconds, group))
        phases = {phase for e in group for phase in e.seconds}
        totals = {phase: sum(e.seconds.get(phase, 0.0) for e in group) for phase in sorted(phases)}
        table[worker] = {
            "blocks": len(group),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "slowest": max(totals, key=lambda phase: totals[phase]) if totals else "",
        }
    return table
