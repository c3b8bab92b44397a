"""Attention with row statistics in one pass, nothing T × T: plain flash attention when no statistics are asked for.

Linear statistics (mean distance, mass on classes of keys) are the pattern times a table of key features, 16 more value
columns on the matrix units. Positions are split into digits of base 256, exact in every type, and divided by a column
of ones, so that rounding of P changes weights and never the positions. Single entries (self, previous, first visible
key) are exp(q · k − max) / total at the end. Only the entropy ln total − Σ p (s − max) and the argmax touch every
score.
"""
# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

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
    sum_or_nan,
)
from headwater.kernels.gpu.launch import Config
from headwater.kernels.gpu.program import Launch, can_describe, describe_heads, precision, upcast
from headwater.kernels.output import FLOAT_ROWS, N_FEATURES

COLUMNS = tl.constexpr(16)
POSITION_COLUMNS = tl.constexpr(4)


@triton.jit
def _step(
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
    """Fold one block of keys into the running row state (online softmax)."""
    # Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). The state of a row after some keys is
    # m = max s, l = Σ e^(s − m) and acc = Σ e^(s − m) v. A block that raises m to m' multiplies what was summed
    # by e^(m − m'), here `shrink`; scores are raw products, and e^(scale · s) = 2^(factor · s).
    keys = load_block(k, b, n0, key_head, n_positions, skb, skt, skn, D, BLOCK_N, BLOCK_D, TMA)
    s = product(queries, tl.trans(keys), PRECISION, UPCAST)
    if MASKED:
        s = hide(s, n0, t, start, BLOCK_N)
    top = tl.max(s, 1)
    # `largest` begins at −1e29 and hidden scores are −1e30: in a block that a row does not see, p is
    # 2^(−huge) = 0, never e^(−inf + inf) = NaN.
    new = tl.maximum(largest, top)
    # One fused multiply-add, rounded once: the power of the largest score is 0 up to the rounding of its product.
    power = tl.fma(s, factor, (-new * factor)[:, None])
    p = tl.exp2(power)
    shrink = tl.exp2((largest - new) * factor)
    if STATISTICS:
        # Σ p log2 p with p = 2^power, whose powers all fall by one number when the maximum rises: with l it gives the
        # entropy at the end, without a logarithm for each score, and it stays small whatever the scores are.
        lowered = tl.where(total > 0, (largest - new) * factor * total, 0.0)
        # 0 · (−inf) would be NaN; a NaN that this maximum drops is in p.
        energy = (energy + lowered) * shrink + tl.sum(p * tl.maximum(power, LOWEST), 1)
    total = total * shrink + tl.sum(p, 1)
    values = load_block(v, b, n0, key_head, n_positions, svb, svt, svn, D, BLOCK_N, BLOCK_D, TMA)
    weights = p.to(values.dtype)
    acc = product_onto(acc * shrink[:, None], weights, values, PRECISION, UPCAST)
    if STATISTICS:
        c = tl.arange(0, BLOCK_N)
        # The first key of the block's largest score. Blocks without a mask are taken before masked ones, which may
        # lie to their left, so that of equal scores in two blocks the lower position is kept.
        place = tl.min(tl.where(s == top[:, None], c[None, :], BLOCK_N), 1) + n0
        best = tl.where(
            top > largest, place, tl.where(top == largest, tl.minimum(best, place), best)
        )
        # The statistics that are linear in P are one more product: P times a table [keys, 16] of features. It is
        # loaded through a mask, zero beyond T, for its rows end there.
        f = tl.arange(0, COLUMNS)
        inside = (n0 + c < n_positions)[:, None]
        features = tl.load(
            table + b.to(tl.int64) * stb + (n0 + c).to(tl.int64)[:, None] * COLUMNS + f[None, :],
            mask=inside,
            other=0.0,
        )
        mass = product_onto(mass * shrink[:, None], weights, features, PRECISION, UPCAST)
    return new, total, energy, best, acc, mass


@triton.jit
def _probe(
    queries,
    k,
    at,
    seen,
    b,
    key_head,
    skb,
    skt,
    skn,
    shift,
    inverse,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the probability of one key per row, the key at position `at`, 0 where it is not seen.

    `inverse` is NaN in rows without a softmax, and so are their results.
    """
    # One key for each row is no block, so this is a dot product of vectors in float32, of as many bytes as there
    # are rows.
    d = tl.arange(0, BLOCK_D)
    base = k + b.to(tl.int64) * skb + key_head.to(tl.int64) * skn
    keys = tl.load(
        base + at.to(tl.int64)[:, None] * skt + d[None, :],
        mask=seen[:, None] & (d < D)[None, :],
        other=0.0,
    )
    s = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
    # p = 2^(factor · s − shift) / l, where `shift` is factor · m.
    return tl.where(seen, tl.exp2(tl.fma(s, factor, -shift)) * inverse, inverse * 0.0)


@triton.jit
def _at_least_zero(x):
    """Return max(x, 0), NaN where x is NaN, which a maximum on a device would drop."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _column(mass, i: tl.constexpr):
    # Triton cannot index a column of a block in registers; summing all but one as zeros compiles to a select.
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == i, mass, 0.0), 1)


