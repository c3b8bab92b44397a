"""What whoever watches a run is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from headwater.store.ledger import Entry


@dataclass
class Progress:
    """What an observer is told: the phase, blocks and tokens done, bytes written, the newest entry, the workers."""

    phase: str
    n_blocks: int = 0
    done: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    rows: int = 0
    started: float = field(default_factory=time.perf_counter)
    entry: Entry | None = None
    workers: str = ""

    def add(self, entry: Entry) -> None:
        """Count a block that was committed."""
        self.done += 1
        self.n_tokens += entry.n_tokens
        self.n_bytes += sum(size for size, _ in entry.files.values())
        self.entry = entry


Observer = Callable[[Progress], None]
Notify = Callable[[str], None]


def silent(_: object) -> None:
    """Tell nobody."""
