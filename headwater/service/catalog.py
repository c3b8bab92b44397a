"""The runs under the root: which there are, how far they are, and what is known to be damaged."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from headwater.service.documents import JsonObject
from headwater.service.places import NotHereError, inside, public
from headwater.service.settings import Settings
from headwater.store.entry import Entry, LedgerError
from headwater.store.files import FileState
from headwater.store.manifest import RunDamaged, RunError, manifest_path
from headwater.store.objects import StoreError
from headwater.store.place import Place, groups_in
from headwater.store.reader import Run, open_run
from headwater.store.verify import verify
from headwater.store.writer import INTERNAL

LISTED_DEPTH = 4
OPEN_RUNS = 32
FEW_ENTRIES = 16
SHOWN_PROBLEMS = 50
CHECKS = 8
STATES = {True: "complete", False: "unfinished"}


@dataclass
class Counted:
    """What the committed blocks hold together; entries are read once, since they never change."""

    # By block: attempt, sequences, tokens, bytes.
    seen: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self, run: Run) -> dict[str, int]:
        """Read the new entries; return blocks, sequences, tokens and bytes so far."""
        with self.lock:
            committed = run.ledger.committed()
            # `verify --repair` takes blocks out; a block that is computed again has a later attempt.
            for block in self.seen.keys() - committed.keys():
                del self.seen[block]
            new = set()
            for block, attempt in committed.items():
                seen = self.seen.get(block)
                if seen is None or seen[0] != attempt:
                    new.add(block)
            for e in _entries(run, new):
                self.seen[e.block] = (committed[e.block], e.last - e.first, e.n_tokens, e.n_bytes)
            counts = list(self.seen.values())
            return {
                "committed": len(counts),
                "complete": sum(n_sequences for _, n_sequences, _, _ in counts),
                "n_tokens": sum(n_tokens for _, _, n_tokens, _ in counts),
                "n_bytes": sum(n_bytes for _, _, _, n_bytes in counts),
            }


def _entries(run: Run, blocks: set[int]) -> Iterator[Entry]:
    """Yield the entries of some blocks: one by one where they are few, else all in one reading."""
    if len(blocks) <= FEW_ENTRIES:
        yield from (run.ledger.read(block) for block in sorted(blocks))
    else:
        yield from (entry for entry in run.ledger.entries() if entry.block in blocks)


class Opened(NamedTuple):
    """A run that is open, and the state of its manifest then."""

    state: FileState
    run: Run
    counted: Counted


class Catalog:
    """Find, open and describe the runs of a root. Open runs are kept, with their memory maps."""

    def __init__(self, settings: Settings) -> None:
        self.root = settings.root
        self.limits = settings.limits
        self._runs: dict[str, Opened] = {}
        # The runs that were read, the last one last: a dict keeps the order.
        self._read: dict[str, None] = {}
        self._lock = threading.Lock()
        # By run: how many blocks were committed at its last check, and what that found.
        self._damage: dict[str, tuple[int, JsonObject]] = {}
        self._to_check: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._waiting: set[str] = set()
        threading.Thread(target=self._check, daemon=True, name="quick checks").start()

    def names(self) -> list[str]:
        """List the runs by their path under the root, sorted."""
        return sorted(islice(self._walk(self.root, ""), self.limits.runs))

    def _walk(self, folder: Place, above: str) -> Iterator[str]:
        names = folder.folders()
        are_runs = folder.each(lambda name: _is_run(folder / name), names)
        for name, is_run in zip(names, are_runs, strict=True):
            # A Zarr group that is no run of ours is not walked: its arrays have a folder a chunk.
            deeper = above.count("/") + 1 < LISTED_DEPTH and not name.endswith(".analysis")
            if is_run:
                yield above + name
            elif deeper and not (folder / name / "zarr.json").is_file():
                yield from self._walk(folder / name, f"{above}{name}/")

    def summaries(self) -> list[JsonObject]:
        """Describe every run in a few values."""
        return self.root.each(self.summary, self.names())

    def open(self, name: str) -> Run:
        """Return a run, opened once; raise NotHereError where there is none.

        Of the runs that were read longest ago the memory maps are let go.
        """
        run = self._open(name).run
        with self._lock:
            self._read.pop(name, None)
            self._read[name] = None
            for old in list(self._read)[:-OPEN_RUNS]:
                del self._read[old]
                # Opened anew it has no memory maps; whoever still reads the old one keeps them alive.
                there = self._runs[old]
                self._runs[old] = Opened(there.state, open_run(there.run.path), there.counted)
        return run

    def _open(self, name: str) -> Opened:
        path = inside(self.root, name)
        try:
            state = manifest_path(path).state()
        except StoreError:
            raise
        except OSError:
            raise NotHereError(f"there is no run {name!r} here.") from None
        # A manifest is written once, so another state means another run under the same name.
        known = self._runs.get(name)
        if known is not None and known.state == state:
            return known
        new = Opened(state, open_run(path), Counted())
        with self._lock:
            known = self._runs.get(name)
            if known is None or known.state != state:
                self._runs[name] = known = new
        return known

    def summary(self, name: str) -> JsonObject:
        """Describe a run in a few values; one that cannot be read says why."""
        try:
            opened = self._open(name)
            run = opened.run
            m = opened.run.manifest
            counts = opened.counted.update(opened.run)
        except StoreError:
            raise
        except NotHereError:
            return {"name": name, "state": "reading text"}
        except (RunError, RunDamaged, LedgerError, OSError) as error:
            return {"name": name, "state": "damaged", "error": public(str(error), self.root)}
        done = counts["committed"] >= m.n_blocks
        return {
            "name": name,
            "state": STATES[done],
            "model": m.model["name"].rpartition("/")[2],
            "n_layer": m.model["config"]["n_layer"],
            "n_head": m.model["config"]["n_head"],
            "d_model": m.model["config"]["d_model"],
            "n_sequences": m.n_sequences,
            "n_positions": m.n_positions,
            "n_blocks": m.n_blocks,
            **counts,
            "sites": list(run.sites),
            "fingerprint": m.fingerprint,
            "text": [source_name(source["path"]) for source in m.text["sources"]][:20],
            "made": int(opened.state.modified),
            "damage": self.damage(name, counts["committed"], done),
        }

    def describe(self, name: str) -> JsonObject:
        """Describe a run with its arrays, its provenance and the results of its analyses."""
        run = self.open(name)
        m = run.manifest
        arrays = [
            {
                "name": s.name,
                "title": s.attributes.get("title", ""),
                "dtype": s.dtype,
                "codec": s.codec,
                "dims": s.dims,
                "sizes": dict(zip(s.dims, s.shape, strict=True)),
                "n_bytes": s.stored_bytes(m.n_sequences),
                "transformer_lens": s.attributes.get("transformer_lens"),
            }
            for s in m.arrays
        ]
        coordinates = {
            spec.axis: run.leads(spec.name) for spec in m.arrays if spec.axis is not None
        }
        heads = run.coordinate("head")
        if heads is not None:
            coordinates["head"] = heads.tolist()
        # Where the server's texts lie is no concern of its clients.
        sources = [{**source, "path": source_name(source["path"])} for source in m.text["sources"]]
        return self.summary(name) | {
            "arrays": arrays,
            "config": json.loads(public(json.dumps(m.config), self.root)),
            "model_config": m.model["config"],
            "model_digest": m.model["digest"],
            "made_by": m.made_by,
            "sources": sources,
            "packing": m.text["packing"],
            "text_digest": m.text["digest"],
            "coordinates": coordinates,
            "labels": [label for label in run.path.folders() if label.startswith("label_")],
            "tokenizer": "tokenizer.json" in m.statics,
            "analyses": self.analyses(name),
            "incomplete": missing_ranges(run),
        }

    def analyses(self, name: str) -> list[str]:
        """List the saved results of a run."""
        return groups_in(inside(self.root, f"{name}.analysis"))

    def damage(self, name: str, committed: int, done: bool) -> JsonObject | None:
        """Return what the last check found, None before the first; order a quick check where blocks came since.

        In an object store, where every file costs requests, a run is checked when it is done.
        """
        at, found = self._damage.get(name, (-1, None))
        due = done or self.root.local is not None
        if at != committed and due and name not in self._waiting:
            self._damage[name] = (committed, found or {})
            self._waiting.add(name)
            self._to_check.put(name)
        return found or None

    def set_damage(self, name: str, found: JsonObject) -> None:
        """Note what a whole check of a run found."""
        self._damage[name] = (self._damage.get(name, (-1, {}))[0], found)

    def _check(self) -> None:
        """Compare lengths and shard indexes, run by run; a thread that lives as long as the server."""
        while True:
            name = self._to_check.get()
            self._waiting.discard(name)
            try:
                run = self.open(name)
                # Files on this machine take no longer one by one; a store answers many requests at once.
                workers = 1 if self.root.remote is None else CHECKS
                report = verify(run, quick=True, workers=workers)
                problems = []
                for problem in report.problems:
                    what = public(problem.what, self.root)
                    problems.append({"path": problem.path, "what": what})
                found = {
                    "checked": "lengths and indexes",
                    "n_problems": len(problems),
                    "problems": problems[:SHOWN_PROBLEMS],
                }
                self._damage[name] = (self._damage[name][0], found)
            except Exception as error:
                # A run that cannot even be checked says so; this thread must go on with the others.
                found = {
                    "checked": "no",
                    "n_problems": 0,
                    "problems": [],
                    "error": public(str(error), self.root),
                }
                self._damage[name] = (self._damage[name][0], found)


def _is_run(path: Place) -> bool:
    return manifest_path(path).is_file() or (path / INTERNAL / "unfinished").is_file()


def source_name(path: str) -> str:
    """Return the name of a source without the folders of the machine that it was read on."""
    return path.rpartition("/")[2] or path


def complete_mask(run: Run, first: int, last: int) -> np.ndarray:
    """Say of the sequences [first, last) which are committed, from the ledger."""
    block = run.manifest.block
    # Sequences commit by the block: look up the blocks [first // block, ceil(last / block)), then spread them out.
    first_block = first // block
    blocks = run.ledger.holds(first_block, -(-last // block))
    return blocks[np.arange(first, last) // block - first_block]


def missing_ranges(run: Run, most: int = 100) -> list[tuple[int, int]]:
    """List the ranges of sequences that are not committed, `most` at most."""
    committed = run.ledger.committed()
    m = run.manifest
    found: list[tuple[int, int]] = []
    for block in range(m.n_blocks):
        if block in committed:
            continue
        first, last = m.block_range(block)
        # Ranges that touch are one.
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        elif len(found) == most:
            break
        else:
            found.append((first, last))
    return found
