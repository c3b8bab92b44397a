"""Start a real `headwater serve`, talk to it, and kill it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwater.benchmarks.lib.rows import Row
from headwater.service.client import Client

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
LIMIT = 180.0
WITH_LIMITS = """
import json, sys
from dataclasses import replace
from headwater.service.server import serve
from headwater.service.settings import Limits, make_settings
settings = make_settings(sys.argv[1], port=int(sys.argv[2]))
serve(replace(settings, limits=Limits(**json.loads(sys.argv[3]))))
"""


class Server:
    """A server process on a free port, with other limits where they are given; use it as a context manager."""

    def __init__(self, root: Path | str, *flags: str, **limits: float) -> None:
        self.root, self.flags, self.port, self.limits = root, flags, free_port(), limits
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = Client(self.url)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process, and wait until it answers."""
        command = [
            sys.executable,
            "-m",
            "headwater",
            "serve",
            str(self.root),
            "--port",
            str(self.port),
        ]
        if self.limits:
            command = [sys.executable, "-c", WITH_LIMITS, str(self.root), str(self.port)]
            command.append(json.dumps(self.limits))
        environment = {**os.environ, **ENVIRONMENT}
        self._process = subprocess.Popen(
            [*command, *self.flags], env=environment, stderr=subprocess.PIPE, text=True
        )
        end = time.monotonic() + LIMIT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                raise RuntimeError(f"the server did not start: {self._process.communicate()[1]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End the process as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def stop(self) -> str:
        """End the process as Ctrl-C does; return what it wrote to standard error."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        return str(self._process.communicate(timeout=LIMIT)[1])

    def wait_for(self, number: int, condition: Callable[[Row], bool]) -> Row:
        """Wait until a job is as wanted; return it."""
        end = time.monotonic() + LIMIT
        while not condition(job := self.client.get(f"/jobs/{number}")):
            if time.monotonic() > end:
                raise TimeoutError(f"job {number} did not come that far: {job}")
            time.sleep(0.02)
        return dict(job)

    def finish(self, number: int) -> Row:
        """Wait until a job has ended; return it."""
        return self.wait_for(number, lambda job: job["state"] not in ("queued", "running"))

    def fetch(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        """Return status, headers and body of an answer; errors too."""
        request = urllib.request.Request(self.url + path, headers=headers, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return answer.status, answer.headers, answer.read()

    def _answers(self) -> bool:
        try:
            self.client.get("/health")
        except RuntimeError:
            return False
        return True


def memory_of(pid: int, what: str = "VmRSS") -> int:
    """Return the bytes of memory that a process has, or (VmHWM) had at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) << 10


def ask_and_wait(port: int, request: str) -> socket.socket:
    """Send a request, or a part of one, over a connection that takes little at a time; read nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect(("127.0.0.1", port))
    client.sendall(request.encode())
    return client


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
