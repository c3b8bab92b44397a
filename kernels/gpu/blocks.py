"""What the Triton attention kernels share: loading blocks, products, and which keys a block of queries sees."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1.0e30)
LOWEST = tl.constexpr(-1.0e29)


@triton.jit
def load_block(
    x,
    b,
    t0,
    head,
    n_positions,
    stride_b,
    stride_t,
    stride_n,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load positions [t0, t0 + BLOCK_T) of one head, zero beyond T and D; `x` is a pointer or a 4-D descriptor."""
    if TMA:
        # A descriptor knows the bounds: what lies beyond T and D is read as zero by the hardware.
        return x.load([b, t0, head, 0]).reshape(BLOCK_T, BLOCK_D)
    else:
        t = t0 + tl.arange(0, BLOCK_T)
        d = tl.arange(0, BLOCK_D)
        # int64 before multiplying: batch times stride passes 2^31 elements in long runs.
        base = x + b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n
        inside = (t < n_positions)[:, None]
        # Where D fills the block no mask along D is compiled at all.
        if D < BLOCK_D:
            inside = inside & (d < D)[None, :]
        return tl.load(
            base + t.to(tl.int64)[:, None] * stride_t + d[None, :], mask=inside, other=0.0
        )


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Return a b in float32. UPCAST is for the interpreter, which multiplies the bit patterns of bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def product_onto(acc, a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Return acc + a b in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def key_span(
    row_start,
    b,
    m0,
    n_positions,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """Return (row starts, first, full_first, full_last, last) of the queries [m0, m0 + BLOCK_M).

    Key blocks lie in [first, last), both multiples of BLOCK_N; no mask is needed in [full_first, full_last). Where a
    row is empty or lies beyond T no block is full.
    """
    t = m0 + tl.arange(0, BLOCK_M)
    # The causal end: no query of the block sees a key behind its last one.
    last = tl.cdiv(tl.minimum(m0 + BLOCK_M, n_positions), BLOCK_N) * BLOCK_N
    # A block of keys needs no causal mask if its last key is at most the block's first query m0.
    full_last = tl.minimum((m0 + 1) // BLOCK_N * BLOCK_N, last)
    if HAS_START:
        start = tl.load(
            row_start + b.to(tl.int64) * n_positions + t, mask=t < n_positions, other=2147483647
        )
        # Rows that see nothing (start > t) must not pull the lower end down, so they count as `last`.
        first = tl.maximum(tl.min(tl.where(start <= t, start, last)), 0) // BLOCK_N * BLOCK_N
        # Where every row has begun no mask is needed: from the highest start on. An empty row makes that `last`, and no
        # block is full, for it must stay hidden everywhere.
        highest = tl.max(tl.where(start <= t, start, last))
        full_first = tl.minimum(
            (tl.maximum(highest, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, full_last
        )
        full_first = tl.maximum(full_first, first)
        full_last = tl.maximum(full_last, full_first)
    else:
        start = tl.where(t < n_positions, 0, 2147483647)
        first = tl.where(m0 < n_positions, 0, last)
        full_first = tl.where(m0 + BLOCK_M <= n_positions, 0, full_last)
    return start, first, full_first, full_last, last


@triton.jit
def masked_block(i, first, full_first, full_last, BLOCK_N: tl.constexpr):
    """Return the first key of the i-th block that needs a mask: left of the full ones, then right of them."""
    # One loop over both sides keeps one copy of the masked step in the program.
    n_left = (full_first - first) // BLOCK_N
    return tl.where(i < n_left, first + i * BLOCK_N, full_last + (i - n_left) * BLOCK_N)


@triton.jit
def seen_keys(n0, t, start, BLOCK_N: tl.constexpr):
    """Say which keys [M, N] of a block each row sees: by position, for a score that is not finite hides nothing."""
    key = n0 + tl.arange(0, BLOCK_N)
    # One mask for all layouts: row t sees the keys [row_start[t], t].
    return (key[None, :] >= start[:, None]) & (key[None, :] <= t[:, None])


@triton.jit
def hide(scores, n0, t, start, BLOCK_N: tl.constexpr):
    """Put HIDDEN where a row of the scores [M, N] does not see a key."""
    return tl.where(seen_keys(n0, t, start, BLOCK_N), scores, HIDDEN)


@triton.jit
def sum_or_nan(total, empty):
    """Return the sum of each row, 1 where it sees no key, NaN where it sees only scores of −inf.

    A sum is NaN already where a row sees NaN or +inf: exp(inf − inf). So NaN marks every row without a softmax.
    """
    return tl.where(empty, 1.0, tl.where(total == 0.0, float("nan"), total))
