"""Compute blocks on Ray actors. This is the only module that imports ray.

Actors pull blocks two deep, write their own shards and their own ledger entries; nothing but block numbers and entries
passes through Ray. Ids are read from the run, weights from a file of each node.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwater.extractor.config import RunConfig
from headwater.extractor.node_weights import load_local, publish
from headwater.extractor.weights import Checkpoint
from headwater.store.ledger import Entry, Ledger
from headwater.store.manifest import Manifest

IN_FLIGHT = 2
MAX_FAILURES = 3
START_SECONDS = 120


class BlocksFailed(RuntimeError):
    """Some blocks failed every time; the others are committed."""


class WorkersLost(RuntimeError):
    """No worker is left, or none could start; what was committed stays."""


class BlockActor:
    """One process with a model and a writer; Ray makes it an actor."""

    def __init__(self, run: str, config: dict[str, Any], digest: str, nonce: str, threads: int) -> None:
        import torch

        from headwater.extractor.model import Model
        from headwater.extractor.run import plan_of
        from headwater.extractor.worker import Worker
        from headwater.store.manifest import read_manifest

        path = Path(run)
        if not (path / "headwater" / "tmp" / nonce).exists():
            raise RuntimeError(
                f"node {socket.gethostname()} does not see the run at {run}. Put --out on storage that "
                "every node mounts at the same path."
            )
        torch.set_num_threads(threads)
        settings = RunConfig(**config)
        manifest = read_manifest(path)
        checkpoint = load_local(path, digest)
        plan = plan_of(settings, checkpoint, manifest)
        self.ledger = Ledger(path, manifest.fingerprint)
        model = Model(checkpoint, settings.compute)
        self.worker = Worker(path, manifest, plan, model, settings.on_overflow == "keep")

    def ready(self) -> str:
        """Say where this worker is, once it has loaded its model."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def extract(self, block: int, attempt: int) -> dict[str, Any]:
        """Compute and commit one block; return its ledger entry."""
        entry = self.worker.extract_block(block, attempt)
        self.ledger.commit(entry)
        return asdict(entry)


@dataclass
class _Seat:
    """One actor of the pool and what it has in flight, oldest first."""

    actor: Any
    starting: Any | None
    since: float
    flying: deque[tuple[Any, int]] = field(default_factory=deque)


