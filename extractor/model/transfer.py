"""Carry tensors from a device to the host beside the forward: a pinned ring, a side stream, a thread that hands on.

Items leave in the order in which they came. The forward waits only where the ring is full, and the wait is counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

RING_BYTES = 256 << 20
ALIGN = 256


class ByteRing:
    """A fixed number of bytes, given out in contiguous stretches and given back in the same order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.waited = 0.0
        self._live: deque[tuple[int, int]] = deque()
        self._changed = threading.Condition()

    def take(self, n_bytes: int) -> int:
        """Return the offset of a free stretch; wait until there is one. Raises ValueError for more than the ring."""
        if n_bytes > self.capacity:
            raise ValueError(
                f"{n_bytes} bytes do not fit into a ring of {self.capacity}; expected smaller pieces"
            )
        start = time.perf_counter()
        with self._changed:
            while (offset := self._place(n_bytes)) is None:
                self._changed.wait()
            self._live.append((offset, offset + n_bytes))
        self.waited += time.perf_counter() - start
        return offset

    def give(self) -> None:
        """Give the oldest stretch back."""
        with self._changed:
            self._live.popleft()
            self._changed.notify_all()

    def _place(self, n_bytes: int) -> int | None:
        if not self._live:
            return 0
        # What is out lies between the oldest stretch's begin and the newest one's end, round the ring's end or not.
        tail = self._live[0][0]
        head = self._live[-1][1]
        if tail >= head:  # it goes round: what is free lies between
            return self._fits(head, n_bytes, tail)
        behind = self._fits(head, n_bytes, self.capacity)
        if behind is None:
            return self._fits(0, n_bytes, tail)
        return behind

    @staticmethod
    def _fits(offset: int, n_bytes: int, end: int) -> int | None:
        """Return the offset where the bytes end before `end`, None where they don't."""
        return offset if offset + n_bytes <= end else None


class Side(Protocol):
    """How copies to the host run beside the computation."""

    def memory(self, n_bytes: int) -> torch.Tensor:
        """Allocate host memory that copies can go to."""

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> Callable[[], float]:
        """Begin copies; return a function that waits for them and gives the seconds that they took."""


class HostSide:
    """Copies between tensors of the CPU: done at once."""

    def memory(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> Callable[[], float]:
        start = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        seconds = time.perf_counter() - start
        return lambda: seconds


class CudaSide:
    """Copies on a stream of their own, into pinned memory, after what the current stream has queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def memory(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> Callable[[], float]:
        event: Any = torch.cuda.Event
        begin = event(enable_timing=True)
        end = event(enable_timing=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            begin.record(self._stream)
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(self._stream)
            end.record(self._stream)

        def wait() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000

        return wait


def make_side(device: torch.device) -> Side:
    """Return how copies leave a device."""
    if device.type == "cuda":
        return CudaSide(device)
    return HostSide()


@dataclass
class _Item:
    """A delivery to make when its copies are done; without copies, something to do in its turn.

    `always` is for what must run after an error, too.
    """

    deliver: Callable[..., None]
    wait: Callable[[], float] | None = None
    tensors: tuple[torch.Tensor, ...] = ()
    always: bool = False


class Transfer:
    """Send tensors from a device through a ring of host memory to functions that run on one other thread, in order.

    `seconds` counts `copy` (on the side stream), `encode` (in the functions) and `wait` (for room in the ring). The
    first error of a function drops everything after it and is raised by the next `send` and by `drain`.
    """

    def __init__(self, device: torch.device, capacity: int = RING_BYTES) -> None:
        self.ring = ByteRing(capacity)
        self._side = make_side(device)
        self._memory = self._side.memory(capacity)
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._seconds = {"copy": 0.0, "encode": 0.0}
        self._before = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name="headwater-transfer")
        self._thread.start()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds since `begin`, by phase."""
        return {**self._seconds, "wait": self.ring.waited - self._before}

    def begin(self) -> None:
        """Start anew: forget an error, count from zero. Nothing may be under way."""
        self._error = None
        self._seconds = {"copy": 0.0, "encode": 0.0}
        self._before = self.ring.waited

    def send(self, tensors: Sequence[torch.Tensor], deliver: Callable[..., None]) -> None:
        """Copy contiguous tensors to the host and call `deliver` with the copies, valid during the call."""
        self.check()
        sizes = [-(-t.numel() * t.element_size() // ALIGN) * ALIGN for t in tensors]
        at = self.ring.take(sum(sizes))
        targets = []
        for tensor, size in zip(tensors, sizes, strict=True):
            flat = self._memory[at : at + tensor.numel() * tensor.element_size()]
            targets.append(flat.view(tensor.dtype).view(tensor.shape))
            at += size
        self._items.put(_Item(deliver, self._side.copy(tensors, targets), tuple(targets)))

    def then(self, task: Callable[[], None]) -> None:
        """Do something after everything that was sent before it."""
        self.check()
        self._items.put(_Item(task))

    def drain(self) -> None:
        """Wait until everything is delivered; raise the first error."""
        done = threading.Event()
        self._items.put(_Item(done.set, always=True))
        done.wait()
        self.check()

    def check(self) -> None:
        """Raise the first error of a delivery."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread after what is queued."""
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                self._hand_on(item)
            except BaseException as error:
                self._error = self._error or error
            finally:
                if item.wait is not None:
                    self.ring.give()

    def _hand_on(self, item: _Item) -> None:
        if item.wait is not None:
            self._seconds["copy"] += item.wait()
        if self._error is not None and not item.always:
            return
        start = time.perf_counter()
        with torch.inference_mode():
            item.deliver(*item.tensors)
        self._seconds["encode"] += time.perf_counter() - start


def ring_capacity(sequences: Iterable[int]) -> int:
    """Return the bytes of a ring in which the largest of values of one sequence each fits twice."""
    return max(RING_BYTES, 2 * max(sequences, default=0) + 4096)


def largest_item(capacity: int) -> int:
    """Return how many bytes one item may have, so that at least four share the ring."""
    return capacity // 4
