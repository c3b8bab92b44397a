"""The activation functions: in place, as the forward pass takes them, and as gradients can pass through them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Function = Callable[[torch.Tensor], torch.Tensor]
SHARE = 64
GRAIN = 1 << 15
GRAINS = 8


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """Multiply x by σ(2 √(2/π) (x + 0.044715 x³)), which is GELU by tanh, for which torch takes much longer."""
    # On a device a number put into a tensor is a copy that waits, and torch's own function is one pass.
    if x.device.type != "cpu" or x.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten.gelu_(x, approximate="tanh")  # type: ignore[no-any-return]
    twice = 2 * math.sqrt(2 / math.pi)
    return x.mul_(
        torch.addcmul(x.new_tensor(twice), x, x, value=0.044715 * twice).mul_(x).sigmoid_()
    )


ACTIVATIONS: dict[str, Function] = {
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu": torch.ops.aten.gelu_,
    "gelu_python": torch.ops.aten.gelu_,
    "quick_gelu": lambda x: x.mul_(torch.sigmoid(1.702 * x)),
    "relu": torch.relu_,
    "silu": lambda x: F.silu(x, inplace=True),
    "swish": lambda x: F.silu(x, inplace=True),
    "tanh": torch.tanh_,
}


def _smooth_tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


SMOOTH: dict[str, Function] = {
    "gelu_new": _smooth_tanh_gelu,
    "gelu_fast": _smooth_tanh_gelu,
    "gelu_pytorch_tanh": _smooth_tanh_gelu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def round_up(n: int) -> int:
    """Round a number of elements up to a multiple of SHARE."""
    return -(-n // SHARE) * SHARE


def activate(function: Function, x: torch.Tensor) -> None:
    """Apply a function in place so that no bit depends on threads or batch; x has memory up to `round_up` of its size.

    On a CPU torch deals elements out to threads in equal shares of at least GRAIN and takes what is left at the end of
    a share through other code than the rest; here every share is a multiple of SHARE, more than any vector holds. Parts
    of at most GRAINS grains a thread stay in its cache where a function takes several passes.
    """
    if x.device.type != "cpu":
        function(x)
        return
    flat = x.as_strided((round_up(x.numel()),), (1,))
    size = GRAINS * GRAIN * torch.get_num_threads()
    while size >= GRAIN * torch.get_num_threads():
        whole = len(flat) // size * size
        for part in torch.split(flat[:whole], size):
            function(part)
        flat = flat[whole:]
        size = size // 2
    for part in torch.split(flat, GRAIN // 2):
        function(part)


def value_and_slope(activation: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an activation function and its derivative at x."""
    with torch.inference_mode(False), torch.enable_grad():
        at = x.clone().requires_grad_()
        y = SMOOTH[activation](at)
        (slope,) = torch.autograd.grad(y.sum(), at)
    return y.detach(), slope
