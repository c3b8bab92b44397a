"""The activation functions as gradients can pass through them; the forward pass has its own, which work in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


SMOOTH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def value_and_slope(activation: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an activation function and its derivative at x."""
    with torch.inference_mode(False), torch.enable_grad():
        at = x.clone().requires_grad_()
        y = SMOOTH[activation](at)
        (slope,) = torch.autograd.grad(y.sum(), at)
    return y.detach(), slope
