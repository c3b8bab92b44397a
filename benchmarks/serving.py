"""Start a real `headwater serve`, talk to it, and kill it."""

from __future__ import annotations

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

from headwater.service.client import Client

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
LIMIT = 180.0


class Server:
    """A server process on a free port; use it as a context manager."""

    def __init__(self, root: Path | str, *flags: str) -> None:
        self.root, self.flags, self.port = root, flags, free_port()
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
        command = [sys.executable, "-m", "headwater.cli", "serve", str(self.root), "--port", str(self.port)]
        environment = {**os.environ, **ENVIRONMENT}
        self._process = subprocess.Popen([*command, *self.flags], env=environment, stderr=subprocess.PIPE, text=True)
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

    def wait_for(self, number: int, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until a job is as wanted; return it."""
        end = time.monotonic() + LIMIT
        while not condition(job := self.client.get(f"/jobs/{number}")):
            if time.monotonic() > end:
                raise TimeoutError(f"job {number} did not come that far: {job}")
            time.sleep(0.02)
        return dict(job)

    def finish(self, number: int) -> dict[str, Any]:
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


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
