"""Compute blocks on Ray actors. This is the only module that imports ray.

Actors pull blocks two deep, write their own shards and their own ledger entries; nothing but block numbers and entries
passes through Ray. Ids are read from the run, weights from a file of each node.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwater.extractor.config import RunConfig
from headwater.extractor.node_weights import load, published
from headwater.extractor.roster import Roster
from headwater.extractor.weights import Checkpoint
from headwater.store.ledger import Entry, Ledger
from headwater.store.manifest import Manifest
from headwater.store.writer import INTERNAL

IN_FLIGHT = 2
MAX_FAILURES = 3
MAX_REFUSALS = 2
FAILURES_IN_A_ROW = 30
START_SECONDS = 300
JOIN_SECONDS = 20
TICK_SECONDS = 1.0
STORE_BYTES = 80 << 20
OWN_FOLDERS = Path("/tmp")  # not TMPDIR: the names of Ray's sockets must stay short
OWN_VARIABLES = {  # Ray asks clouds' metadata servers where it is, even with statistics off: send it nowhere
    "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": "localhost,127.0.0.1",
    "NO_PROXY": "localhost,127.0.0.1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}  # fmt: skip
OWN_SETTINGS = {"worker_niceness": 0}  # Ray's default starves its workers on a busy machine
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Notify = Callable[[str], None]


class BlocksFailed(RuntimeError):
    """Some blocks failed every time; the others are committed."""


class WorkersLost(RuntimeError):
    """No worker is left, or none could start; what was committed stays."""


class BlockActor:
    """One process with a model and a writer; Ray makes it an actor."""

    def __init__(self, run: str, config: dict[str, Any], digest: str, nonce: str, threads: int, shared: bool) -> None:
        import torch

        from headwater.extractor.model import Model
        from headwater.extractor.run import plan_of
        from headwater.extractor.worker import Worker
        from headwater.store.manifest import read_manifest

        path = Path(run)
        if not (path / INTERNAL / "tmp" / nonce).exists():
            raise RuntimeError(
                f"node {socket.gethostname()} does not see the run at {run}. Put --out on storage that "
                "every node mounts at the same path."
            )
        torch.set_num_threads(threads)
        settings = RunConfig(**config)
        manifest = read_manifest(path)
        checkpoint = load(path, digest, shared)
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
    """One actor of the pool and what it has in flight, oldest first; `since` it starts, or is at the oldest."""

    actor: Any
    starting: Any | None
    since: float
    name: str = ""
    flying: deque[tuple[Any, int]] = field(default_factory=deque)

    def take(self, reference: Any) -> int:
        """Take a block out of what is in flight."""
        block = next(b for r, b in self.flying if r == reference)
        self.flying.remove((reference, block))
        self.since = time.monotonic()
        return block


class RayPool:
    """A pool of actors for one run: `with RayPool(...) as pool: for entry in pool.run(blocks): ...`.

    `notify` is told about once a second what the workers do. Entering starts Ray or joins a cluster; leaving ends
    what was started and deletes every temporary file, also when entering fails half-way.
    """

    def __init__(
        self, config: RunConfig, run: Path, manifest: Manifest, checkpoint: Checkpoint, notify: Notify | None = None
    ) -> None:
        self._run, self._manifest, self._config, self._checkpoint = run.absolute(), manifest, config, checkpoint
        self._notify, self._told = notify or (lambda text: None), 0.0
        self._n = config.workers or 1
        self._nonce = f"seen-{uuid.uuid4().hex}"
        self._seats: list[_Seat] = []
        self._attempts: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        self._in_a_row = 0
        self._reasons: dict[int, str] = {}
        self._refusal = ""
        self.roster = Roster()

    def __enter__(self) -> RayPool:
        seen = self._run / INTERNAL / "tmp" / self._nonce
        with ExitStack() as stack:
            stack.callback(seen.unlink, missing_ok=True)
            seen.touch()
            stack.enter_context(published(self._run, self._checkpoint))
            self._ray, self._local = stack.enter_context(_connection(self._config.ray, self._n))
            stack.callback(self._dismiss_all)
            self._threads = self._config.threads or self._fair_threads()
            for _ in range(self._n):
                self._hire()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, blocks: Sequence[int]) -> Iterator[Entry]:
        """Yield the entry of each block as it is committed, in any order.

        `blocks` have no entry yet. A block that fails three times, or is running three times while its worker dies, is
        given up; the others go on, and BlocksFailed is raised at the end, or when nothing but failures come. Raises
        WorkersLost when no worker is left to go on, and OSError when the disk is full.
        """
        waiting = deque(blocks)
        while waiting or any(seat.flying for seat in self._seats):
            self._seat_newcomers()
            self._hand_out(waiting)
            self._tell()
            for entry in self._collect(waiting):
                self._in_a_row = 0
                self.roster.add(entry)
                yield entry
        if self._reasons:
            listed = "; ".join(f"block {b} ({self._sequences(b)}): {why}" for b, why in sorted(self._reasons.items()))
            raise BlocksFailed(
                f"{len(self._reasons)} of {self._manifest.n_blocks} blocks failed {MAX_FAILURES} times, the "
                f"others are committed. {listed}"
            )

    def _hand_out(self, waiting: deque[int]) -> None:
        for depth in range(IN_FLIGHT):
            for seat in self._seats:
                if waiting and seat.starting is None and len(seat.flying) == depth:
                    block = waiting.popleft()
                    self._attempts[block] += 1
                    if not seat.flying:
                        seat.since = time.monotonic()
                    seat.flying.append((seat.actor.extract.remote(block, self._attempts[block]), block))

    def _collect(self, waiting: deque[int]) -> Iterator[Entry]:
        """Wait a moment for a result, and put back what was lost."""
        references = [reference for seat in self._seats for reference, _ in seat.flying]
        references += [seat.starting for seat in self._seats if seat.starting is not None]
        done, _ = self._ray.wait(references, timeout=TICK_SECONDS)
        for reference in done:
            seat = next((s for s in self._seats if any(r == reference for r, _ in s.flying)), None)
            if seat is None:
                continue
            try:
                entry = Entry(**self._ray.get(reference))
            except self._ray.exceptions.RayActorError as error:
                yield from self._replace(seat, waiting, error)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, OSError) and error.cause.errno in NO_ROOM:
                    raise error.cause from error
                self._note_failure(seat.take(reference), _last_line(error.cause or error), waiting)
                self._check_hope()
            except self._ray.exceptions.RayError as error:
                yield from self._settle([seat.take(reference)], waiting, error)
            else:
                seat.take(reference)
                yield entry

    def _seat_newcomers(self) -> None:
        """Let workers that have loaded their model take blocks; try others for those that cannot start."""
        starting = [seat for seat in self._seats if seat.starting is not None]
        for seat in starting:
            if not self._ray.wait([seat.starting], timeout=0)[0]:
                continue
            try:
                seat.name, seat.starting, seat.since = self._ray.get(seat.starting), None, time.monotonic()
            except self._ray.exceptions.RayError as error:
                self._seats.remove(seat)
                self._dismiss(seat)
                self.roster.n_refused += 1
                self._refusal = _last_line(error)
                if self.roster.n_refused <= MAX_REFUSALS * self._n:  # its node may have been the fault
                    self._hire()
        if not self._seats:
            raise WorkersLost(f"no worker could start: {self._refusal}")
        if all(s.starting is not None and time.monotonic() - s.since > START_SECONDS for s in self._seats):
            raise WorkersLost(
                f"no worker started within {START_SECONDS} s: the cluster has no room for {self._threads} CPUs a "
                "worker. Ask for fewer with --threads, or run the same command again when there is room."
            )

    def _replace(self, seat: _Seat, waiting: deque[int], error: Exception) -> Iterator[Entry]:
        """Hire another worker for one that died, and settle what it had in flight."""
        blocks = [block for _, block in seat.flying]
        self._seats.remove(seat)
        self._dismiss(seat)
        self.roster.n_lost += 1
        yield from self._settle(blocks, waiting, error)
        self._hire()

    def _settle(self, blocks: Sequence[int], waiting: deque[int], error: Exception) -> Iterator[Entry]:
        """Yield those of a lost worker's blocks that it committed; its first other one failed, the rest wait again."""
        ledger = Ledger(self._run, self._manifest.fingerprint)
        committed = ledger.committed()
        for block in blocks:
            if block in committed:
                yield ledger.read(committed[block], block)
        lost = [block for block in blocks if block not in committed]
        waiting.extendleft(reversed(lost[1:]))
        if lost:
            self._note_failure(lost[0], f"its worker died ({_last_line(error)})", waiting)

    def _note_failure(self, block: int, why: str, waiting: deque[int]) -> None:
        self._failures[block] += 1
        if self._failures[block] < MAX_FAILURES:
            self.roster.n_retries += 1
            waiting.append(block)
        else:
            self._reasons[block] = why
        self._last_failure = f"block {block} ({self._sequences(block)}): {why}"

    def _check_hope(self) -> None:
        """Stop where the fault is not one of single blocks."""
        self._in_a_row += 1
        if self._in_a_row >= FAILURES_IN_A_ROW:
            raise BlocksFailed(
                f"{self._in_a_row} attempts in a row failed, so the rest was not tried; what was committed before is "
                f"kept. The last was {self._last_failure}"
            )

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= TICK_SECONDS:
            self._told = now
            working = [seat for seat in self._seats if seat.starting is None]
            running = [(seat.name, seat.flying[0][1], now - seat.since) for seat in working if seat.flying]
            names = [seat.name for seat in working]
            self._notify(self.roster.text(names, len(self._seats) - len(working), running))

    def _fair_threads(self) -> int:
        """Share the cores among the workers: those of this machine, or of the cluster, within one node."""
        if self._local:
            return max((os.cpu_count() or 1) // self._n, 1)
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        return max(min(sum(cores) // self._n, max(cores, default=1)), 1)

    def _hire(self) -> None:
        threads = str(self._threads)
        variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        variables |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
        options = {"num_cpus": 1 if self._local else self._threads, "max_restarts": 0}
        actor_class = self._ray.remote(BlockActor).options(**options, runtime_env={"env_vars": variables})
        config = asdict(self._config)
        digest = self._manifest.model["digest"]
        actor: Any = actor_class.remote(str(self._run), config, digest, self._nonce, self._threads, self._local)
        self._seats.append(_Seat(actor, actor.ready.remote(), time.monotonic()))

    def _dismiss(self, seat: _Seat) -> None:
        with suppress(Exception):  # it is dead already, or Ray is
            self._ray.kill(seat.actor)

    def _dismiss_all(self) -> None:
        for seat in self._seats if not self._local else ():  # a Ray of our own ends with all that it started
            self._dismiss(seat)

    def _sequences(self, block: int) -> str:
        first, last = self._manifest.block_range(block)
        return f"sequences {first} to {last - 1}"


@contextmanager
def _connection(address: str | None, n_workers: int) -> Iterator[tuple[Any, bool]]:
    """Start a Ray of our own, join the one at an address, or use the one that this process is connected to already.

    Yield the module ray, and whether its only node is this machine. What was begun is ended afterwards.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with ExitStack() as stack:
        with _kept_handlers():
            import ray

            joined = ray.is_initialized()
            if not joined:
                _start(ray, address, n_workers, stack)
        yield ray, address is None and not joined


def _start(ray: Any, address: str | None, n_workers: int, stack: ExitStack) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        folder = stack.enter_context(_own_folder())
        stack.callback(ray.shutdown)  # before the folder goes
        stack.enter_context(_loopback())
        with _variables(OWN_VARIABLES):
            ray.init(num_cpus=n_workers, num_gpus=0, include_dashboard=False, object_store_memory=STORE_BYTES,
                     _node_ip_address="127.0.0.1", _temp_dir=str(folder), _system_config=OWN_SETTINGS,
                     **quiet)  # fmt: skip
        return
    stack.callback(ray.shutdown)
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), JOIN_SECONDS).close()  # Ray would try for minutes
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkersLost(
            f"--ray {address}: no Ray cluster can be joined there ({_last_line(error)}). Start one with `ray start "
            "--head`, or use --workers alone."
        ) from error


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Put back the handler of SIGTERM, which `ray.init` replaces by one that exits with another code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as stop:
        raise (KeyboardInterrupt if stop.code == signal.SIGTERM else stop) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _loopback() -> Iterator[None]:
    """Let Ray listen on 127.0.0.1 as it does on macOS; on Linux it replaces that address by one that others reach."""
    constants, name = sys.modules.get("ray._private.ray_constants"), "ENABLE_RAY_CLUSTER"
    if constants is None or not hasattr(constants, name):
        yield
        return
    before = getattr(constants, name)
    setattr(constants, name, False)
    try:
        yield
    finally:
        setattr(constants, name, before)


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while, for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _own_folder() -> Iterator[Path]:
    """Make a folder for a Ray of our own, under a lock that dies with us; delete it, and those of dead processes."""
    for lock in OWN_FOLDERS.glob("hw-ray-*/lock"):
        with suppress(OSError), open(lock) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _delete(lock.parent)
    folder = Path(tempfile.mkdtemp(prefix="hw-ray-", dir=OWN_FOLDERS))
    with open(folder / "new", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.replace(folder / "new", folder / "lock")
        try:
            yield folder
        finally:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a folder, the lock last: processes that are just ending may still write, then the next run deletes it."""
    for _ in range(50):
        items = [item for item in folder.iterdir() if item.name != "lock"]
        if not items:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for item in items:
            shutil.rmtree(item, ignore_errors=True)
            with suppress(OSError):
                item.unlink()
        time.sleep(0.05)


def _last_line(error: object) -> str:
    return str(error).strip().rsplit("\n", 1)[-1].strip()
