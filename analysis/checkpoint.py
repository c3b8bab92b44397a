"""Let an interrupted scan go on: the waiting nodes of its merge tree are kept in a file beside the run.

The tree is fixed, so a scan that went on gives the same bits as one that was not interrupted. A file is replaced as a
whole; it is derived data, so nothing is fsynced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.reducer import State

Node = tuple[int, int]
Nodes = dict[Node, list[State] | None]


class Checkpoint:
    """The kept states of one request, in `folder/<hash of the request>/pass<n>.npz`."""

    def __init__(self, folder: Path, request: Any, seconds: float) -> None:
        key = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder, self.seconds = folder / key, seconds
        self._saved = time.perf_counter()

    def load(self, at: str) -> Nodes:
        """Return the nodes of a pass that are kept; none where there is no readable file."""
        nodes: Nodes = {}
        try:
            with np.load(self._path(at), allow_pickle=False) as data:
                names = [(name, name.split("|")) for name in data.files]
                for name, (level, index, *rest) in names:
                    node = int(level), int(index)
                    states = nodes.setdefault(node, None if not rest else [])
                    if rest and states is not None:
                        reducer, array = int(rest[0]), rest[1]
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
        arrays: dict[str, np.ndarray] = {}
        for (level, index), states in nodes.items():
            if states is None:
                arrays[f"{level}|{index}"] = np.zeros(0)
            for i, state in enumerate(states or ()):
                arrays[f"{level}|{index}|{i}|"] = np.zeros(0)
                arrays |= {f"{level}|{index}|{i}|{name}": value for name, value in state.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path(at).with_suffix(f".{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(self._path(at))
        self._saved = time.perf_counter()

    def clear(self) -> None:
        """Delete what is kept: the request is answered."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _path(self, at: str) -> Path:
        return self.folder / f"pass{at}.npz"
