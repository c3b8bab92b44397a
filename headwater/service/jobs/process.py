"""A worker process of the server: it takes requests on standard input, one JSON line each, and answers in lines.
Its arguments are the folders from which models may be read, whoever names them: a job, or the run that a job reads.

It dies with the server: when standard input ends, whatever it was doing stops at once, and can be resumed.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from headwater.extractor.edits.places import switch_calls_off
from headwater.extractor.model import places as model_places
from headwater.service.documents import Json, JsonObject
from headwater.service.jobs import tasks

LOCK_SECONDS = 60.0
PROGRESS_SECONDS = 0.1


class Channel:
    """The way back to the server: lines of JSON."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._last = 0.0

    def send(self, kind: str, value: Json) -> None:
        """Send one answer."""
        with self._lock:
            self._stream.write(json.dumps({kind: value}) + "\n")
            self._stream.flush()

    def progress(self, value: JsonObject, always: bool = False) -> None:
        """Send progress, ten times a second at most."""
        now = time.monotonic()
        if always or now - self._last >= PROGRESS_SECONDS:
            self._last = now
            self.send("progress", value)


class Requests:
    """Requests from standard input, read by a thread so that its end and a cancellation are seen at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.waiting = queue.SimpleQueue[JsonObject]()
        self._current: int | None = None
        self._cancelled: set[int] = set()
        signal.signal(signal.SIGINT, self._interrupt)
        threading.Thread(target=self._read, daemon=True, name="requests").start()

    def _read(self) -> None:
        for line in self._stream:
            request = json.loads(line)
            if request["do"] != "cancel":
                self.waiting.put(request)
            elif request["id"] not in self._cancelled:
                self._cancelled.add(request["id"])
                # The main thread may be in a C call, which only a signal to that very thread interrupts.
                if self._current == request["id"]:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        # The server is gone. What runs can be resumed, so nothing is worth a tidy end that may hang.
        os._exit(3)

    def _interrupt(self, *_: object) -> None:
        """Interrupt the current request, once; a signal that comes when it has ended means nothing."""
        if self._current is not None:
            self._current = None
            raise KeyboardInterrupt

    def begin(self, number: int) -> None:
        """Say which request runs; raise KeyboardInterrupt where it is cancelled already."""
        # In this order: a cancellation that comes in between is seen by one of the two.
        self._current = number
        if number in self._cancelled:
            self._current = None
            raise KeyboardInterrupt

    def end(self) -> None:
        """Say that nothing can be interrupted any more."""
        self._current = None


def main() -> int:
    """Answer requests until standard input ends."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        # Where memory ends, the job goes rather than the server.
        file.write("500")
    switch_calls_off("the server runs no code that a request or a run names.")
    model_places.allow_only(map(Path, sys.argv[1:]))
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    # What libraries print must not end up among the answers.
    os.dup2(2, 1)
    requests = Requests(sys.stdin)
    while True:
        kind, value = _answer(requests.waiting.get(), channel, requests)
        channel.send(kind, value)


def _answer(request: JsonObject, channel: Channel, requests: Requests) -> tuple[str, Json]:
    """Do what a request asks; return how it ended."""
    try:
        requests.begin(request["id"])
        table = tasks.PLANS if request["do"] == "plan" else tasks.RUNS
        function = table[request["kind"]]
        result = _when_free(function, request["document"], channel)
        requests.end()
        return "done", result
    except KeyboardInterrupt:
        return "cancelled", None
    except ValueError as error:
        requests.end()
        return "refused", str(error)
    # SystemExit too, and the panics of libraries in Rust, which are no Exception: the process answers and lives on.
    except BaseException as error:
        requests.end()
        traceback.print_exc()
        return "failed", explain(error)


def explain(error: BaseException) -> str:
    """Say what went wrong, as the command line does."""
    from headwater.cli.entry import explain as in_words

    if not isinstance(error, Exception):
        error = RuntimeError(repr(error))
    return in_words(error)


def _when_free(function: tasks.Task, document: JsonObject, channel: Channel) -> Json:
    """Run a task, waiting a while where the worker of a server that was killed still holds the run."""
    from headwater.store.lock import LockedError

    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return function(document, channel.progress)
        except LockedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
