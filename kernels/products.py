"""Matrix products with weights on a CPU: by torch, or in float32 on an AMD processor by numpy's OpenBLAS.

torch multiplies by Intel's MKL, which leaves a third of an AMD processor unused; OpenBLAS does not. OpenBLAS's own
threads spin after a product and take the cores from torch's, so it runs on one thread for each of ours. The bits of a
row then depend on its place in a call: OpenBLAS takes rows in groups that divide GROUP, and what is left at the end by
other code. So a sequence is cut at multiples of GROUP only, and its end stays with a whole group: no bit depends on the
number of threads, or on other sequences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from headwater.kernels.sharing import share

GROUP = 48
LEAST = 144
ENOUGH = 1 << 23


@cache
def library() -> str:
    """Name what multiplies float32 matrices by weights on this processor, for a run's manifest: OpenBLAS or torch."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    amd = _vendor() == "AuthenticAMD" and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not amd or "openblas" not in blas.get("name", "") or not _openblas().info() or not whole_groups_are_equal():
        return "torch"
    return f"OpenBLAS {blas['version']}"


def multiply(x_BTK: torch.Tensor, weight_KM: torch.Tensor, bias_M: torch.Tensor | None, out_BTM: torch.Tensor) -> None:
    """Write x W + b of float32 CPU tensors to `out`, each sequence in parts that several threads share."""
    x, weight, out = x_BTK.numpy(), weight_KM.numpy(), out_BTM.numpy()
    bias = None if bias_M is None else bias_M.numpy()
    parts = cut_rows(x.shape[0], x.shape[1], torch.get_num_threads())

    def take(part: tuple[int, int, int]) -> None:
        b, first, last = part
        np.matmul(x[b, first:last], weight, out=out[b, first:last])
        if bias is not None:
            out[b, first:last] += bias

    n_threads = max(x.size * weight.shape[1] // ENOUGH, 1)
    with one_thread():
        share(take, parts, n_threads)


def cut_rows(n: int, length: int, n_threads: int) -> list[tuple[int, int, int]]:
    """Cut n sequences into parts (sequence, first, last), at multiples of GROUP and nowhere near the end.

    Some two parts a thread, for one may be late; but a part reads all of W, so it has LEAST rows if it can.
    """
    step = max(-(-n * length // (2 * n_threads) // GROUP) * GROUP, LEAST)
    firsts = [first for first in range(0, length, step) if first == 0 or length - first >= GROUP]
    return [(b, first, last) for b in range(n) for first, last in zip(firsts, [*firsts[1:], length], strict=True)]


def whole_groups_are_equal() -> bool:
    """Say whether a row has the same bits wherever a sequence is cut at a multiple of GROUP; takes milliseconds."""
    make = np.random.default_rng(0)
    with one_thread():
        for width, wide in ((16, 48), (64, 64), (768, 96), (3072, 16)):
            weight = make.standard_normal((width, wide), np.float32)
            x = make.standard_normal((4 * GROUP + 16, width), np.float32)
            whole = np.matmul(x, weight)
            for cut in (GROUP, 3 * GROUP):
                if not np.array_equal(np.concatenate([x[:cut] @ weight, x[cut:] @ weight]), whole):
                    return False
    return True


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep OpenBLAS on the thread that calls it, until the last of those who asked for it is done."""
    with _USERS.lock:
        _USERS.enter()
    try:
        yield
    finally:
        with _USERS.lock:
            _USERS.leave()


class _Users:
    """Those who hold OpenBLAS to one thread."""

    def __init__(self) -> None:
        self.lock, self.n, self.before = Lock(), 0, list[int]()

    def enter(self) -> None:
        if self.n == 0:
            self.before = [found.get_num_threads() for found in _openblas().lib_controllers]
            self.set([1] * len(self.before))
        self.n += 1

    def leave(self) -> None:
        self.n -= 1
        if self.n == 0:
            self.set(self.before)

    def set(self, numbers: list[int]) -> None:
        for found, number in zip(_openblas().lib_controllers, numbers, strict=True):
            found.set_num_threads(number)


_USERS = _Users()


@cache
def _openblas() -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(r"^vendor_id\s*:\s*(\S+)", file.read(), re.M)
    except OSError:
        return ""
    return found[1] if found else ""
