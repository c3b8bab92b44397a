"""Prepare Triton launches: tensor descriptors, precision, and a launch as data, so that it can be run or compiled."""
# mypy: ignore-errors

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from headwater.kernels.gpu.launch import Config


@dataclass(frozen=True)
class Launch:
    """A kernel with all its arguments. `run` launches it; ahead-of-time compilation reads the same arguments."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    config: Config
    outputs: tuple[torch.Tensor, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options: warps, stages, and the register cap where there is one."""
        if self.config.maxnreg is None:
            cap = {}
        else:
            cap = {"maxnreg": self.config.maxnreg}
        return {
            "num_warps": self.config.warps,
            "num_stages": self.config.stages,
            "enable_fp_fusion": True,
            **cap,
        }

    def run(self) -> tuple[torch.Tensor, ...]:
        """Launch the kernel on the current stream and return its outputs."""
        # An empty grid (no sequences) is no launch: CUDA refuses it.
        if self.grid:
            on = self.outputs[0].device
            with torch.cuda.device(on) if on.type == "cuda" else nullcontext():
                self.kernel[(self.grid,)](**self.arguments, **self.options)
        return self.outputs


def interpreted() -> bool:
    """Say whether Triton runs its interpreter, which takes CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def upcast(x: torch.Tensor) -> bool:
    """Say whether products must be made in float32: the interpreter multiplies the bit patterns of bfloat16."""
    return interpreted() and x.dtype == torch.bfloat16


def precision(x: torch.Tensor) -> str:
    """Return the precision of float32 products: three TF32 products where there are such, else plain float32."""
    on_amd = torch.version.hip is not None
    if x.dtype == torch.float32 and not on_amd and not interpreted():
        return "tf32x3"
    return "ieee"


def fits(block: int, edge: int) -> int:
    """Return the largest power of two up to `block` that divides a tile of `edge`; no tile (−1) takes any block."""
    if edge < 0:
        return block
    # edge & −edge is the largest power of two that divides edge.
    return min(block, edge & -edge)


def can_describe(x: torch.Tensor) -> bool:
    """Say whether a descriptor can address `x`: last stride 1, all others positive and they and the base aligned to 16
    bytes.
    """
    # A dimension of length 1 may have any stride, since it is never multiplied by anything but 0.
    size = x.element_size()
    outer = zip(x.stride()[:-1], x.shape, strict=False)
    aligned = all(stride > 0 and stride * size % 16 == 0 for stride, n in outer if n > 1)
    return x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0 and x.numel() > 0


def describe_heads(x_BTNH: torch.Tensor, block_t: int, block_d: int, tma: bool) -> Any:
    """Return a 4-D descriptor of blocks [1, block_t, 1, block_d], or the tensor itself on the pointer path.

    The rank matters: a 2-D view over [B · T, …] would read the next sequence where T is no multiple of the block.
    """
    if not tma:
        return x_BTNH
    # A stride of a dimension of length 1 is never used, but must be a multiple of 16 bytes all the same.
    unit = 16 // x_BTNH.element_size()
    strides = [
        stride if n > 1 else max(-(-stride // unit), 1) * unit
        for stride, n in zip(x_BTNH.stride()[:-1], x_BTNH.shape, strict=False)
    ]
    return TensorDescriptor(x_BTNH, list(x_BTNH.shape), [*strides, 1], [1, block_t, 1, block_d])


def describe_planes(pattern: torch.Tensor, block_m: int, block_n: int) -> Any:
    """Return a 3-D descriptor of the planes (squares or tiles) of a contiguous pattern."""
    planes = pattern.view(-1, *pattern.shape[-2:])
    return TensorDescriptor(
        planes, list(planes.shape), list(planes.stride()), [1, block_m, block_n]
    )
