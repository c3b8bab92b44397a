"""The ring and the thread between a device and the writer: order, back-pressure, errors; no byte is lent twice."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.extractor.model.transfer import ByteRing, Transfer

CPU = torch.device("cpu")


@pytest.fixture
def transfer():
    made = Transfer(CPU, 4096)
    yield made
    made.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(60, 130), st.randoms())
def test_stretches_of_the_ring_never_overlap(sizes, capacity, random):
    ring, live = ByteRing(capacity), []
    for size in sizes:
        while live and (random.random() < 0.4 or ring._place(size) is None):
            ring.give()
            live.pop(0)
        first = ring.take(size)
        assert first >= 0 and first + size <= capacity
        assert all(first + size <= a or b <= first for a, b in live)
        live.append((first, first + size))


def test_more_than_the_ring_is_refused():
    with pytest.raises(ValueError, match="101 bytes do not fit into a ring of 100"):
        ByteRing(100).take(101)


def test_deliveries_keep_their_order_and_their_values(transfer):
    seen = []
    for i in range(300):
        transfer.send(
            [torch.full((1 + i % 50,), i), torch.tensor(float(i))],
            lambda a, b: seen.append((int(a[0]), len(a), float(b))),
        )
        if i % 7 == 0:
            transfer.then(lambda i=i: seen.append(i))
    transfer.drain()
    want = []
    for i in range(300):
        want += [(i, 1 + i % 50, float(i))] + ([i] if i % 7 == 0 else [])
    assert seen == want


def test_the_sender_waits_while_the_ring_is_full(transfer):
    """A delivery that holds up 3 KiB of a 4 KiB ring lets a second item in, and no third."""
    go, sent = threading.Event(), []
    transfer.send([torch.zeros(3072, dtype=torch.uint8)], lambda _: go.wait())

    def more():
        for i in range(4):
            transfer.send([torch.zeros(1024, dtype=torch.uint8)], lambda _: None)
            sent.append(i)

    sender = threading.Thread(target=more)
    sender.start()
    deadline = time.monotonic() + 30
    while not sent and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    held = list(sent)
    go.set()
    sender.join()
    transfer.drain()
    assert held == [0] and sent == [0, 1, 2, 3] and transfer.seconds["wait"] > 0.04
    assert transfer.seconds["encode"] > 0.04


def test_the_first_error_is_raised_and_what_follows_is_dropped(transfer):
    seen = []

    def fail(_):
        raise RuntimeError("first")

    transfer.send([torch.zeros(8)], fail)
    with pytest.raises(RuntimeError, match="first"):
        for _ in range(100):
            transfer.send([torch.zeros(500, dtype=torch.uint8)], seen.append)
    with pytest.raises(RuntimeError, match="first"):
        transfer.drain()
    assert seen == []
    transfer.begin()
    transfer.send([torch.arange(3)], lambda x: seen.append(x.tolist()))
    transfer.drain()
    assert seen == [[0, 1, 2]] and transfer.seconds.keys() == {"copy", "encode", "wait"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_ring_of_pinned_memory_carries_what_a_stream_computes():
    made, seen = Transfer(torch.device("cuda"), 1 << 22), []
    x = torch.zeros(1 << 18, device="cuda")
    for i in range(200):
        x += 1
        made.send(
            [x.clone()], lambda got, i=i: seen.append((i, float(got.min()), float(got.max())))
        )
    made.drain()
    made.close()
    assert seen == [(i, i + 1.0, i + 1.0) for i in range(200)]
