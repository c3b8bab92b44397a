"""The kernels without one of their design choices each, so that the choice can be seen to pay. Not for use.

A variant is the kernel's own source with one function replaced; only what has no counterpart is written out.
"""
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import replace
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from headwater.kernels.gpu.blocks import (
    HIDDEN,
    hide,
    key_span,
    load_block,
    masked_block,
    product,
    product_onto,
)
from headwater.kernels.gpu.pattern import _store
from headwater.kernels.gpu.program import Launch


def with_globals(kernel: Any, **functions: Any) -> Any:
    """Return a kernel whose module names mean other functions."""
    fn = kernel.fn
    copy = FunctionType(
        fn.__code__, {**fn.__globals__, **functions}, fn.__name__, fn.__defaults__, fn.__closure__
    )
    copy.__qualname__, copy.__module__, copy.__annotations__ = (
        fn.__qualname__,
        fn.__module__,
        fn.__annotations__,
    )
    return triton.jit(copy)


@triton.jit
def _masks_everywhere(
    row_start,
    b,
    m0,
    n_positions,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """Find the keys of a block of queries, but call no block of them free of masks."""
    start, first, _full, _full, last = key_span(
        row_start, b, m0, n_positions, BLOCK_M, BLOCK_N, HAS_START
    )
    return start, first, first, first, last


@triton.jit
def _stores_by_remainder(
    pattern,
    value,
    plane,
    m0,
    n0,
    n_positions,
    EDGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA_PATTERN: tl.constexpr,
):
    """Write one block of P into tiles, every element at its own address, by division and remainder."""
    row = m0 + tl.arange(0, BLOCK_M)
    col = n0 + tl.arange(0, BLOCK_N)
    i = (row // EDGE)[:, None]
    j = (col // EDGE)[None, :]
    side = tl.cdiv(n_positions, EDGE)
    base = pattern + plane.to(tl.int64) * (side * (side + 1) // 2) * (EDGE * EDGE)
    place = (
        (i * (i + 1) // 2 + j) * (EDGE * EDGE)
        + (row % EDGE)[:, None] * EDGE
        + (col % EDGE)[None, :]
    )
    tl.store(base + place, value.to(pattern.dtype.element_ty))


@triton.jit
def _elementwise(
    queries,
    k,
    v,
    table,
    n0,
    t,
    start,
    largest,
    total,
    energy,
    best,
    acc,
    mass,
    factor,
    b,
    key_head,
    n_positions,
    skb,
    skt,
    skn,
    svb,
    svt,
    svn,
    stb,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STATISTICS: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Fold one block of keys into the row state, every statistic as a sum over the block of P."""
    keys = load_block(k, b, n0, key_head, n_positions, skb, skt, skn, D, BLOCK_N, BLOCK_D, TMA)
    s = product(queries, tl.trans(keys), PRECISION, UPCAST)
    if MASKED:
        s = hide(s, n0, t, start, BLOCK_N)
    top = tl.max(s, 1)
    new = tl.maximum(largest, top)
    p = tl.exp2(tl.fma(s, factor, (-new * factor)[:, None]))
    shrink = tl.exp2((largest - new) * factor)
    total = total * shrink + tl.sum(p, 1)
    values = load_block(v, b, n0, key_head, n_positions, svb, svt, svn, D, BLOCK_N, BLOCK_D, TMA)
    acc = product_onto(acc * shrink[:, None], p.to(values.dtype), values, PRECISION, UPCAST)
    energy = energy * shrink + tl.sum(p * s, 1)
    c = n0 + tl.arange(0, BLOCK_N)
    place = tl.min(tl.where(s == top[:, None], c[None, :], 2147483647), 1)
    best = tl.where(top > largest, place, tl.where(top == largest, tl.minimum(best, place), best))
    column = tl.arange(0, 16)
    distance = tl.sum(p * (t[:, None] - c[None, :]).to(tl.float32), 1)
    sink = tl.sum(tl.where(c[None, :] == start[:, None], p, 0.0), 1)
    own = tl.sum(tl.where(c[None, :] == t[:, None], p, 0.0), 1)
    previous = tl.sum(tl.where(c[None, :] == t[:, None] - 1, p, 0.0), 1)
    mass = mass * shrink[:, None]
    mass += tl.where(column[None, :] == 0, distance[:, None], 0.0) + tl.where(
        column[None, :] == 1, sink[:, None], 0.0
    )
    mass += tl.where(column[None, :] == 2, own[:, None], 0.0) + tl.where(
        column[None, :] == 3, previous[:, None], 0.0
    )
    return new, total, energy, best, acc, mass


@triton.jit
def online_kernel(
    q,
    k,
    v,
    z,
    lse,
    pattern,
    row_start,
    factor,
    n_positions,
    n_head,
    group,
    sqb,
    sqt,
    sqn,
    skb,
    skt,
    skn,
    svb,
    svt,
    svn,
    D: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_START: tl.constexpr,
    TMA: tl.constexpr,
    TMA_PATTERN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute z with an online softmax first and write the pattern afterwards, as one would add it to flash attention.

    It reads v in the first pass and rescales the sum at every block; it leaves what lies beyond its keys unwritten.
    """
    n_m = tl.cdiv(tl.cdiv(n_positions, EDGE) * EDGE if EDGE > 0 else n_positions, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (n_m - 1 - pid % n_m) * BLOCK_M
    plane = pid // n_m
    b = plane // n_head
    head = plane % n_head
    key_head = head // group
    t = m0 + tl.arange(0, BLOCK_M)
    start, first, full_first, full_last, last = key_span(
        row_start, b, m0, n_positions, BLOCK_M, BLOCK_N, HAS_START
    )
    n_masked = (last - first - (full_last - full_first)) // BLOCK_N
    queries = load_block(q, b, m0, head, n_positions, sqb, sqt, sqn, D, BLOCK_M, BLOCK_D, TMA)
    largest = tl.full([BLOCK_M], -1.0e29, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n0 in range(full_first, full_last, BLOCK_N):
        largest, total, acc = _online(
            queries,
            k,
            v,
            n0,
            t,
            start,
            largest,
            total,
            acc,
            factor,
            b,
            key_head,
            n_positions,
            skb,
            skt,
            skn,
            svb,
            svt,
            svn,
            D,
            BLOCK_N,
            BLOCK_D,
            False,
            TMA,
            PRECISION,
            UPCAST,
        )
    for i in range(0, n_masked):
        n0 = masked_block(i, first, full_first, full_last, BLOCK_N)
        largest, total, acc = _online(
            queries,
            k,
            v,
            n0,
            t,
            start,
            largest,
            total,
            acc,
            factor,
            b,
            key_head,
            n_positions,
            skb,
            skt,
            skn,
            svb,
            svt,
            svn,
            D,
            BLOCK_N,
            BLOCK_D,
            True,
            TMA,
            PRECISION,
            UPCAST,
        )
    log_sum = tl.where(total > 0, largest * factor + tl.log2(total), 0.0)
    for n0 in range(full_first, full_last, BLOCK_N):
        keys = load_block(k, b, n0, key_head, n_positions, skb, skt, skn, D, BLOCK_N, BLOCK_D, TMA)
        p = tl.exp2(
            tl.fma(product(queries, tl.trans(keys), PRECISION, UPCAST), factor, -log_sum[:, None])
        )
        _store(pattern, p, plane, m0, n0, n_positions, EDGE, BLOCK_M, BLOCK_N, TMA_PATTERN)
    for i in range(0, n_masked):
        n0 = masked_block(i, first, full_first, full_last, BLOCK_N)
        keys = load_block(k, b, n0, key_head, n_positions, skb, skt, skn, D, BLOCK_N, BLOCK_D, TMA)
        s = hide(product(queries, tl.trans(keys), PRECISION, UPCAST), n0, t, start, BLOCK_N)
        p = tl.where(s > HIDDEN, tl.exp2(tl.fma(s, factor, -log_sum[:, None])), 0.0)
        _store(pattern, p, plane, m0, n0, n_positions, EDGE, BLOCK_M, BLOCK_N, TMA_PATTERN)
    d = tl.arange(0, BLOCK_D)
    inside = t < n_positions
    place = (b.to(tl.int64) * n_positions + t) * n_head + head
    tl.store(
        z + place[:, None] * D + d[None, :],
        (acc / total[:, None]).to(z.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(lse + plane.to(tl.int64) * n_positions + t, log_sum * 0.6931471805599453, mask=inside)


@triton.jit
def _online(
    queries,
    k,
    v,
    n0,
    t,
    start,
    largest,
    total,
    acc,
    factor,
    b,
    key_head,
    n_positions,
    skb,
    skt,
    skn,
    svb,
    svt,
    svn,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    keys = load_block(k, b, n0, key_head, n_positions, skb, skt, skn, D, BLOCK_N, BLOCK_D, TMA)
    s = product(queries, tl.trans(keys), PRECISION, UPCAST)
    if MASKED:
        s = hide(s, n0, t, start, BLOCK_N)
    new = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(tl.fma(s, factor, (-new * factor)[:, None]))
    shrink = tl.exp2((largest - new) * factor)
    values = load_block(v, b, n0, key_head, n_positions, svb, svt, svn, D, BLOCK_N, BLOCK_D, TMA)
    return (
        new,
        total * shrink + tl.sum(p, 1),
        product_onto(acc * shrink[:, None], p.to(values.dtype), values, PRECISION, UPCAST),
    )


VARIANTS = {
    "pattern": {
        "a mask in every block": lambda kernel: with_globals(kernel, key_span=_masks_everywhere),
        "z first, P afterwards": lambda kernel: online_kernel,
        "addresses by remainder": lambda kernel: with_globals(kernel, _store=_stores_by_remainder),
    },
    "statistics": {
        "a mask in every block": lambda kernel: with_globals(kernel, key_span=_masks_everywhere),
        "every statistic elementwise": lambda kernel: with_globals(kernel, _step=_elementwise),
    },
}


def vary(launch: Launch, kernel: str, variant: str) -> Launch:
    """Return the launch of a variant; addresses by remainder need pointers, so that launch must be on them."""
    return replace(launch, kernel=VARIANTS[kernel][variant](launch.kernel))