@triton.jit
def statistics_kernel(
    q,
    k,
    v,
    key_rows,
    table,
    z,
    lse,
    row,
    argmax,
    features,
    row_start,
    factor,
    n_positions,
    n_head,
    group,
    n_planes,
    n_features,
    sqb,
    sqt,
    sqn,
    skb,
    skt,
    skn,
    svb,
    svt,
    svn,
    stb,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_START: tl.constexpr,
    STATISTICS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write z, lse and, with STATISTICS, `row` [6, B, N, T], `argmax` and `features` of one block of queries.

    `key_rows` is k as a pointer on both paths; `factor` is scale · log2(e); rows are in the order of FLOAT_ROWS.
    """
    # The longest rows first: query blocks run from the last, which has the most keys, to the first, so that the
    # short ones fill up the multiprocessors at the end.
    n_m = tl.cdiv(n_positions, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (n_m - 1 - pid % n_m) * BLOCK_M
    plane = pid // n_m
    b = plane // n_head
    head = plane % n_head
    key_head = head // group
    t = m0 + tl.arange(0, BLOCK_M)
    # Keys in [full_first, full_last) are seen by every row of the block and need no mask; before and behind them
    # lie `n_masked` blocks that some rows see in part. Blocks that no row sees are not visited.
    start, first, full_first, full_last, last = key_span(
        row_start, b, m0, n_positions, BLOCK_M, BLOCK_N, HAS_START
    )
    n_masked = (last - first - (full_last - full_first)) // BLOCK_N
    queries = load_block(q, b, m0, head, n_positions, sqb, sqt, sqn, D, BLOCK_M, BLOCK_D, TMA)
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    energy = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], 2147483647, tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for n0 in range(full_first, full_last, BLOCK_N):
        largest, total, energy, best, acc, mass = _step(
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
            D,
            BLOCK_N,
            BLOCK_D,
            STATISTICS,
            False,
            TMA,
            PRECISION,
            UPCAST,
        )
    for i in range(0, n_masked):
        n0 = masked_block(i, first, full_first, full_last, BLOCK_N)
        largest, total, energy, best, acc, mass = _step(
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
            D,
            BLOCK_N,
            BLOCK_D,
            STATISTICS,
            True,
            TMA,
            PRECISION,
            UPCAST,
        )

    inside = t < n_positions
    # Rows that see no key (padding): their z and statistics are 0, lse is −inf, argmax −1.
    empty = start > t
    some = start <= t
    safe = sum_or_nan(total, empty)
    shift = largest * factor
    inverse = 1.0 / safe
    # log2 Σ 2^(factor · s) = factor · m + log2 l.
    log_sum = shift + tl.log2(safe)
    d = tl.arange(0, BLOCK_D)
    # z is [B, T, N, D] and contiguous; int64 because B · T · N · D passes 2^31.
    place = (b.to(tl.int64) * n_positions + t) * n_head + head
    tl.store(
        z + place[:, None] * D + d[None, :],
        tl.where(empty[:, None], 0.0, acc * inverse[:, None]).to(z.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    at = plane.to(tl.int64) * n_positions + t
    # ln 2 turns base 2 into nats.
    tl.store(lse + at, tl.where(empty, -float("inf"), log_sum * 0.6931471805599453), mask=inside)
    if STATISTICS:
        # `row` is [6, B, N, T]: `step` is one statistic, `at` the place in it.
        step = n_planes.to(tl.int64) * n_positions
        seen = some & inside
        # H = −Σ p ln p with p = 2^power / l, so in bits H = log2 l − Σ 2^power · power / l; rounding may leave a little
        # less than 0 where one key has everything.
        entropy = _at_least_zero((tl.log2(safe) - energy * inverse) * 0.6931471805599453)
        tl.store(row + at, tl.where(some, entropy, 0.0), mask=inside)
        # Not 1 / total: `shift` is rounded, so that the largest score lies up to half a unit of it beside it.
        peak = tl.exp2(tl.fma(largest, factor, -shift)) * inverse
        tl.store(row + step + at, tl.where(some, peak, 0.0), mask=inside)
        queries = load_block(q, b, m0, head, n_positions, sqb, sqt, sqn, D, BLOCK_M, BLOCK_D, TMA)
        sink = _probe(
            queries,
            key_rows,
            tl.maximum(start, 0),
            seen,
            b,
            key_head,
            skb,
            skt,
            skn,
            shift,
            inverse,
            factor,
            D,
            BLOCK_D,
        )
        tl.store(row + 2 * step + at, sink, mask=inside)
        # Mean key = Σ p · key / Σ p: dividing by the column of ones takes the rounding of P out of the weights' sum.
        # The position comes as digits of base 256, which every type holds exactly.
        ones = _column(mass, 0)
        mean_key = _column(mass, 1) + 256.0 * _column(mass, 2) + 65536.0 * _column(mass, 3)
        distance = _at_least_zero(t.to(tl.float32) - mean_key / tl.where(some, ones, 1.0))
        tl.store(row + 3 * step + at, tl.where(some, distance, 0.0), mask=inside)
        own = _probe(
            queries,
            key_rows,
            t,
            seen,
            b,
            key_head,
            skb,
            skt,
            skn,
            shift,
            inverse,
            factor,
            D,
            BLOCK_D,
        )
        tl.store(row + 4 * step + at, own, mask=inside)
        previous = _probe(
            queries,
            key_rows,
            t - 1,
            seen & (t > 0) & (start < t),
            b,
            key_head,
            skb,
            skt,
            skn,
            shift,
            inverse,
            factor,
            D,
            BLOCK_D,
        )
        tl.store(row + 5 * step + at, previous, mask=inside)
        tl.store(argmax + at, tl.where(some & (inverse > 0), best, -1), mask=inside)
        f = tl.arange(0, COLUMNS) - POSITION_COLUMNS
        tl.store(
            features + at[:, None] * n_features + f[None, :],
            tl.where(empty[:, None], 0.0, mass * inverse[:, None]),
            mask=inside[:, None] & ((f >= 0) & (f < n_features))[None, :],
        )


@lru_cache(maxsize=16)
def position_table(n_positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return key features [1, T, 16]: one, three digits of the position, and room for the caller's columns.

    Kept, since every layer needs the same; so launch once before a CUDA graph is captured.
    """
    key = torch.arange(n_positions, device=device)
    digits = [torch.ones_like(key), key % 256, key // 256 % 256, key // 65536]
    table = torch.zeros(1, n_positions, 16, dtype=dtype, device=device)
    table[:, :, :4] = torch.stack(digits, -1).to(dtype)
    return table


def key_table(
    n_positions: int, features: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the key features [B or 1, T, 16] with the caller's [B or 1, T, F] in the last columns."""
    table = position_table(n_positions, dtype, device)
    if features is None:
        return table
    table = table.repeat(features.shape[0], 1, 1)
    table[:, :, 4 : 4 + features.shape[-1]] = features.to(dtype)
    return table


def plan_statistics(
    q_BTNH: torch.Tensor,
    k_BTGH: torch.Tensor,
    v_BTGH: torch.Tensor,
    *,
    scale: float,
    row_start: torch.Tensor | None,
    statistics: bool,
    features: torch.Tensor | None,
    config: Config,
) -> Launch:
    """Allocate z, lse, the row statistics [6, B, N, T], argmax and feature sums, and return the launch that fills them.

    `features` is [B or 1, T, F], F ≤ 12, exact only where its values are in the type of v. Without statistics and
    features the last three outputs are empty and the kernel is plain flash attention.
    """
    n, n_positions, n_head, d_head = q_BTNH.shape
    wanted = statistics or features is not None
    if features is None:
        n_features = 0
    else:
        n_features = features.shape[-1]
    if n_features > N_FEATURES:
        raise ValueError(f"{n_features} key features; the kernel takes at most {N_FEATURES}")
    new = q_BTNH.new_empty
    plane = (n, n_head, n_positions)
    z, lse = new(q_BTNH.shape, dtype=v_BTGH.dtype), new(plane, dtype=torch.float32)
    row = new(0, dtype=torch.float32)
    argmax = new(0, dtype=torch.int32)
    sums = new(0, dtype=torch.float32)
    if wanted:
        row = new((len(FLOAT_ROWS), *plane), dtype=torch.float32)
        argmax = new(plane, dtype=torch.int32)
        sums = new((*plane, n_features), dtype=torch.float32)
    # tl.dot needs at least 16 and powers of two; what lies beyond d_head is loaded as zero.
    block_d = max(16, triton.next_power_of_2(d_head))
    tma = config.tma and all(can_describe(x) for x in (q_BTNH, k_BTGH, v_BTGH))
    table = None
    table_stride = 0
    if wanted:
        table = key_table(n_positions, features, v_BTGH.dtype, q_BTNH.device)
        # One table for all sequences has stride 0, whatever a dimension of length 1 says of its own.
        if table.shape[0] > 1:
            table_stride = table.stride(0)
    arguments = {
        "q": describe_heads(q_BTNH, config.block_m, block_d, tma),
        "k": describe_heads(k_BTGH, config.block_n, block_d, tma),
        "v": describe_heads(v_BTGH, config.block_n, block_d, tma),
        "key_rows": k_BTGH,
        "table": table,
        "z": z,
        "lse": lse,
        "row": row,
        "argmax": argmax,
        "features": sums,
        "row_start": row_start,
        # scale · log2(e): the exponential is exp2, one instruction of the hardware.
        "factor": scale * 1.4426950408889634,
        "n_positions": n_positions,
        "n_head": n_head,
        "group": n_head // k_BTGH.shape[2],
        "n_planes": n * n_head,
        "n_features": n_features,
        **dict(zip(("sqb", "sqt", "sqn"), q_BTNH.stride(), strict=False)),
        **dict(zip(("skb", "skt", "skn"), k_BTGH.stride(), strict=False)),
        **dict(zip(("svb", "svt", "svn"), v_BTGH.stride(), strict=False)),
        "stb": table_stride,
        "D": d_head,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "HAS_START": row_start is not None,
        "STATISTICS": wanted,
        "TMA": tma,
        "PRECISION": precision(q_BTNH),
        "UPCAST": upcast(q_BTNH),
    }
    grid = -(-n_positions // config.block_m) * n * n_head
    return Launch(statistics_kernel, grid, arguments, config, (z, lse, row, argmax, sums))
