"""The server's worker processes: started when there is work, kept while they are of use, ended with the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from headwater.service.documents import Json, JsonObject, read_json

IDLE_SECONDS = 300.0


class EndingError(RuntimeError):
    """The server is ending: what runs is left to the next start."""


@dataclass(frozen=True)
class Outcome:
    """How a request ended: "done" with its result, "refused" or "failed" with the reason, "cancelled"."""

    kind: str
    value: Json


class WorkerProcess:
    """One process; it answers one request at a time, and reads models in some folders alone."""

    def __init__(self, folder: Path, models: Sequence[Path] = ()) -> None:
        # The worker's directory is empty, so that no name of a model means a file by chance.
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headwater.service.jobs.process", *map(str, models)],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # Its own session, so that Ctrl-C at the server does not reach it, and killing takes its children too.
            start_new_session=True,
            env=_environment(),
        )
        self._write = threading.Lock()
        self._killed = False

    @property
    def alive(self) -> bool:
        """Whether it can take a request; not once it was killed, although it may not be gone yet."""
        return not self._killed and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(
        self,
        request: JsonObject,
        progress: Callable[[JsonObject], None],
        seconds: float | None,
    ) -> Outcome:
        """Send a request with its `id` and wait for its end; after `seconds` the process is killed."""
        late = threading.Event()
        timer = None
        if seconds is not None:
            timer = threading.Timer(seconds, self._end_late, (late,))
        try:
            if timer is not None:
                timer.start()
            self._send(request)
            assert self._process.stdout is not None
            for line in self._process.stdout:
                (kind, value), *_ = read_json(line).items()
                if kind != "progress":
                    return Outcome(kind, value)
                progress(value)
        except (OSError, ValueError):
            # The process is gone; below it is said how.
            pass
        finally:
            if timer is not None:
                timer.cancel()
        if late.is_set():
            self._process.wait()
            self.close()
            return Outcome(
                "refused", f"planning took longer than {seconds:g} seconds. Ask for less text."
            )
        return self._gone()

    def cancel(self, number: int) -> None:
        """Interrupt a request that runs, or will."""
        # A process that is gone needs no cancelling.
        with suppress(OSError, ValueError):
            self._send({"do": "cancel", "id": number})

    def kill(self) -> None:
        """End the process; what it did can be resumed."""
        self._killed = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let an idle process end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError, ValueError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._process.stdout.close()

    def _send(self, request: JsonObject) -> None:
        assert self._process.stdin is not None
        # A cancellation comes from another thread; lines must not mix.
        with self._write:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _end_late(self, late: threading.Event) -> None:
        late.set()
        self.kill()

    def _gone(self) -> Outcome:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:  # what it said made no sense
            self.kill()
            code = self._process.wait()
        self.close()
        what = f"exit code {code}"
        if code < 0:
            what = f"signal {-code}"
        # Nobody here killed it, so it was most likely the kernel, which takes workers first (oom_score_adj).
        hint = ""
        if code == -signal.SIGKILL:
            hint = " The memory may not have been enough: ask for a smaller block."
        return Outcome(
            "failed",
            f"the worker process ended with {what}.{hint} Finished blocks are kept; submit again.",
        )


class Workers:
    """A few processes, of which idle ones are used again, since loading torch takes seconds."""

    def __init__(self, folder: Path, models: Sequence[Path]) -> None:
        self._models = models
        self._folder = folder
        self._idle: list[WorkerProcess] = []
        self._all: set[WorkerProcess] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._timer: threading.Timer | None = None

    def take(self) -> WorkerProcess:
        """Return an idle process, or a new one."""
        with self._lock:
            if self._closed:
                raise EndingError("the server is ending.")
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                self._all.discard(worker)
            worker = WorkerProcess(self._folder, self._models)
            self._all.add(worker)
            return worker

    def give_back(self, worker: WorkerProcess) -> None:
        """Keep a process for later: the last one, for some minutes."""
        with self._lock:
            # One idle process is enough to answer a plan at once; each holds some hundred megabytes.
            keep = worker.alive and not self._closed and not self._idle
            if keep:
                self._idle.append(worker)
                self._plan_end()
            else:
                self._all.discard(worker)
        # Outside the lock, since the process may take seconds to end.
        if not keep:
            worker.close()

    def close(self) -> None:
        """End all processes, whatever they do."""
        with self._lock:
            self._closed = True
            workers = list(self._all)
            if self._timer is not None:
                self._timer.cancel()
        for worker in workers:
            worker.kill()

    def _plan_end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(IDLE_SECONDS, self._end_idle)
        self._timer.daemon = True
        self._timer.start()

    def _end_idle(self) -> None:
        with self._lock:
            idle = self._idle
            self._idle = []
            self._all.difference_update(idle)
        for worker in idle:
            worker.close()


def _environment() -> dict[str, str]:
    """Return our environment, in which the package is found from any directory."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
    }
