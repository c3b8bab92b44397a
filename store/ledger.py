"""The ledger: one entry a block and attempt, created once and whole; an entry alone commits its block."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwater.store.files import create_durably, json_sum, sync_directory, to_json
from headwater.store.writer import INTERNAL


class LedgerError(RuntimeError):
    """An entry of the ledger cannot be trusted; the message names it and says what to do."""


@dataclass(frozen=True)
class Entry:
    """What a worker says of a block that it finished.

    `files` maps paths inside the run to [bytes, sum]; `casts` array → {"overflow": n, "nonfinite": n} of values
    that the stored type could not hold; `seconds` phase → seconds.
    """

    block: int
    attempt: int
    fingerprint: str
    first: int
    last: int
    n_tokens: int
    files: dict[str, list[int]]
    casts: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    worker: str = ""


class Ledger:
    """The entries of one run, as files `<block>.<attempt>.json` that each carry their own checksum."""

    def __init__(self, run: Path, fingerprint: str) -> None:
        self.folder = run / INTERNAL / "ledger"
        self.fingerprint = fingerprint
        self._tmp = run / INTERNAL / "tmp"

    def committed(self) -> dict[int, Path]:
        """Return the newest entry's path of each committed block, without reading it."""
        newest: dict[int, tuple[int, Path]] = {}
        for block, attempt, path in self._scan():
            if block not in newest or newest[block][0] < attempt:
                newest[block] = (attempt, path)
        return {block: path for block, (_, path) in sorted(newest.items())}

    def entries(self) -> Iterator[Entry]:
        """Yield the newest entry of each committed block, in the order of blocks; raise LedgerError for a bad one."""
        for block, path in self.committed().items():
            yield self.read(path, block)

    def commit(self, entry: Entry) -> bool:
        """Create an entry durably; return False where this block and attempt has one already."""
        body = asdict(entry)
        data = to_json(body | {"crc32c": json_sum(body)})
        name = f"{entry.block:08d}.{entry.attempt}.json"
        return create_durably(self.folder / name, data, self._tmp / f"{name}.{os.getpid()}")

    def next_attempt(self, block: int) -> int:
        """Return the number of the next attempt at a block."""
        return 1 + max((a for b, a, _ in self._scan() if b == block), default=0)

    def remove(self, block: int) -> None:
        """Uncommit a block: delete all of its entries."""
        for b, _, path in list(self._scan()):
            if b == block:
                path.unlink()
        sync_directory(self.folder)

    def read(self, path: Path, block: int) -> Entry:
        """Read and check one entry."""
        advice = "Run `headwater verify --repair` on the run: the block is then computed again."
        try:
            raw: dict[str, Any] = json.loads(path.read_bytes())
            check = raw.pop("crc32c")
            entry = Entry(**raw)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise LedgerError(f"ledger entry {path.name} cannot be read ({error}). {advice}") from error
        if check != json_sum(raw):
            raise LedgerError(f"ledger entry {path.name} does not match its checksum. {advice}")
        if entry.fingerprint != self.fingerprint or entry.block != block:
            raise LedgerError(
                f"ledger entry {path.name} belongs to another run or block (fingerprint "
                f"{entry.fingerprint[:12]}, block {entry.block}; expected {self.fingerprint[:12]}, block "
                f"{block}). {advice}"
            )
        return entry

    def _scan(self) -> Iterator[tuple[int, int, Path]]:
        if not self.folder.is_dir():
            return
        for item in os.scandir(self.folder):
            block, _, attempt = item.name.removesuffix(".json").partition(".")
            if item.name.endswith(".json") and block.isdecimal() and attempt.isdecimal():
                yield int(block), int(attempt), Path(item.path)
