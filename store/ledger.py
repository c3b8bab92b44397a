"""The ledger: one entry a block and attempt, created once and whole; an entry alone commits its block.

Entries are files; thousands of them are moved into an immutable segment. Whoever reads lists the entries first and the
segments after them, so an entry that is being moved is seen in one place or in both. Threads that ask at once share a
listing, one that began after they asked; directories that have not changed are not listed again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from headwater.store.entry import Entry as Entry
from headwater.store.entry import LedgerError as LedgerError
from headwater.store.entry import decode, different, encode, mark_of
from headwater.store.files import GONE, RunMoved, json_sum, to_json
from headwater.store.place import PlaceLike, place_of
from headwater.store.segments import FOLDER as SEGMENTS
from headwater.store.segments import Segments
from headwater.store.writer import INTERNAL

LOOSE = -1
COMPACT_AT = 4096


class Loose(NamedTuple):
    """An entry that is a file of its own, by its name; `gone` says that it takes its block out of the run."""

    block: int
    attempt: int
    gone: bool
    name: str


@dataclass(frozen=True)
class Damage:
    """Something of the ledger that cannot be trusted: its path in the run, and the block of an entry."""

    path: str
    error: LedgerError
    block: int | None


@dataclass(frozen=True)
class _View:
    """The newest attempt at every block that was ever tried: arrays in the order of blocks.

    `source` is LOOSE or the number of a segment in `segments`.
    """

    block: np.ndarray
    attempt: np.ndarray
    gone: np.ndarray
    source: np.ndarray
    loose: dict[tuple[int, int], Loose]
    segments: list[str]
    errors: list[LedgerError]


class Ledger:
    """The entries of one run: files `<block>.<attempt>.json` that each carry their own checksum, and segments."""

    def __init__(self, run: PlaceLike, fingerprint: str) -> None:
        run = place_of(run)
        self.folder = run / INTERNAL / "ledger"
        self.fingerprint = fingerprint
        self._run = run
        self._segments = Segments(run, fingerprint)
        self._lock = threading.Lock()
        self._seen: _View | None = None
        self._seen_at, self._mark = 0.0, list[str | None]()
        self._marked: tuple[dict[int, int], dict[int, str]] | None = None

    def holds(self, first: int, last: int) -> np.ndarray:
        """Say of the blocks [first, last) which are committed."""
        # A view is sorted by block, so the blocks of a range lie together.
        view = self._view()
        low, high = np.searchsorted(view.block, (first, last))
        found = np.zeros(last - first, bool)
        found[view.block[low:high] - first] = ~view.gone[low:high]
        return found

    def committed(self) -> dict[int, int]:
        """Return the newest attempt of each committed block, in the order of blocks, without reading its entry."""
        view = self._view()
        there = ~view.gone
        return dict(zip(view.block[there].tolist(), view.attempt[there].tolist(), strict=True))

    def tried(self) -> dict[int, int]:
        """Return the newest attempt of blocks that were committed once and taken out."""
        view = self._view()
        return dict(
            zip(view.block[view.gone].tolist(), view.attempt[view.gone].tolist(), strict=True)
        )

    def trusted(self) -> dict[int, int]:
        """Return `committed()` after reading what was not moved yet; raise LedgerError for what cannot be trusted."""
        view = self._view()
        # A segment that cannot be read could have held any block: nothing is skipped on the word of such a ledger.
        for error in view.errors:
            raise error
        there = ~view.gone
        newest = dict(zip(view.block[there].tolist(), view.attempt[there].tolist(), strict=True))
        loose = [item for item in view.loose.values() if newest.get(item.block) == item.attempt]
        for item, data in zip(
            loose, self.folder.read_all(item.name for item in loose), strict=True
        ):
            decode(data, item.name, item.block, self.fingerprint)
        return newest

    def entries(self) -> Iterator[Entry]:
        """Yield the newest entry of each committed block; raise LedgerError for a bad one."""
        for found in self.examine():
            if isinstance(found, Damage):
                raise found.error
            yield found

    def examine(self) -> Iterator[Entry | Damage]:
        """Yield the newest entry of each committed block, and what cannot be trusted."""
        view = self._view()
        for error in view.errors:
            name = next((n for n in self._segments.names() if n in str(error)), "")
            yield Damage(f"{SEGMENTS}/{name}", error, None)
        there = ~view.gone
        for at, name in enumerate(view.segments):
            mine = there & (view.source == at)
            newest = dict(zip(view.block[mine].tolist(), view.attempt[mine].tolist(), strict=True))
            if newest:
                yield from (
                    e for e in self._segments.entries(name) if newest.get(e.block) == e.attempt
                )
        yield from self._examine_files(view)

    def _examine_files(self, view: _View) -> Iterator[Entry | Damage]:
        """Yield the newest entries that are files."""
        mine = ~view.gone & (view.source == LOOSE)
        keys = zip(view.block[mine].tolist(), view.attempt[mine].tolist(), strict=True)
        loose = [view.loose[key] for key in keys]
        for item, data in zip(
            loose, self.folder.read_all(item.name for item in loose), strict=True
        ):
            # Between the listing and the read, `compact` put the entry into a segment.
            if isinstance(data, FileNotFoundError):  # it was moved meanwhile
                yield self.read(item.block)
                continue
            try:
                yield decode(data, item.name, item.block, self.fingerprint)
            except LedgerError as error:
                yield Damage(f"{INTERNAL}/ledger/{item.name}", error, item.block)

    def mixed(self, made_by: Mapping[str, str]) -> dict[tuple[tuple[str, str], ...], list[int]]:
        """Return in what makers differ from a run's `made_by`: (what, value) pairs → the blocks that they made."""
        found: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for block, maker in self._makers():
            if other := different(maker, made_by):
                found.setdefault(tuple(other.items()), []).append(block)
        return {other: sorted(blocks) for other, blocks in found.items()}

    def _makers(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield each committed block with what made it; what cannot be read is left out."""
        view = self._view()
        for at, name in enumerate(view.segments):
            mine = ~view.gone & (view.source == at)
            newest = dict(zip(view.block[mine].tolist(), view.attempt[mine].tolist(), strict=True))
            for block, attempt, maker in self._segments.makers(name) if newest else ():
                if newest.get(block) == attempt:
                    yield block, maker
        mine = ~view.gone & (view.source == LOOSE)
        keys = list(zip(view.block[mine].tolist(), view.attempt[mine].tolist(), strict=True))
        names = [view.loose[key].name for key in keys]
        files = self.folder.read_all(names)
        for (block, _), name, data in zip(keys, names, files, strict=True):
            with suppress(LedgerError):
                yield block, decode(data, name, block, self.fingerprint).made_by

    def read(self, block: int) -> Entry:
        """Read the newest entry of a committed block; raise LedgerError where there is none, or a bad one."""
        found = self.find(block)
        if found is None:
            raise LedgerError(f"the ledger has no entry of block {block}.")
        return found

    def find(self, block: int) -> Entry | None:
        """Return the newest entry of a block, None where it is not committed; raise LedgerError for a bad one."""
        # The entry may be moved between the listing and the read: the second view then finds it in its segment.
        for _ in range(2):
            view = self._view()
            at = int(np.searchsorted(view.block, block))
            if at == len(view.block) or view.block[at] != block or view.gone[at]:
                return None
            attempt = int(view.attempt[at])
            source = int(view.source[at])
            if source != LOOSE:
                return self._segments.entry(view.segments[source], block, attempt)
            item = view.loose[block, attempt]
            (data,) = self.folder.read_all([item.name])
            if not isinstance(data, FileNotFoundError):  # else it was moved meanwhile
                return decode(data, item.name, block, self.fingerprint)
        return None

    def commit(self, entry: Entry) -> bool:
        """Create an entry durably; return False where this block and attempt has one already.

        Raises RunMoved where the run's folder is no longer there.
        """
        # Creating the entry would make the folder of a run anew that was moved away, with nothing in it but that.
        if self._run.local is not None and not self._run.is_dir():
            raise RunMoved(f"{self._run} is gone: {GONE}")
        return self._run.create_whole(
            f"{INTERNAL}/ledger/{entry.block:08d}.{entry.attempt}.json", encode(entry)
        )

    def next_attempt(self, block: int) -> int:
        """Return the number of the next attempt at a block."""
        view = self._view()
        at = int(np.searchsorted(view.block, block))
        return 1 + (
            int(view.attempt[at]) if at < len(view.block) and view.block[at] == block else 0
        )

    def remove(self, *blocks: int) -> None:
        """Uncommit blocks: by a newer entry that says so, then by deleting the older ones that are files.

        The next attempt is higher still, so that what was computed from a block is told from what will be.
        """
        view = self._view()
        attempts = dict(zip(view.block.tolist(), view.attempt.tolist(), strict=True))
        for block in blocks:
            # The newer entry comes first and is durable: a crash before the older files are deleted leaves a block that
            # is out of the run either way.
            attempt = attempts.get(block, 0) + 1
            body = {"block": block, "attempt": attempt, "fingerprint": self.fingerprint}
            data = to_json(body | {"crc32c": json_sum(body)})
            self._run.create_whole(f"{INTERNAL}/ledger/{block:08d}.{attempt}.gone", data)
        chosen = set(blocks)
        names = [item.name for item in self._loose() if item.block in chosen and not item.gone]
        self.folder.delete_all(names)

    def marks(self) -> dict[int, str]:
        """Return the mark of each committed block: its attempt and a digest of its sums. Raises LedgerError."""
        newest = self.committed()
        if self._marked is None or self._marked[0] != newest:
            view = self._view()
            found = {
                block: mark
                for name in view.segments
                for block, attempt, mark in self._segments.marks(name)
                if newest.get(block) == attempt
            }
            for entry in self._examine_files(view):
                if isinstance(entry, Damage):
                    raise entry.error
                files = ((path, size, crc) for path, (size, crc) in entry.files.items())
                found[entry.block] = mark_of(entry.attempt, files)
            self._marked = newest, found
        return dict(self._marked[1])

    def drop_segment(self, path: str) -> None:
        """Delete a segment that cannot be trusted: what it held is computed again."""
        (self._run / SEGMENTS).delete_all([path.rpartition("/")[2]])

    def compact(self, least: int = COMPACT_AT) -> int:
        """Move the entries that are files into a new segment, if there are `least`; return how many were moved.

        The segment is durable before any entry is deleted. An entry that cannot be trusted stays where it is. Only the
        holder of the run's lock may do this.
        """
        loose = self._loose()
        if len(loose) < least:
            return 0
        # A crash after an earlier segment was written, and before its entries were deleted, leaves entries that are
        # in it already: they are only deleted now, not written twice.
        columns, _ = self._segments.columns()
        known = {
            pair for c in columns for pair in zip(c.block.tolist(), c.attempt.tolist(), strict=True)
        }
        rows = list[tuple[Entry, bool]]()
        moved = list[str]()
        for item, data in zip(
            loose, self.folder.read_all(item.name for item in loose), strict=True
        ):
            try:
                if item.gone:
                    entry = Entry(item.block, item.attempt, self.fingerprint, 0, 0, 0, {})
                else:
                    entry = decode(data, item.name, item.block, self.fingerprint)
            except LedgerError:
                continue
            moved.append(item.name)
            if (item.block, item.attempt) not in known:
                rows.append((entry, item.gone))
        # First the segment, durably; then the files. In between an entry is in both places and counts once.
        if rows:
            self._segments.write(rows)
        self.folder.delete_all(moved)
        return len(moved)

    def _view(self) -> _View:
        # Threads that asked before a listing began may share it; one that asks after it began may know of entries
        # that it missed, and lists again. A folder whose mark (its time of change) is the same has no new names.
        asked = time.monotonic()
        with self._lock:
            if self._seen is None or self._seen_at < asked:
                begun = time.monotonic()
                mark = [folder.quiet_mark() for folder in (self.folder, self._run / SEGMENTS)]
                if self._seen is None or self._seen.errors or None in mark or mark != self._mark:
                    self._seen = self._list()
                self._seen_at = begun
                self._mark = mark
            return self._seen

    def _list(self) -> _View:
        loose = self._loose()  # before the segments: see the module
        columns, errors = self._segments.columns()
        parts = [
            (c.block, c.attempt, c.gone, np.full(len(c.block), at)) for at, c in enumerate(columns)
        ]
        parts.append(
            (
                np.array([item.block for item in loose], np.int64),
                np.array([item.attempt for item in loose], np.int64),
                np.array([item.gone for item in loose], bool),
                np.full(len(loose), LOOSE),
            )
        )
        block, attempt, gone, source = map(np.concatenate, zip(*parts, strict=True))
        # Sorted by block, then attempt, then source; LOOSE is −1, so of an entry in both places the segment's row is
        # last. The last row of each block is the newest attempt.
        order = np.lexsort((source, attempt, block))
        newest = order
        if len(order):
            newest = order[np.append(np.diff(block[order]) != 0, True)]
        return _View(
            block[newest],
            attempt[newest],
            gone[newest],
            source[newest],
            {(item.block, item.attempt): item for item in loose},
            [c.name for c in columns],
            errors,
        )

    def _loose(self) -> list[Loose]:
        found = []
        for name in self.folder.file_names():
            stem, _, kind = name.rpartition(".")
            block, _, attempt = stem.partition(".")
            if kind in ("json", "gone") and block.isdecimal() and attempt.isdecimal():
                found.append(Loose(int(block), int(attempt), kind == "gone", name))
        return found
