"""Attention and its full pattern in one launch: a pass for the row sums, then a pass that writes P and uses it.

Pass 1 takes only the maximum and the sum of each row. Pass 2 computes the scores again, writes the final
probabilities and multiplies the same ones with v. The pattern goes to a square or to contiguous causal tiles, in which
every block store has one base address.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headwater.kernels.gpu.blocks import (
    LOWEST,
    hide,
    key_span,
    load_block,
    masked_block,
    product,
    product_onto,
    seen_keys,
    sum_or_nan,
)
from headwater.kernels.gpu.launch import Config
from headwater.kernels.gpu.program import (
    Launch,
    can_describe,
    describe_heads,
    describe_planes,
    fits,
    precision,
    upcast,
)
from headwater.kernels.output import n_causal_tiles


@triton.jit
def _scores(
    q,
    k,
    b,
    n0,
    key_head,
    n_positions,
    sb,
    st,
    sn,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    keys = load_block(k, b, n0, key_head, n_positions, sb, st, sn, D, BLOCK_N, BLOCK_D, TMA)
    return product(q, tl.trans(keys), PRECISION, UPCAST)


@triton.jit
def _fold(largest, total, scores, factor):
    """Fold a block of scores into the running maximum (unscaled) and sum of each row."""
    # Online softmax without values: m' = max(m, s) and l' = l · 2^((m − m') · factor) + Σ 2^((s − m') · factor).
    new = tl.maximum(largest, tl.max(scores, 1))
    p = tl.exp2(tl.fma(scores, factor, (-new * factor)[:, None]))
    return new, total * tl.exp2((largest - new) * factor) + tl.sum(p, 1)


@triton.jit
def _store(
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
    """Write one block of P. EDGE > 0: into causal tiles; EDGE = −1: into the square of `plane` (batch · head)."""
    value = value.to(pattern.dtype.element_ty) if not TMA_PATTERN else value.to(pattern.dtype)
    # Blocks divide tiles (`fits`), so a block of P lies in one tile, and its rows EDGE apart.
    r = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    if EDGE > 0:
        i = m0 // EDGE
        j = n0 // EDGE
        # Tile (i, j) of the lower triangle: i rows of 1, 2, …, i tiles lie before row i.
        tile = i * (i + 1) // 2 + j
        row = m0 - i * EDGE
        col = n0 - j * EDGE
        n_tiles = tl.cdiv(n_positions, EDGE) * (tl.cdiv(n_positions, EDGE) + 1) // 2
        if TMA_PATTERN:
            pattern.store([plane * n_tiles + tile, row, col], value.reshape(1, BLOCK_M, BLOCK_N))
        else:
            base = (
                pattern + (plane.to(tl.int64) * n_tiles + tile) * (EDGE * EDGE) + row * EDGE + col
            )
            tl.store(base + r[:, None] * EDGE + c[None, :], value)
    else:
        if TMA_PATTERN:
            pattern.store([plane, m0, n0], value.reshape(1, BLOCK_M, BLOCK_N))
        else:
            # The square has no padding, so what lies beyond T is masked; tiles are stored whole.
            base = pattern + (plane.to(tl.int64) * n_positions + m0) * n_positions + n0
            inside = (m0 + r < n_positions)[:, None] & (n0 + c < n_positions)[None, :]
            tl.store(base + r.to(tl.int64)[:, None] * n_positions + c[None, :], value, mask=inside)


@triton.jit
def pattern_kernel(
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
    """Write z [B, T, N, D], lse [B, N, T] and the pattern of one block of queries; `factor` is scale · log2(e)."""
    # The last tiles reach beyond T: rows there are written as zeros, as the store expects.
    n_rows = tl.cdiv(n_positions, EDGE) * EDGE if EDGE > 0 else n_positions
    n_m = tl.cdiv(n_rows, BLOCK_M)
    pid = tl.program_id(0)
    # From the last block of queries, which has the most keys, to the first.
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

    # Pass 1: the maximum and sum of every row, so that pass 2 writes final probabilities and never goes back.
    # Computing q kᵀ twice costs less than reading and rescaling a pattern of T² values.
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(full_first, full_last, BLOCK_N):
        s = _scores(
            queries,
            k,
            b,
            n0,
            key_head,
            n_positions,
            skb,
            skt,
            skn,
            D,
            BLOCK_N,
            BLOCK_D,
            TMA,
            PRECISION,
            UPCAST,
        )
        largest, total = _fold(largest, total, s, factor)
    for i in range(0, n_masked):
        n0 = masked_block(i, first, full_first, full_last, BLOCK_N)
        s = _scores(
            queries,
            k,
            b,
            n0,
            key_head,
            n_positions,
            skb,
            skt,
            skn,
            D,
            BLOCK_N,
            BLOCK_D,
            TMA,
            PRECISION,
            UPCAST,
        )
        largest, total = _fold(largest, total, hide(s, n0, t, start, BLOCK_N), factor)

    empty = start > t
    total = sum_or_nan(total, empty)
    # Subtract what pass 1 subtracted, and divide: a logarithm of the sum that is rounded to float32 together with a
    # maximum of 1e7 is wrong by half a unit, and rows would add up to anything from .7 to 1.4.
    shift = largest * factor
    inverse = (1.0 / total)[:, None]
    # Pass 2: the same probabilities are stored and multiplied with v, so z = P v holds for the stored P up to
    # its rounding. No block needs rescaling any more.
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n0 in range(full_first, full_last, BLOCK_N):
        s = _scores(
            queries,
            k,
            b,
            n0,
            key_head,
            n_positions,
            skb,
            skt,
            skn,
            D,
            BLOCK_N,
            BLOCK_D,
            TMA,
            PRECISION,
            UPCAST,
        )
        p = tl.exp2(tl.fma(s, factor, -shift[:, None])) * inverse
        values = load_block(
            v, b, n0, key_head, n_positions, svb, svt, svn, D, BLOCK_N, BLOCK_D, TMA
        )
        acc = product_onto(acc, p.to(values.dtype), values, PRECISION, UPCAST)
        _store(pattern, p, plane, m0, n0, n_positions, EDGE, BLOCK_M, BLOCK_N, TMA_PATTERN)
    for i in range(0, n_masked):
        n0 = masked_block(i, first, full_first, full_last, BLOCK_N)
        s = _scores(
            queries,
            k,
            b,
            n0,
            key_head,
            n_positions,
            skb,
            skt,
            skn,
            D,
            BLOCK_N,
            BLOCK_D,
            TMA,
            PRECISION,
            UPCAST,
        )
        seen = seen_keys(n0, t, start, BLOCK_N)
        # By position, not 2^(−huge): a hidden key must give an exact zero in rows that are NaN, too.
        p = tl.where(seen, tl.exp2(tl.fma(s, factor, -shift[:, None])) * inverse, 0.0)
        values = load_block(
            v, b, n0, key_head, n_positions, svb, svt, svn, D, BLOCK_N, BLOCK_D, TMA
        )
        acc = product_onto(acc, p.to(values.dtype), values, PRECISION, UPCAST)
        _store(pattern, p, plane, m0, n0, n_positions, EDGE, BLOCK_M, BLOCK_N, TMA_PATTERN)

    # The output is not cleared beforehand: what lies left of the first visible key and right of the diagonal, up
    # to the edge of the tile or of the square, is written here, once.
    nothing = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n0 in range(0, first, BLOCK_N):
        _store(pattern, nothing, plane, m0, n0, n_positions, EDGE, BLOCK_M, BLOCK_N, TMA_PATTERN)
    end = (m0 // EDGE + 1) * EDGE if EDGE > 0 else n_positions
    for n0 in range(last, end, BLOCK_N):
        _store(pattern, nothing, plane, m0, n0, n_positions, EDGE, BLOCK_M, BLOCK_N, TMA_PATTERN)

    d = tl.arange(0, BLOCK_D)
    inside = t < n_positions
    place = (b.to(tl.int64) * n_positions + t) * n_head + head
    tl.store(
        z + place[:, None] * D + d[None, :],
        tl.where(empty[:, None], 0.0, acc).to(z.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(
        lse + plane.to(tl.int64) * n_positions + t,
        tl.where(empty, -float("inf"), (shift + tl.log2(total)) * 0.6931471805599453),
        mask=inside,
    )


def plan_pattern(
    q_BTNH: torch.Tensor,
    k_BTGH: torch.Tensor,
    v_BTGH: torch.Tensor,
    *,
    scale: float,
    row_start: torch.Tensor | None,
    edge: int,
    pattern_dtype: torch.dtype,
    config: Config,
) -> Launch:
    """Allocate z, lse and the pattern, and return the launch that fills them; `edge` −1 asks for the square."""
    n, n_positions, n_head, d_head = q_BTNH.shape
    new = q_BTNH.new_empty
    z, lse = (
        new(q_BTNH.shape, dtype=v_BTGH.dtype),
        new((n, n_head, n_positions), dtype=torch.float32),
    )
    # A single tile is the square itself, which takes blocks of any size and a descriptor.
    one_tile = edge == n_positions
    n_tiles = 0
    if edge > 0:
        n_tiles = n_causal_tiles(n_positions, edge)
    shape = (n_positions, n_positions)
    if edge > 0:
        shape = (n_tiles, edge, edge)
    pattern = new((n, n_head, *shape), dtype=pattern_dtype)
    kernel_edge = edge
    if one_tile:
        kernel_edge = -1
    block_m, block_n = fits(config.block_m, kernel_edge), fits(config.block_n, kernel_edge)
    block_d = max(16, triton.next_power_of_2(d_head))
    tma = config.tma and all(can_describe(x) for x in (q_BTNH, k_BTGH, v_BTGH))
    side = edge
    if kernel_edge < 0:
        side = n_positions
    # The tensor memory accelerator wants rows that begin at multiples of 16 bytes.
    tma_pattern = config.tma and side * pattern.element_size() % 16 == 0
    arguments = {
        "q": describe_heads(q_BTNH, block_m, block_d, tma),
        "k": describe_heads(k_BTGH, block_n, block_d, tma),
        "v": describe_heads(v_BTGH, block_n, block_d, tma),
        "z": z,
        "lse": lse,
        "pattern": describe_planes(pattern, block_m, block_n) if tma_pattern else pattern,
        "row_start": row_start,
        "factor": scale * 1.4426950408889634,
        "n_positions": n_positions,
        "n_head": n_head,
        "group": n_head // k_BTGH.shape[2],
        **dict(zip(("sqb", "sqt", "sqn"), q_BTNH.stride(), strict=False)),
        **dict(zip(("skb", "skt", "skn"), k_BTGH.stride(), strict=False)),
        **dict(zip(("svb", "svt", "svn"), v_BTGH.stride(), strict=False)),
        "D": d_head,
        "EDGE": kernel_edge,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "HAS_START": row_start is not None,
        "TMA": tma,
        "TMA_PATTERN": tma_pattern,
        "PRECISION": precision(q_BTNH),
        "UPCAST": upcast(q_BTNH),
    }
    n_rows = n_positions
    if kernel_edge > 0:
        n_rows = -(-n_positions // edge) * edge
    grid = -(-n_rows // block_m) * n * n_head
    return Launch(pattern_kernel, grid, arguments, config, (z, lse, pattern))
