"""Attention that gives its pattern, or its statistics, back: the public function, whatever the device."""

from __future__ import annotations

import math
from typing import Literal

import torch

from headwater.kernels.dispatch import (
    attention_on_cpu,
    attention_torch,
    attention_triton,
    has_triton,
    unpack,
)
from headwater.kernels.gpu.launch import MAX_HEAD, TRITON_TYPES
from headwater.kernels.output import N_FEATURES, AttentionOutput

Impl = Literal["auto", "triton", "reference", "cpu"]
PATTERN_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    row_start: torch.Tensor | None = None,
    pattern: Literal["square", "tiles"] | None = None,
    edge: int = 128,
    statistics: bool = False,
    features: torch.Tensor | None = None,
    pattern_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> AttentionOutput:
    """Compute causal softmax(scale · q kᵀ) v, and its pattern, row statistics or feature sums with it; forward only.

    `q` is [B, T, N, H]; `k` and `v` are [B, T, G, H] with N a multiple of G. Views of a fused projection are read in
    place. `row_start` is int32 [B, T] or [T], never negative: query t sees the keys [row_start, t], none where
    row_start > t; None is plain causal. `pattern="tiles"` gives causal tiles of `edge` (T, or a multiple of 16), tile
    (i, j) at i (i + 1) / 2 + j. `features` [T, F] or [B, T, F], at most 12 columns, are summed by each row's
    probabilities; the kernels hold them in the type of v. `pattern_dtype` is float32 for float32 inputs and float16
    for 16-bit inputs unless it is given. `impl="auto"` takes Triton on CUDA, row blocks on the CPU, and the reference
    for float64 and for heads wider than 256. Raises ValueError where shapes or types don't fit together, or a gradient
    is due.
    """
    _check(q, k, v, scale)
    n, n_positions = q.shape[:2]
    tile = _edge(pattern, edge, n_positions)
    start = _row_start(row_start, q)
    table = _features(features, n, n_positions)
    kept = pattern_dtype or (q.dtype if q.dtype.itemsize > 2 else torch.float16)
    if kept not in PATTERN_TYPES:
        raise ValueError(f"pattern_dtype is {kept}, expected one of {PATTERN_TYPES}")
    arguments = (q, k, v, float(scale), start, table, tile, statistics, kept)
    if impl == "auto":
        packed = torch.ops.headwater.attention(*arguments)
    elif impl == "triton":
        check_triton(q, MAX_HEAD)
        packed = attention_triton(*arguments)
    elif impl == "cpu":
        if q.device.type != "cpu":
            raise ValueError(
                f'impl="cpu" with tensors on {q.device}; move them to the CPU or take impl="auto"'
            )
        packed = attention_on_cpu(*arguments)
    elif impl == "reference":
        packed = attention_torch(*arguments)
    else:
        raise ValueError(f'impl is {impl!r}, expected "auto", "triton", "reference" or "cpu"')
    return unpack(packed, tile, statistics, table is not None)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
    if (
        q.ndim != 4
        or k.shape != v.shape
        or k.ndim != 4
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
    ):
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expected [B, T, N, H] and twice "
            "[B, T, G, H]"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] or 0 in q.shape[1:]:
        raise ValueError(
            f"{q.shape[2]} query heads over {k.shape[2]} key heads, {q.shape[1]} positions of {q.shape[3]}"
            " values; expected a multiple, and none of them zero"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in PATTERN_TYPES:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one and the same floating type"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q is on {q.device}, k on {k.device}, v on {v.device}; expected one device"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "q, k or v requires a gradient, and attention is forward only; call it under torch.no_grad()"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}, expected a positive number such as 1 / sqrt(d_head)")


def _edge(pattern: str | None, edge: int, n_positions: int) -> int:
    """Return 0 for no pattern, −1 for the square, the edge for tiles."""
    if pattern is None:
        return 0
    if pattern == "square":
        return -1
    if pattern != "tiles":
        raise ValueError(f'pattern is {pattern!r}, expected None, "square" or "tiles"')
    if edge < 1 or (edge % 16 and edge != n_positions):
        raise ValueError(
            f"edge is {edge}, expected a multiple of 16 or the number of positions ({n_positions})"
        )
    return edge


def _row_start(row_start: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if row_start is None:
        return None
    n, n_positions = q.shape[:2]
    if row_start.dtype != torch.int32 or tuple(row_start.shape) not in (
        (n_positions,),
        (n, n_positions),
    ):
        raise ValueError(
            f"row_start is {row_start.dtype} {list(row_start.shape)}, expected torch.int32 "
            f"{[n, n_positions]} or {[n_positions]}"
        )
    if row_start.device != q.device:
        raise ValueError(
            f"row_start is on {row_start.device}, q on {q.device}; expected one device"
        )
    return row_start.expand(n, n_positions).contiguous()


def _features(features: torch.Tensor | None, n: int, n_positions: int) -> torch.Tensor | None:
    if features is None:
        return None
    table = features
    if features.ndim == 2:
        table = features[None]
    if (
        table.ndim != 3
        or table.shape[0] not in (1, n)
        or table.shape[1] != n_positions
        or table.shape[2] > N_FEATURES
    ):
        raise ValueError(
            f"features is {list(features.shape)}, expected [{n_positions}, F] or "
            f"{[n, n_positions]} + [F] with F up to {N_FEATURES}"
        )
    return table


def check_triton(x: torch.Tensor, widest: int = 2**31) -> None:
    """Raise ValueError unless Triton can run on tensors like `x`, with a last dimension of `widest` at most."""
    if not has_triton():
        raise ValueError('impl="triton", but Triton is not installed; take impl="auto"')
    if x.dtype not in TRITON_TYPES or x.shape[-1] > widest:
        raise ValueError(
            f'impl="triton" takes float16, bfloat16 and float32 up to {widest} wide, not {x.dtype} of '
            f'{x.shape[-1]}; take impl="auto"'
        )
    if x.device.type == "cpu":
        from headwater.kernels.gpu.program import interpreted

        if not interpreted():
            raise ValueError(
                'impl="triton" with CPU tensors; move them to a GPU, take impl="auto", or set '
                "TRITON_INTERPRET=1 before Triton is imported"
            )