class RayPool:
    """A pool of actors for one run: `with RayPool(...) as pool: for entry in pool.run(blocks): ...`."""

    def __init__(self, config: RunConfig, run: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
        import ray

        self._ray = ray
        self._run, self._manifest, self._config = run, manifest, config
        self._n = config.workers or 1
        self._local = config.ray is None
        self._threads = config.threads or max((os.cpu_count() or 1) // self._n, 1)
        self._nonce = f"seen-{uuid.uuid4().hex}"
        self._failures: dict[int, int] = {}
        self._reasons: dict[int, str] = {}
        self._lost = 0
        (run / "headwater" / "tmp" / self._nonce).touch()
        self._weights = publish(run, checkpoint)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self._local:
            self._folder = tempfile.mkdtemp(prefix="hw-ray-")
            ray.init(num_cpus=self._n, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
                     _temp_dir=self._folder, logging_level=logging.ERROR)  # fmt: skip
        elif not ray.is_initialized():
            ray.init(address=config.ray, log_to_driver=False, logging_level=logging.ERROR)
        self._seats = [self._hire() for _ in range(self._n)]

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self._seats:
            self._dismiss(seat)
        (self._run / "headwater" / "tmp" / self._nonce).unlink(missing_ok=True)
        self._weights.unlink(missing_ok=True)
        if self._local:
            self._ray.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, blocks: Sequence[int]) -> Iterator[Entry]:
        """Yield the entry of each block as it is committed, in any order.

        A block that fails three times, or is running three times while its worker dies, is given up; the others go on,
        and BlocksFailed is raised at the end. Raises WorkersLost when no worker is left to go on.
        """
        waiting = deque(blocks)
        ledger = Ledger(self._run, self._manifest.fingerprint)
        while waiting or any(seat.flying for seat in self._seats):
            self._seat_newcomers()
            for seat in self._seats:
                while waiting and seat.starting is None and len(seat.flying) < IN_FLIGHT:
                    block = waiting.popleft()
                    attempt = ledger.next_attempt(block) + self._failures.get(block, 0)
                    seat.flying.append((seat.actor.extract.remote(block, attempt), block))
            yield from self._collect(waiting)
        if self._reasons:
            listed = "; ".join(f"block {b} ({self._sequences(b)}): {why}" for b, why in sorted(self._reasons.items()))
            raise BlocksFailed(
                f"{len(self._reasons)} of {self._manifest.n_blocks} blocks failed {MAX_FAILURES} times, the "
                f"others are committed. {listed}"
            )

    def _collect(self, waiting: deque[int]) -> Iterator[Entry]:
        """Wait a moment for results, and put back what was lost."""
        references = [reference for seat in self._seats for reference, _ in seat.flying]
        references += [seat.starting for seat in self._seats if seat.starting is not None]
        if not references:
            raise WorkersLost("no worker is left and none could be started; run the same command again to go on.")
        done, _ = self._ray.wait(references, timeout=1.0)
        for reference in done:
            seat = next((s for s in self._seats if any(r == reference for r, _ in s.flying)), None)
            if seat is None:
                continue
            block = next(b for r, b in seat.flying if r == reference)
            try:
                entry = Entry(**self._ray.get(reference))
            except self._ray.exceptions.RayActorError:
                self._replace(seat, waiting)
                continue
            except self._ray.exceptions.RayTaskError as error:
                seat.flying = deque((r, b) for r, b in seat.flying if r != reference)
                self._note_failure(block, str(error.cause or error).strip().split("\n")[-1], waiting)
                continue
            seat.flying = deque((r, b) for r, b in seat.flying if r != reference)
            yield entry

    def _seat_newcomers(self) -> None:
        """Let workers that have loaded their model take blocks; report those that cannot start."""
        for seat in list(self._seats):
            if seat.starting is None:
                continue
            ready, _ = self._ray.wait([seat.starting], timeout=0)
            try:
                if ready:
                    self._ray.get(seat.starting)
                    seat.starting = None
                elif time.monotonic() - seat.since > START_SECONDS and all(s.starting is not None for s in self._seats):
                    raise WorkersLost(
                        f"no worker started within {START_SECONDS} s; the cluster has no room for "
                        f"{self._threads} CPUs a worker. Ask for fewer with --threads or --workers."
                    )
            except self._ray.exceptions.RayActorError as error:
                self._seats.remove(seat)
                if not self._seats:
                    raise WorkersLost(f"no worker could start: {_cause(error)}") from error

    def _replace(self, seat: _Seat, waiting: deque[int]) -> None:
        """Put back the blocks of a worker that died; the one it was computing counts as failed."""
        blocks = [block for _, block in seat.flying]
        self._seats.remove(seat)
        self._dismiss(seat)
        self._lost += 1
        committed = Ledger(self._run, self._manifest.fingerprint).committed()
        open_blocks = [block for block in blocks if block not in committed]
        for block in reversed(open_blocks[1:]):
            waiting.appendleft(block)
        if open_blocks:
            self._note_failure(open_blocks[0], "its worker died", waiting)
        self._seats.append(self._hire())

    def _note_failure(self, block: int, why: str, waiting: deque[int]) -> None:
        self._failures[block] = self._failures.get(block, 0) + 1
        if self._failures[block] < MAX_FAILURES:
            waiting.append(block)
        else:
            self._reasons[block] = why

    def _hire(self) -> _Seat:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {"env_vars": {name: str(self._threads) for name in names}}
        cpus = 1 if self._local else self._threads
        actor_class = self._ray.remote(BlockActor)
        actor: Any = actor_class.options(num_cpus=cpus, max_restarts=0, runtime_env=environment).remote(
            str(self._run), asdict(self._config), self._manifest.model["digest"], self._nonce, self._threads
        )
        return _Seat(actor, actor.ready.remote(), time.monotonic())

    def _dismiss(self, seat: _Seat) -> None:
        try:
            self._ray.kill(seat.actor)
        except Exception:  # already dead
            return

    def _sequences(self, block: int) -> str:
        first, last = self._manifest.block_range(block)
        return f"sequences {first} to {last - 1}"


def _cause(error: Exception) -> str:
    return str(error).strip().split("\n")[-1]
