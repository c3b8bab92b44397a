"""Talk to a server from the command line, with nothing but the standard library."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headwater.service.documents import JsonObject

# Longer than the server takes to plan a job (Limits.plan_seconds and Limits.seconds together).
SECONDS = 200.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Take no redirect: the token would go with the request, to wherever an answer says."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class Client:
    """A server by its URL. Raises ValueError for what the server refuses, RuntimeError where it cannot be reached."""

    def __init__(self, server: str, token_file: str | None = None) -> None:
        # urllib would open file: and ftp: too.
        parts = urllib.parse.urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(
                f"--server is {server!r}; expected an address such as http://127.0.0.1:8000."
            )
        self.url = server.rstrip("/")
        token = os.environ.get("HEADWATER_TOKEN", "")
        if token_file is not None:
            try:
                token = Path(token_file).expanduser().read_text().strip()
            except (OSError, ValueError) as error:
                raise ValueError(f"--token-file {token_file} cannot be read: {error}.") from error
        self._headers = {}
        if token:
            self._headers["authorization"] = f"Bearer {token}"

    def get(self, path: str) -> Any:
        """Return the JSON at a path."""
        return self._ask("GET", path)

    def post(self, path: str, value: Any = None) -> Any:
        """Send JSON; return the answer's."""
        return self._ask("POST", path, json.dumps(value).encode(), "application/json")

    def put(self, path: str, data: bytes) -> Any:
        """Send bytes; return the answer's JSON."""
        return self._ask("PUT", path, data, "application/octet-stream")

    def follow(self, since: int) -> Iterator[JsonObject]:
        """Yield jobs as they change, from the state of `since` on; ends when the connection does."""
        with self._open("GET", f"/events?since={since}") as answer:
            # Server-sent events: "data: " lines carry the job, others are comments and numbers of events.
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    def _ask(self, method: str, path: str, data: bytes | None = None, kind: str = "") -> Any:
        with self._open(method, path, data, kind) as answer:
            return json.load(answer)

    def _open(self, method: str, path: str, data: bytes | None = None, kind: str = "") -> Any:
        headers = dict(self._headers)
        if kind:
            headers["content-type"] = kind
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            return _OPENER.open(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            # The server answered: what it says is about the request, so the exit code is that of a wrong one.
            with error:
                raise ValueError(f"{self.url} refuses this: {_detail(error)}") from None
        except OSError as error:
            raise RuntimeError(
                f"{self.url} cannot be reached ({getattr(error, 'reason', error)}). Start it with `headwater serve "
                "ROOT`, or check --server."
            ) from error


def _detail(error: urllib.error.HTTPError) -> str:
    if 300 <= error.code < 400:
        place = error.headers.get("location", "nowhere")
        return (
            f"it sends on to {place!r}, which is not followed; name the right address as --server."
        )
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}."
