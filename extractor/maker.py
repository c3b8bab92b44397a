"""What computes here: software and processor, as far as they decide a value's last bits."""

from __future__ import annotations

import platform
from contextlib import suppress
from datetime import UTC, datetime

import torch

from headwater.kernels.cpu import products
from headwater.kernels.gpu import launch
from headwater.store.entry import MADE_BY
from headwater.store.version import __version__


def made_by(device: str = "cpu") -> dict[str, object]:
    """Name the software and the kind of processor: on one kind, the same request gives the same bytes."""
    # The compiler and the block sizes decide in which order a GPU adds.
    kernels = {}
    if device != "cpu":
        kernels["kernels"] = launch.identity()
    return {
        "headwater": __version__,
        "torch": torch.__version__,
        "processor": processor(device),
        "products": _products(device),
        **kernels,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def maker(device: str = "cpu") -> dict[str, str]:
    """Return of `made_by` what decides a value's last bits."""
    made = made_by(device)
    return {what: str(made[what]) for what in MADE_BY if what in made}


def _products(device: str) -> str:
    """Name the library whose matrix products the forward takes."""
    if device == "cpu":
        return products.library()
    return "torch"


def processor(device: str = "cpu") -> str:
    """Name the kind of processor, or the GPU, that the values come from."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
