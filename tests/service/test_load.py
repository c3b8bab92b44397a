"""Clients that do not ask, do not read, or do not send: what they hold is bounded in number, bytes and time."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest

import headwater
from headwater.benchmarks.lib.serving import Server, ask_and_wait, memory_of

LIMITS = {
    "connections": 40,
    "header_seconds": 1.0,
    "stall_seconds": 1.0,
    "slowest": 100e6,
    "flight_bytes": 80 << 20,
    "uploads": 1,
}
LEFT = ".old.txt.0123456789abcdef"
SLICE = "GET /runs/run/arrays/resid HTTP/1.1\r\nhost: localhost\r\n\r\n"
UPLOAD = "PUT /texts/{} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nsome"


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_gpt2):
    root = tmp_path_factory.mktemp("loaded")
    ids = np.random.default_rng(5).integers(0, 200, (4096, 32)).astype(np.int32)
    np.save(root / "ids.npy", ids)
    headwater.extract(
        headwater.RunConfig(
            out=str(root / "run"),
            model=str(tiny_gpt2),
            tokens=str(root / "ids.npy"),
            sites=("resid",),
            dtype="float32",
            block=1024,
        )
    )
    (root / "texts").mkdir()
    (root / "texts" / LEFT).write_text("of a server that was killed")
    return root


@pytest.fixture(scope="module")
def server(root):
    with Server(root, **LIMITS) as server:
        yield server
        log = server.stop()
    assert "Traceback" not in log, log


def closed(client, seconds):
    """Say whether the server ends a connection within a time."""
    client.settimeout(seconds)
    try:
        while client.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def quick(server):
    """Check that the server answers others at once."""
    begun = time.monotonic()
    assert server.fetch("/runs")[0] == 200 and time.monotonic() - begun < 1


def test_idle_connections_make_room_and_end(server):
    """More of them than there may be, half of them in the middle of a request's head."""
    clients = [ask_and_wait(server.port, "GET / HT" if i % 2 else "") for i in range(100)]
    quick(server)
    assert closed(clients[0], 0.5)
    assert all(closed(client, 5) for client in clients)


def test_answers_that_nobody_reads_are_bounded(server):
    """One holds its memory for a while; others are told to come back; then it is ended, and they have theirs."""
    slow = ask_and_wait(server.port, SLICE)
    time.sleep(0.3)
    status, headers, body = server.fetch("/runs/run/arrays/resid")
    assert status == 503 and headers["retry-after"] == "1" and b"wait for their readers" in body
    quick(server)
    end = time.monotonic() + 10
    while (found := server.fetch("/runs/run/arrays/resid"))[0] == 503 and time.monotonic() < end:
        time.sleep(0.1)
    assert found[0] == 200 and np.load(io.BytesIO(found[2])).shape == (3, 4096, 32, 16)
    assert closed(slow, 5)
    assert memory_of(server.pid, "VmHWM") < 600 << 20


def test_uploads_come_in_time_or_not_at_all(server, root):
    assert not (root / "texts" / LEFT).exists()
    slow = ask_and_wait(server.port, UPLOAD.format("slow.txt"))
    time.sleep(0.3)
    with pytest.raises(ValueError, match="too many texts"):
        server.client.put("/texts/other.txt", b"text")
    slow.settimeout(5)
    assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    ask_and_wait(server.port, UPLOAD.format("broken.txt")).close()
    time.sleep(0.3)
    assert server.client.put("/texts/other.txt", b"text")["n_bytes"] == 4
    with pytest.raises(ValueError, match="is empty"):
        server.client.put("/texts/empty.txt", b"")
    assert [path.name for path in (root / "texts").iterdir()] == ["other.txt"]


def test_documents_and_errors_are_as_described(server):
    large = {"kind": "extract", "document": {"out": "x", "text": ["a" * 70_000]}}
    with pytest.raises(ValueError, match="at most 65,536 are kept"):
        server.client.post("/plan", large)
    status, headers, body = server.fetch("/runs/run/zarr.json", range="bytes=9999999-")
    assert status == 416 and headers["content-type"] == "application/json" and b"detail" in body
    status, headers, _ = server.fetch("/jobs", method="OPTIONS")
    assert status == 405 and {"GET", "POST"} <= set(headers["allow"].split(", "))
