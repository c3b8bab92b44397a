"""Start the server: one for a root, listening where it was told, ended by Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import uvicorn
from anyio.to_thread import current_default_thread_limiter

from headwater.extractor.units import count, show_bytes
from headwater.service.catalog import Catalog
from headwater.service.connections import Connections
from headwater.service.data.texts import clear_uploads
from headwater.service.jobs.scheduler import Executor
from headwater.service.jobs.table import JobQueue
from headwater.service.routes import make_app
from headwater.service.settings import Settings
from headwater.store.place import Place

BACKLOG = 2000
SWEEP_TICKS = 10  # of a tenth of a second
STORE_THREADS = 40


def serve(settings: Settings) -> None:
    """Serve until a signal ends it; raise ValueError where the root is served already or the port is taken."""
    settings.state.mkdir(mode=0o700, exist_ok=True)
    # The lock before the port: of two servers of one root the second must not touch the queue, whatever its port.
    with _one_server(settings), _listen(settings) as listener:
        port = listener.getsockname()[1]
        settings = Settings(**{**vars(settings), "port": port})
        with closing(_open_queue(settings)) as jobs:
            executor = Executor(settings, jobs, catalog := Catalog(settings))
            app = make_app(settings, jobs, catalog, executor)
            config = uvicorn.Config(
                app,
                http=app.connections.protocol(),
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # Clients follow events for hours; the end does not wait for them.
                timeout_graceful_shutdown=1,
                timeout_keep_alive=30,
                lifespan="off",
                limit_concurrency=app.connections.most + 1,
                ws="none",
            )
            try:
                # Only now, with the lock held, nobody else can be uploading.
                clear_uploads(settings.local)
                _say(settings, executor.start())
                _Server(config, threads_for(settings.root), app.connections).run(sockets=[listener])
            finally:
                executor.close()


class _Server(uvicorn.Server):
    """A server that leaves KeyboardInterrupt to whoever started it, and ends once."""

    def __init__(self, config: uvicorn.Config, threads: int, connections: Connections) -> None:
        super().__init__(config)
        self._threads = threads
        self._connections = connections
        connections.open = self.server_state.connections

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        current_default_thread_limiter().total_tokens = self._threads
        await super().serve(sockets)

    async def on_tick(self, counter: int) -> bool:
        if counter % SWEEP_TICKS == 0:
            self._connections.sweep()
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again after it ended, which looks like a crash to whoever started us.
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _open_queue(settings: Settings) -> JobQueue:
    """Open the queue; raise RuntimeError where its file cannot be read or written."""
    path = settings.state / "jobs.sqlite"
    try:
        return JobQueue(path)
    except sqlite3.Error as error:
        raise RuntimeError(
            f"{path}, the queue of jobs, cannot be used ({error}). Free some space, or move the file away to begin a "
            "new queue."
        ) from error


def threads_for(root: Place) -> int:
    """Return how many requests may be worked on at once.

    Where they compute, more threads than processors only take turns, and take them from the thread that answers.
    """
    if root.remote is not None:
        return STORE_THREADS
    return (os.cpu_count() or 1) + 2


def _say(settings: Settings, resumed: int) -> None:
    print(f"headwater: serving {settings.root} at {settings.url}", file=sys.stderr)
    jobs = f"{count(settings.parallel, 'job')} at a time, {show_bytes(settings.memory)} of memory"
    more = ""
    if resumed:
        more = f"; going on with {count(resumed, 'job')} that the last server left"
    print(
        f"headwater: {jobs}{more}. Ctrl-C ends it; jobs go on at the next start.",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _one_server(settings: Settings) -> Iterator[None]:
    """Hold the lock of the root's queue, which dies with the process."""
    handle = os.open(settings.state / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{settings.root} is served already, by process {os.pread(handle, 20, 0).decode()}. One root has "
                "one server: use that one, or stop it."
            ) from None
        # The number is for people; what holds is the lock, which the kernel releases however a process ends.
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _listen(settings: Settings) -> socket.socket:
    """Return a listening socket; raise ValueError with what to do where there can be none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        raise ValueError(
            f"--host {settings.host} --port {settings.port} cannot be listened at: {error.strerror}. Choose another "
            "--port (0 takes any free one)."
        ) from error
