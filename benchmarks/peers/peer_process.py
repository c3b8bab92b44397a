"""A peer's driver as a process that waits for commands: load, begin a workload, step, read, peak."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.peers.environments import DRIVERS, HEADWATER, Peer, PeerMissing
from headwater.benchmarks.peers.truth import Place
from headwater.extractor.idle import IDLE_THREADS

KEEP_MEMORY = {
    "MALLOC_TOP_PAD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_MAX_": "0",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}


class PeerProcess:
    """One process in a peer's environment; `tell` sends a command, `hear` waits for its answer, `ask` does both."""

    def __init__(self, peer: Peer, python: str, log: Path, keep_memory: bool = False) -> None:
        self.peer = peer
        self.workloads: list[str] = []
        environment = {**os.environ, **OFFLINE, **(KEEP_MEMORY if keep_memory else {})}
        if peer is HEADWATER:
            environment |= IDLE_THREADS
        elif all(environment.get(name) == value for name, value in IDLE_THREADS.items()):
            environment = {
                name: value for name, value in environment.items() if name not in IDLE_THREADS
            }
        command = [python, "-P", str(DRIVERS / "serve.py"), str(DRIVERS / peer.driver)]
        self.log = log
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
            env=environment,
        )
        self.waiting = 1

    def tell(self, do: str, **request: Any) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `hear` says why
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        self.waiting += 1

    def hear(self) -> Row:
        """Return the answer to the last command; raise PeerMissing where any since the last answer failed."""
        assert self.process.stdout is not None
        answer: Row = {}
        while self.waiting:
            self.waiting -= 1
            if not (line := self.process.stdout.readline()):
                raise PeerMissing(
                    f"its process ended with code {self.process.wait()}; see {self.log}"
                )
            answer = json.loads(line)
            if "error" in answer:
                raise PeerMissing(answer["error"])
        return answer

    def ask(self, do: str, **request: Any) -> Row:
        """Send a command and return its answer."""
        self.tell(do, **request)
        return self.hear()

    def read(
        self, out: str, places: list[Place], batch: int, missing: bool = False
    ) -> tuple[list[np.ndarray | None], list[float]]:
        """Read values back through the driver; return them (None for what cannot be read) and the seconds of each."""
        into = self.log.with_suffix(f".{self.process.pid}.npz")
        answer = self.ask(
            "read", out=out, places=places, batch=batch, into=str(into), missing=missing
        )
        with np.load(into) as stored:
            values = [stored[str(i)] for i in range(len(places))]
        into.unlink()
        return [None if value.dtype.kind == "U" else value for value in values], answer["seconds"]

    def close(self) -> None:
        """End the process at once, by signal 9."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
