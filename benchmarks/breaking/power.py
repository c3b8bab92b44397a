"""Replay a power loss: of a recorded extraction only what was synced survives, or what the disk happened to write too.

The model is POSIX's at its strictest. Bytes of a file are safe after an fsync of the file, a name after an fsync of its
directory; until then each may be lost, kept, or (bytes) kept in part, in any combination.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from headwater.benchmarks.breaking import faults
from headwater.benchmarks.lib.rows import Row
from headwater.extractor.request import RunConfig
from headwater.extractor.run import extract
from headwater.store.ledger import Ledger
from headwater.store.manifest import manifest_path, read_manifest

CALLS = (*faults.CHANGES, "open", "close")
MODES = ("only what was synced", "every name, no unsynced bytes", "some of both")
CRASHES = 4
Event = tuple[Any, ...]


@dataclass(eq=False)
class Node:
    """A file or a directory: as processes see it, and as it would be found after a power loss."""

    data: bytearray = field(default_factory=bytearray)
    safe_data: bytes = b""
    names: dict[str, Node] | None = None
    safe_names: dict[str, Node] = field(default_factory=dict)

    def sync(self) -> None:
        """Make the present state the safe one."""
        if self.names is None:
            self.safe_data = bytes(self.data)
        else:
            self.safe_names = dict(self.names)

    def survive(self, path: Path, mode: str, random: np.random.Generator) -> None:
        """Write what is left of it to `path`."""
        if self.names is None:
            lost = bytes(len(self.data))
            half = len(self.data) // 2
            could_be = [
                self.safe_data,
                self.safe_data or lost,
                bytes(self.data),
                bytes(self.data[:half]) + lost[half:],
            ]
            kept = int(random.integers({MODES[0]: 1, MODES[1]: 2, MODES[2]: 4}[mode]))
            path.write_bytes(could_be[kept] if self.data != self.safe_data else self.safe_data)
            return
        path.mkdir(exist_ok=True)
        if mode == MODES[0]:
            names = self.safe_names
        else:
            names = dict(self.names)
        if mode == MODES[2]:
            for name in sorted(self.names.keys() | self.safe_names.keys()):
                node = (self.names if random.integers(2) else self.safe_names).get(name)
                names.pop(name, None)
                if node is not None:
                    names[name] = node
        for name, node in names.items():
            node.survive(path / name, mode, random)


class Disk:
    """What recorded operations make of an empty directory."""

    def __init__(self, events: list[Event]) -> None:
        self.top = Node(names={})
        self.committed: set[int] = set()
        self._open: dict[int, tuple[Node, list[int]]] = {}
        for name, *rest in events:
            getattr(self, f"_{name}")(*rest)

    def _find(self, path: str) -> tuple[dict[str, Node], str]:
        node = self.top
        *folders, name = path.split("/")
        for folder in folders:
            node = (node.names or {})[folder]
        return node.names or {} if node.names is None else node.names, name

    def _get(self, path: str) -> Node | None:
        if path == ".":
            return self.top
        names, name = self._find(path)
        return names.get(name)

    def _opened(self, path: str, flags: int, handle: int) -> None:
        node = self._get(path)
        if node is None:
            node = Node()
            names, name = self._find(path)
            names[name] = node
        if flags & os.O_TRUNC:
            del node.data[:]
        self._open[handle] = (node, [0])

    def _closed(self, handle: int) -> None:
        self._open.pop(handle, None)

    def _wrote(self, handle: int, data: bytes, offset: int | None) -> None:
        if handle in self._open:
            node, at = self._open[handle]
            start = at[0]
            if offset is not None:
                start = offset
            node.data.extend(bytes(max(start - len(node.data), 0)))
            node.data[start : start + len(data)] = data
            at[0] += len(data) if offset is None else 0

    def _ftruncate(self, handle: int, length: int) -> None:
        if handle in self._open:
            node = self._open[handle][0]
            del node.data[length:]
            node.data.extend(bytes(length - len(node.data)))

    def _fsync(self, handle: int) -> None:
        if handle in self._open:
            self._open[handle][0].sync()

    def _mkdir(self, path: str) -> None:
        names, name = self._find(path)
        names[name] = Node(names={})

    def _unlink(self, path: str) -> None:
        names, name = self._find(path)
        names.pop(name, None)

    _rmdir = _unlink

    def _link(self, source: str, target: str) -> None:
        node = self._get(source)
        if node is not None:
            names, name = self._find(target)
            names[name] = node

    def _replace(self, source: str, target: str) -> None:
        self._link(source, target)
        self._unlink(source)

    def _commit(self, block: int) -> None:
        self.committed.add(block)

    def _new_process(self) -> None:
        self._open.clear()


def recorder(top: Path, events: list[Event]) -> faults.Hook:
    """Return a hook that appends what succeeds below `top` to `events`."""

    def place(path: Any, folder: int | None = None) -> str | None:
        if folder is not None:
            base = os.readlink(f"/proc/self/fd/{folder}")
        else:
            base = os.getcwd()
        whole = os.path.abspath(os.path.join(base, os.fspath(path)))
        if whole == str(top) or whole.startswith(f"{top}/"):
            return os.path.relpath(whole, top)
        return None

    def hook(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Row) -> Any:
        folder = kwargs.get("dir_fd")
        paths = []
        if name in ("open", "mkdir", "unlink", "rmdir"):
            paths = [place(args[0], folder)]
        if name in ("replace", "rename", "link"):
            paths = [place(args[0]), place(args[1])]
        result = function(*args, **kwargs)
        if None in paths:
            return result
        if name == "open":
            events.append(("opened", paths[0], args[1], result))
        elif name in ("write", "pwrite"):
            data = bytes(memoryview(args[1]).cast("B")[:result])
            events.append(("wrote", args[0], data, args[2] if name == "pwrite" else None))
        elif name == "close":
            events.append(("closed", *args))
        else:
            events.append(("replace" if name == "rename" else name, *(paths or args)))
        return result

    return hook


def record(config: RunConfig, end: int | Event | None = None) -> list[Event]:
    """Extract in a child and return its operations on disk; it crashes after `end` of them, or after making a name."""
    run = Path(config.out)
    events = list[Event]()
    note = recorder(run.parent, events)
    kept = run.parent.with_name(f"{run.parent.name}.events")

    def hook(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Row) -> Any:
        if (
            name in faults.CHANGES
            and events
            and end in (len(events), (events[-1][0], events[-1][-1]))
        ):
            _save(kept, events)
        return note(name, function, args, kwargs)

    def action() -> None:
        with faults.hooked(hook, CALLS):
            extract(
                config,
                lambda p: events.append(("commit", p.entry.block)) if p.entry is not None else None,
            )
        _save(kept, events)

    code = faults.in_child(action)
    assert code == faults.ENDED, f"exit code {code}"
    found: list[Event] = pickle.loads(kept.read_bytes())
    kept.unlink()
    return found


def _save(path: Path, events: list[Event]) -> None:
    with path.open("wb") as file:
        pickle.dump(events, file)
    os._exit(faults.ENDED)


def try_all(config: RunConfig, stride: int, jobs: int) -> Counter[str]:
    """Lose power after every `stride`-th operation of a run, and of runs that resume after a crash."""
    home = Path(config.out).parent
    reference = home / "reference" / "run"
    reference.parent.mkdir()
    whole = record(replace(config, out=str(reference)))
    expected = faults.contents(reference)
    traces = [(whole, 0)]
    ends: list[Any] = [len(whole) * i // (CRASHES + 1) for i in range(1, CRASHES + 1)]
    named = [(e[0], e[-1]) for e in whole if e[0] in ("mkdir", "replace", "link")]
    ends += [end for end in named if re.fullmatch(r"run(/headwater(/ledger.*|/[^/]*)?)?", end[1])]
    for i, end in enumerate(ends):
        again = replace(config, out=str(home / f"again-{i}" / "run"))
        Path(again.out).parent.mkdir()
        first = record(again, end)
        traces.append(([*first, ("new_process",), *record(again)], len(first)))
        shutil.rmtree(Path(again.out).parent)
    points = [
        (i, n, mode)
        for i, (events, start) in enumerate(traces)
        for n in range(len(events), start - 1, -stride * (len(ends) if i else 1))
        for mode in MODES
    ]

    def trial(point: tuple[int, int, str]) -> str:
        i, n, mode = point
        top = home / "-".join(map(str, (i, n, MODES.index(mode))))
        disk = Disk(traces[i][0][:n])
        disk.top.survive(top, mode, np.random.default_rng([i, n]))
        code = faults.in_child(
            lambda: _checked(replace(config, out=str(top / "run")), expected, disk.committed)
        )
        shutil.rmtree(top)
        if code:
            print(
                f"trace {i}, power lost after event {n}, {mode}: exit code {code}", file=sys.stderr
            )
        if code:
            return "wrong"
        return "lost and resumed"

    events = Counter({"events": sum(len(events) for events, _ in traces)})
    return Counter(faults.spread(points, trial, jobs)) | events


def _checked(config: RunConfig, expected: dict[str, bytes], committed: set[int]) -> None:
    """Check that what was reported as committed is there and right, resume, and check the whole."""
    run = Path(config.out)
    faults.check_survivors(run, expected)
    if committed:
        found: set[int] = set()
        if manifest_path(run).exists():
            found = set(Ledger(run, read_manifest(run).fingerprint).committed())
        assert committed <= found, f"of the reported blocks {committed} the ledger has {found}"
    extract(config)
    faults.check_survivors(run, expected)
    assert faults.contents(run).keys() == expected.keys()
