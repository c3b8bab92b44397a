"""The mass that each key receives: a key-major second kernel that needs only lse; no atomics, always the same bits."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headwater.kernels.gpu.blocks import load_block, masked_block, product
from headwater.kernels.gpu.launch import Config
from headwater.kernels.gpu.program import Launch, can_describe, describe_heads, precision, upcast


@triton.jit
def _add(
    acc,
    keys,
    q,
    lse,
    row_start,
    m0,
    key,
    b,
    head,
    plane,
    factor,
    n_positions,
    sqb,
    sqt,
    sqn,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_START: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the probabilities [keys, queries] of one block of queries; rows that see nothing have lse = −inf."""
    t = m0 + tl.arange(0, BLOCK_M)
    queries = load_block(q, b, m0, head, n_positions, sqb, sqt, sqn, D, BLOCK_M, BLOCK_D, TMA)
    # The loaded lse is in nats; × log2(e) for exp2. A row that sees nothing has −inf: turned to +inf it gives
    # p = 2^(−inf) = 0, without a mask.
    log_sum = tl.load(
        lse + plane.to(tl.int64) * n_positions + t, mask=t < n_positions, other=-float("inf")
    )
    log_sum = tl.where(log_sum == -float("inf"), float("inf"), log_sum) * 1.4426950408889634
    # [keys, queries]: transposed, so that the sum over queries runs along the second dimension of the block.
    s = product(keys, tl.trans(queries), PRECISION, UPCAST)
    p = tl.exp2(tl.fma(s, factor, -log_sum[None, :]))
    if HAS_START:
        # Rows beyond T start after every key, so that they add nothing.
        start = tl.load(
            row_start + b.to(tl.int64) * n_positions + t, mask=t < n_positions, other=2147483647
        )
        p = tl.where(key[:, None] >= start[None, :], p, 0.0)
    if MASKED:
        p = tl.where((key[:, None] <= t[None, :]) & (t < n_positions)[None, :], p, 0.0)
    return acc + p


@triton.jit
def column_kernel(
    q,
    k,
    lse,
    column,
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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_START: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write `column` [B, N, T] of one block of keys: Σ over queries, in the order of the queries."""
    n_n = tl.cdiv(n_positions, BLOCK_N)
    pid = tl.program_id(0)
    # The first key block has the most queries: column order is already from the longest to the shortest.
    n0 = (pid % n_n) * BLOCK_N
    plane = pid // n_n
    b = plane // n_head
    head = plane % n_head
    key = n0 + tl.arange(0, BLOCK_N)
    keys = load_block(k, b, n0, head // group, n_positions, skb, skt, skn, D, BLOCK_N, BLOCK_D, TMA)
    # A program owns its keys and adds up all queries itself, in one order: no atomics, the same bits each time.
    # The sum over a block's queries is left to the end, once, instead of once a block.
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # Queries that need a mask: those beside the diagonal, and the last block where it reaches beyond T. There a query
    # is zero, but 0 · NaN is none: a key that is not finite must not get mass from rows that don't exist.
    first = n0 // BLOCK_M * BLOCK_M
    end = tl.cdiv(n_positions, BLOCK_M) * BLOCK_M
    # Queries from here on come after every key of the block.
    full = tl.minimum(tl.cdiv(n0 + BLOCK_N, BLOCK_M) * BLOCK_M, end)
    full_end = tl.maximum(n_positions // BLOCK_M * BLOCK_M, full)
    n_masked = (full - first + end - full_end) // BLOCK_M
    for i in range(0, n_masked):
        m0 = masked_block(i, first, full, full_end, BLOCK_M)
        acc = _add(
            acc,
            keys,
            q,
            lse,
            row_start,
            m0,
            key,
            b,
            head,
            plane,
            factor,
            n_positions,
            sqb,
            sqt,
            sqn,
            D,
            BLOCK_M,
            BLOCK_D,
            HAS_START,
            True,
            TMA,
            PRECISION,
            UPCAST,
        )
    for m0 in range(full, full_end, BLOCK_M):
        acc = _add(
            acc,
            keys,
            q,
            lse,
            row_start,
            m0,
            key,
            b,
            head,
            plane,
            factor,
            n_positions,
            sqb,
            sqt,
            sqn,
            D,
            BLOCK_M,
            BLOCK_D,
            HAS_START,
            False,
            TMA,
            PRECISION,
            UPCAST,
        )
    tl.store(
        column + plane.to(tl.int64) * n_positions + key, tl.sum(acc, 1), mask=key < n_positions
    )


def plan_column_mass(
    q_BTNH: torch.Tensor,
    k_BTGH: torch.Tensor,
    lse_BNT: torch.Tensor,
    *,
    scale: float,
    row_start: torch.Tensor | None,
    config: Config,
) -> Launch:
    """Allocate the column sums, float32 [B, N, T], and return the launch that fills them."""
    n, n_positions, n_head, d_head = q_BTNH.shape
    column = torch.empty_like(lse_BNT)
    block_d = max(16, triton.next_power_of_2(d_head))
    tma = config.tma and can_describe(q_BTNH) and can_describe(k_BTGH)
    arguments = {
        "q": describe_heads(q_BTNH, config.block_m, block_d, tma),
        "k": describe_heads(k_BTGH, config.block_n, block_d, tma),
        "lse": lse_BNT,
        "column": column,
        "row_start": row_start,
        "factor": scale * 1.4426950408889634,
        "n_positions": n_positions,
        "n_head": n_head,
        "group": n_head // k_BTGH.shape[2],
        **dict(zip(("sqb", "sqt", "sqn"), q_BTNH.stride(), strict=False)),
        **dict(zip(("skb", "skt", "skn"), k_BTGH.stride(), strict=False)),
        "D": d_head,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "HAS_START": row_start is not None,
        "TMA": tma,
        "PRECISION": precision(q_BTNH),
        "UPCAST": upcast(q_BTNH),
    }
    grid = -(-n_positions // config.block_n) * n * n_head
    return Launch(column_kernel, grid, arguments, config, (column,))
