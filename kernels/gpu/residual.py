"""Residual add into the capture slot, LayerNorm and residual statistics in one launch, one read of each input."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headwater.kernels.gpu.launch import Config
from headwater.kernels.gpu.program import Launch
from headwater.kernels.output import ResidualOutput


@triton.jit
def residual_kernel(
    x,
    delta,
    previous,
    weight,
    bias,
    out,
    slot,
    normed,
    floats,
    ints,
    epsilon,
    n_rows,
    d_model,
    sx,
    sd,
    sp,
    so,
    ss,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOT: tl.constexpr,
):
    """Write `out` = x + delta, its copy in `slot`, its LayerNorm and what ResidualOutput names.

    `floats` [4, rows] is scale, norm, cosine, largest; `ints` [3, rows] is dimension, overflow, nonfinite.
    """
    # A program holds ROWS whole rows in registers: each input is read once, and every sum is over one row.
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    row = r.to(tl.int64)[:, None]
    rows = r < n_rows
    inside = rows[:, None] & (d < d_model)[None, :]
    before = tl.load(x + row * sx + d[None, :], mask=inside, other=0.0).to(tl.float32)
    added = before
    if HAS_DELTA:
        added = before + tl.load(delta + row * sd + d[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    # The stream's own type rounds the sum. LayerNorm and the statistics take the rounded one, as a model does
    # that runs without us; the slot takes the exact sum in its type, rounded once and not twice.
    kept = added.to(out.dtype.element_ty)
    y = kept.to(tl.float32)
    other = before
    if HAS_PREVIOUS:
        other = tl.load(previous + row * sp + d[None, :], mask=inside, other=0.0).to(tl.float32)
    captured = y
    tl.store(out + row * so + d[None, :], kept, mask=inside)
    if HAS_SLOT:
        copy = added.to(slot.dtype.element_ty)
        captured = copy.to(tl.float32)
        tl.store(slot + row * ss + d[None, :], copy, mask=inside)
    # Two passes over registers: Σ (y − mean)² does not cancel as Σ y² − n · mean² would.
    mean = tl.sum(y, 1) / d_model
    centred = tl.where(inside, y - mean[:, None], 0.0)
    scale = tl.sqrt(tl.sum(centred * centred, 1) / d_model + epsilon)
    if HAS_NORM:
        result = (
            centred
            / scale[:, None]
            * tl.load(weight + d, mask=d < d_model, other=0.0).to(tl.float32)[None, :]
        )
        if HAS_BIAS:
            result += tl.load(bias + d, mask=d < d_model, other=0.0).to(tl.float32)[None, :]
        tl.store(
            normed + row * d_model + d[None, :], result.to(normed.dtype.element_ty), mask=inside
        )
    # Norms are computed on y / max |y|, as hypot is: y² overflows float32 from 1.8e19 on.
    size = tl.abs(y)
    largest = tl.max(size, 1)
    unit = tl.where(largest > 0, largest, 1.0)
    norm = unit * tl.sqrt(tl.sum((y / unit[:, None]) * (y / unit[:, None]), 1))
    # The cosine is of vectors scaled to a largest component of 1, which its quotient does not see; 0 for zeros.
    peak = tl.max(tl.abs(other), 1)
    peak = tl.where(peak > 0, peak, 1.0)
    scaled, against = y / unit[:, None], other / peak[:, None]
    product = tl.sqrt(tl.sum(scaled * scaled, 1)) * tl.sqrt(tl.sum(against * against, 1))
    cosine = tl.where(
        product > 0, tl.sum(scaled * against, 1) / tl.where(product > 0, product, 1.0), 0.0
    )
    # The first of equal ones.
    dimension = tl.min(tl.where((size == largest[:, None]) & inside, d[None, :], BLOCK_D), 1)
    # `added` is float32: what is finite there and infinite in the slot did not fit the slot's type.
    finite = tl.abs(added) < float("inf")
    overflow = tl.sum((finite & (tl.abs(captured) == float("inf")) & inside).to(tl.int32), 1)
    nonfinite = tl.sum(((finite == 0) & inside).to(tl.int32), 1)
    n = tl.cast(n_rows, tl.int64)  # one row makes n_rows a constant
    tl.store(floats + r, scale, mask=rows)
    tl.store(floats + n + r, norm, mask=rows)
    tl.store(floats + 2 * n + r, cosine, mask=rows)
    tl.store(floats + 3 * n + r, largest, mask=rows)
    tl.store(ints + r, dimension, mask=rows)
    tl.store(ints + n + r, overflow, mask=rows)
    tl.store(ints + 2 * n + r, nonfinite, mask=rows)


def plan_residual(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    epsilon: float,
    previous: torch.Tensor | None,
    out: torch.Tensor,
    slot: torch.Tensor | None,
    config: Config,
) -> Launch:
    """Allocate what is not given and return the launch; all tensors are rows [R, D] with last stride 1.

    `out` may be `x` itself (in place) or the capture slot; `slot` takes a second copy in another type. The outputs are
    normed, floats [4, R] and ints [3, R].
    """
    n_rows, d_model = x.shape
    normed = x.new_empty(0)
    if weight is not None:
        normed = x.new_empty(x.shape)
    floats = x.new_empty((4, n_rows), dtype=torch.float32)
    ints = x.new_empty((3, n_rows), dtype=torch.int32)
    arguments = {
        "x": x,
        "delta": delta,
        "previous": previous,
        "weight": weight,
        "bias": bias,
        "out": out,
        "slot": slot,
        "normed": normed,
        "floats": floats,
        "ints": ints,
        "epsilon": epsilon,
        "n_rows": n_rows,
        "d_model": d_model,
        "sx": x.stride(0),
        "sd": _row_stride(delta),
        "sp": _row_stride(previous),
        "so": out.stride(0),
        "ss": _row_stride(slot),
        "ROWS": config.block_m,
        "BLOCK_D": triton.next_power_of_2(d_model),
        "HAS_DELTA": delta is not None,
        "HAS_PREVIOUS": previous is not None,
        "HAS_NORM": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SLOT": slot is not None,
    }
    return Launch(
        residual_kernel, -(-n_rows // config.block_m), arguments, config, (normed, floats, ints)
    )


def _row_stride(rows: torch.Tensor | None) -> int:
    if rows is None:
        return 0
    return rows.stride(0)


def unpack(
    x: torch.Tensor, normed: torch.Tensor | None, floats: torch.Tensor, ints: torch.Tensor
) -> ResidualOutput:
    """Name the rows of the kernel's outputs and give them the leading shape of `x`."""
    lead = x.shape[:-1]
    return ResidualOutput(x, normed, *(f.view(lead) for f in floats), *(i.view(lead) for i in ints))
