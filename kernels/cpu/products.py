"""Matrix products on a CPU: by torch, or in float32 on an AMD processor by numpy's OpenBLAS.

torch multiplies by Intel's MKL, which leaves a third of an AMD processor unused; OpenBLAS does not. OpenBLAS's own
threads spin after a product and take the cores from torch's, so it runs on one thread for each of ours. The bits of a
row then depend on its place in a call: OpenBLAS takes rows in groups that divide GROUP, and what is left at the end by
other code. So a sequence is cut at multiples of GROUP only, and its end stays with a whole group: no bit depends on the
number of threads, or on other sequences.

Attention's products go to OpenBLAS only where it has twice MKL's speed, and only large ones: sharing costs time, too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from headwater.kernels.cpu.sharing import share

GROUP = 48
LEAST = 144
WIDE = 8192
ENOUGH = 1 << 23
ENOUGH_FOR_HEADS = 1 << 26
ZEN_5 = 26


@cache
def library() -> str:
    """Name what multiplies float32 matrices by weights here, for a run's manifest: torch, or OpenBLAS and its kernels.

    OpenBLAS chooses the kernels by processor, or as OPENBLAS_CORETYPE says; others give other last bits.
    """
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    amd = _of_processor("vendor_id") == "AuthenticAMD" and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    found = _openblas().info()
    if (
        not amd
        or "openblas" not in blas.get("name", "")
        or not found
        or not whole_groups_are_equal()
    ):
        return "torch"
    return f"OpenBLAS {blas['version']} {found[0]['architecture']}"


def multiply(
    x_BTK: torch.Tensor, weight_KM: torch.Tensor, bias_M: torch.Tensor | None, out_BTM: torch.Tensor
) -> None:
    """Write x W + b of float32 CPU tensors to `out`, each sequence in parts that several threads share.

    A W as wide as a vocabulary is cut into columns, so that each thread reads its own part of it.
    """
    x = x_BTK.numpy()
    weight = weight_KM.numpy()
    out = out_BTM.numpy()
    if bias_M is None:
        bias = None
    else:
        bias = bias_M.numpy()
    n, length, width = out.shape
    # GPT-2's 50,257 columns of 768 float32 are 154 MB, more than a cache: each thread then reads a part of W
    # instead of all of it.
    columns = [slice(first, last) for first, last in cut_evenly(width, WIDE, WIDE)]
    n_threads = 1
    if len(columns) == 1:
        n_threads = torch.get_num_threads()
    parts = list(itertools.product(cut_rows(n, length, n_threads), columns))

    def take(part: tuple[tuple[int, int, int], slice]) -> None:
        (b, first, last), columns = part
        rows = out[b, first:last, columns]
        np.matmul(x[b, first:last], weight[:, columns], out=rows)
        if bias is not None:
            rows += bias[columns]

    # Fewer multiplications than ENOUGH a thread take less time than waking another.
    n_threads = max(x.size * weight.shape[1] // ENOUGH, 1)
    # OpenBLAS itself stays on one thread: ours share the parts.
    with one_thread():
        share(take, parts, n_threads)


def multiply_heads(
    a_NQK: torch.Tensor, b_NKM: torch.Tensor, out_NQM: torch.Tensor, scale: float = 1.0
) -> None:
    """Write scale · A B of every head: CPU tensors of one type, strided as they like."""
    if (
        a_NQK.dtype != torch.float32
        or a_NQK.numel() * b_NKM.shape[2] < ENOUGH_FOR_HEADS
        or not heads_are_faster()
    ):
        torch.baddbmm(out_NQM, a_NQK, b_NKM, beta=0, alpha=scale, out=out_NQM)
        return
    a = (a_NQK if scale == 1 else a_NQK * scale).numpy()
    b = b_NKM.numpy()
    out = out_NQM.numpy()
    with one_thread():
        share(lambda head: np.matmul(a[head], b[head], out=out[head]), range(len(a)))


@cache
def heads_are_faster() -> bool:
    """Say whether OpenBLAS multiplies heads faster than MKL: from Zen 5 on, where MKL leaves AVX-512 unused."""
    return library().endswith("SkylakeX") and int(_of_processor("cpu family") or 0) >= ZEN_5


def cut_rows(n: int, length: int, n_threads: int) -> list[tuple[int, int, int]]:
    """Cut n sequences into parts (sequence, first, last), at multiples of GROUP and nowhere near the end.

    Each part reads all of W, so sequences stay whole where all threads get as many; else they make some two parts a
    thread, of LEAST rows if they can.
    """
    if n % n_threads == 0:
        step = length
    else:
        # Two parts a thread, so that the slowest part is half of a thread's work.
        step = max(-(-n * length // (2 * n_threads) // GROUP) * GROUP, LEAST)
    return [(b, first, last) for b in range(n) for first, last in cut_evenly(length, step, GROUP)]


def cut_evenly(length: int, step: int, least: int) -> list[tuple[int, int]]:
    """Cut range(length) into parts (first, last) of `step`; the last one is longer where less than `least` is left."""
    # A rest shorter than `least` joins the part before it: OpenBLAS computes short ends by other code.
    firsts = [first for first in range(0, length, step) if first == 0 or length - first >= least]
    return list(zip(firsts, [*firsts[1:], length], strict=True))


def whole_groups_are_equal() -> bool:
    """Say whether a row has the same bits wherever a sequence is cut at a multiple of GROUP; takes milliseconds.

    And wherever a wide product is cut at a multiple of WIDE.
    """
    make = np.random.default_rng(0)
    with one_thread():
        # Widths of small and of GPT-2's matrices: the kernels switch code by size.
        for width, wide in ((16, 48), (64, 64), (768, 96), (3072, 16)):
            weight = make.standard_normal((width, wide), np.float32)
            x = make.standard_normal((4 * GROUP + 16, width), np.float32)
            whole = np.matmul(x, weight)
            for cut in (GROUP, 3 * GROUP):
                if not np.array_equal(np.concatenate([x[:cut] @ weight, x[cut:] @ weight]), whole):
                    return False
        weight = make.standard_normal((64, 2 * WIDE + 17), np.float32)
        whole = np.matmul(x[:, :64], weight)
        parts = [x[:, :64] @ weight[:, a:b] for a, b in cut_evenly(2 * WIDE + 17, WIDE, WIDE)]
    return np.array_equal(np.concatenate(parts, 1), whole)


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


def _of_processor(what: str) -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(rf"^{what}\s*:\s*(\S+)", file.read(), re.M)
    except OSError:
        return ""
    if found:
        return found[1]
    return ""
