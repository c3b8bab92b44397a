"""Let an interrupted scan go on: the waiting nodes of its merge tree are kept in a file beside the run.

The tree is fixed, so a scan that went on gives the same bits as one that was not interrupted. A file is replaced as a
whole; it is derived data, so nothing is fsynced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zipfile
from typing import Any

import numpy as np

from headwater.analysis.engine.reducer import State
from headwater.store.place import Place

IDENTITY = "identity"
SENDING = 10
Node = tuple[int, int]
Nodes = dict[Node, list[State] | None]


class Checkpoint:
    """The kept states of one request, in `folder/<hash of the request>/pass<n>.npz`."""

    def __init__(self, folder: Place, request: Any, seconds: float) -> None:
        key = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[
            :16
        ]
        self.folder: Place = folder / key
        self.seconds = seconds
        self._saved = time.perf_counter()

    def load(self, at: str) -> Nodes:
        """Return the nodes of a pass that are kept; none where there is no readable file."""
        nodes: Nodes = {}
        try:
            with (
                self._path(at).open("rb") as file,
                np.load(file, allow_pickle=False) as data,
            ):
                if str(data[IDENTITY]) != self._identity(at):
                    return {}
                names = [(name, name.split("|")) for name in data.files if name != IDENTITY]
                for name, (level, index, *rest) in names:
                    node = int(level), int(index)
                    states = nodes.setdefault(node, None if not rest else [])
                    if rest and states is not None:
                        reducer = int(rest[0])
                        array = rest[1]
                        states.extend({} for _ in range(reducer + 1 - len(states)))
                        if array:
                            states[reducer][array] = data[name]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return {}
        return nodes

    def save(self, at: str, nodes: Nodes, now: bool = False) -> None:
        """Keep the nodes of a pass, unless that was done less than `seconds` ago."""
        if not now and time.perf_counter() - self._saved < self.seconds:
            return
        arrays: dict[str, np.ndarray] = {IDENTITY: np.array(self._identity(at))}
        for (level, index), states in nodes.items():
            if states is None:
                arrays[f"{level}|{index}"] = np.zeros(0)
            for i, state in enumerate(states or ()):
                arrays[f"{level}|{index}|{i}|"] = np.zeros(0)
                arrays |= {f"{level}|{index}|{i}|{name}": value for name, value in state.items()}
        path = self._path(at)
        start = time.perf_counter()
        with path.writing() as file:
            _write(file, arrays)
        if path.remote is not None:
            # What is kept can have gigabytes: a scan does not spend more than a tenth of its time on sending it.
            self.seconds = max(self.seconds, SENDING * (time.perf_counter() - start))
        self._saved = time.perf_counter()

    def clear(self) -> None:
        """Delete what is kept: the request is answered."""
        with contextlib.suppress(FileNotFoundError):
            self.folder.delete_tree()
        if self.folder.local is not None:
            with contextlib.suppress(OSError):
                self.folder.local.parent.rmdir()

    def _identity(self, at: str) -> str:
        """Return what the file of a pass says of itself, so that another's is not taken for it."""
        return f"{self.folder.name} {at}"

    def _path(self, at: str) -> Place:
        return self.folder / f"pass{at}.npz"


def _write(file: Any, arrays: dict[str, Any]) -> None:
    np.savez(
        file, **arrays
    )  # with allow_pickle, numpy before 2.2 would write an array of that name
    file.flush()
