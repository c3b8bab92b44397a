"""The residual tap: add, capture, normalise and describe the residual stream, on whatever device it lies."""

from __future__ import annotations

from typing import Literal

import torch

from headwater.kernels.attention import check_triton
from headwater.kernels.dispatch import name_residual, residual_torch, residual_triton
from headwater.kernels.output import ResidualOutput


def residual_tap(
    x: torch.Tensor,
    delta: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    previous: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    slot: torch.Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> ResidualOutput:
    """Write x + delta, [..., D], into `out`, and give its LayerNorm and statistics back; see ResidualOutput.

    `out` has the type of `x`, may be `x` itself or the capture slot, and is new where it is None. `slot` takes a
    second copy in the type of the store, whose overflows are then counted. `previous` is the state that the cosine is
    taken with, x before the addition where it is None. Without `weight` there is no LayerNorm output. Inputs and
    outputs must be viewable as rows [R, D] with last stride 1. Raises ValueError where shapes don't fit together.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    others = {"delta": delta, "previous": previous, "out": out, "slot": slot}
    for name, value in others.items():
        if value is not None and value.shape != x.shape:
            raise ValueError(
                f"{name} is {list(value.shape)}, expected the shape of x, {list(x.shape)}"
            )
    for name, value in {"weight": weight, "bias": bias}.items():
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(f"{name} is {list(value.shape)}, expected {list(x.shape[-1:])}")
    if out.dtype != x.dtype:
        raise ValueError(
            f"out is {out.dtype}, expected that of x, {x.dtype}; take `slot` for a copy in another type"
        )
    arguments = (
        _rows("x", x),
        _maybe_rows("delta", delta),
        weight,
        bias,
        float(epsilon),
        _maybe_rows("previous", previous),
        _rows("out", out),
        _maybe_rows("slot", slot),
    )
    if impl == "triton":
        check_triton(x)
        packed = residual_triton(*arguments)
    else:
        packed = (torch.ops.headwater.residual_tap if impl == "auto" else residual_torch)(
            *arguments
        )
    return name_residual(out, packed, x.shape[:-1])


def _maybe_rows(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None:
        return None
    return _rows(name, x)


def _rows(name: str, x: torch.Tensor) -> torch.Tensor:
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{name} has strides {x.stride()}, expected rows that lie one after another at one "
            "distance"
        ) from None
    if rows.stride(-1) != 1:
        raise ValueError(f"{name} has last stride {rows.stride(-1)}, expected 1")
    return rows
