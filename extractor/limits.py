"""What bounds a run: from its ledger, where the time went; from its plan, which of compute, link and disk will."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from headwater.extractor.block import HEAD_SITES, last_layer
from headwater.extractor.memory import COMPUTE_BYTES
from headwater.extractor.model.batch import logit_rows, padded
from headwater.extractor.plan import Plan
from headwater.extractor.request import RunConfig
from headwater.extractor.sites import SITES, SQUARE, RequestError
from headwater.kernels.cpu.rows import STATISTICS
from headwater.store.layout import sequence_bytes

LIMITS = {"compute": ("TFLOP/s", 1e12), "link": ("GB/s", 1e9), "disk": ("GB/s", 1e9)}
GPU_TFLOPS = {"fp32": 60.0, "bf16": 400.0, "fp16": 400.0}
LINK_GB = 50.0
DISK_GB = 1.0
PROBE_ROWS = 1024
PROBE_ROUNDS = 4
GPU_BASE_BYTES = 768 << 20


@dataclass(frozen=True)
class Rate:
    """What a machine does in a second, operations or bytes; `how` is "measured", "assumed" or "stated"."""

    value: float
    how: str


@dataclass(frozen=True)
class Projection:
    """Tokens a second that each limit allows; `statistics` with row statistics in the place of squares, if any."""

    rates: dict[str, Rate]
    tokens_per_second: dict[str, float]
    statistics: float | None

    @property
    def bound(self) -> str:
        """The lowest limit."""
        return min(self.tokens_per_second, key=lambda limit: self.tokens_per_second[limit])


def bottleneck(seconds: Mapping[str, float]) -> tuple[str, dict[str, float]]:
    """Return the busiest part of a run and the busy seconds of each part, which work at the same time.

    Parts are `compute`, `disk` and, from a device, `copy` and `encode`; without a device compute encodes, too.
    """
    waited = 0.0 if "copy" in seconds else seconds.get("wait", 0.0)
    busy = {name: seconds[name] for name in ("copy", "encode") if name in seconds}
    busy["compute"] = max(seconds.get("compute", 0.0) - waited, 0.0)
    busy["disk"] = seconds.get("write", 0.0) + seconds.get("sync", 0.0)
    return max(busy, key=lambda name: busy[name]), busy


def read_rates(text: str) -> dict[str, Rate]:
    """Read stated rates such as "compute=300,link=25,disk=2.5", in TFLOP/s and GB/s."""
    rates = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if name not in LIMITS or not 0 < value < 1e9:
            raise RequestError(
                f"--assume {text!r}: {part.strip()!r} is no rate; expected for example compute=300 "
                "(TFLOP/s), link=25 or disk=2.5 (GB/s)."
            )
        rates[name] = Rate(value * LIMITS[name][1], "stated")
    return rates


def find_rates(config: RunConfig, stated: Mapping[str, Rate]) -> dict[str, Rate]:
    """Return the rates that a run will meet: as stated, else measured on this CPU, else assumed."""
    rates = {"disk": Rate(DISK_GB * 1e9, "assumed")}
    if config.device != "cpu":
        rates |= {
            "compute": Rate(GPU_TFLOPS[config.compute] * 1e12, "assumed"),
            "link": Rate(LINK_GB * 1e9, "assumed"),
        }
    rates |= {
        name: rate for name, rate in stated.items() if name != "link" or config.device != "cpu"
    }
    if "compute" not in rates:
        rates["compute"] = Rate(_probe(config.compute), "measured")
    return {name: rates[name] for name in LIMITS if name in rates}


def project(plan: Plan, rates: Mapping[str, Rate]) -> Projection:
    """Project the tokens a second of a plan; bytes are counted before a codec."""
    n_tokens = plan.n_sequences * plan.geometry.seq_len
    sizes = plan.array_bytes()
    n_bytes = sum(sizes.values()) / n_tokens
    squares = sum(sizes[name] for name in sizes if SITES[name].group == SQUARE) / n_tokens
    flops = flops_per_token(plan)
    rows = 4 * len(STATISTICS) * plan.model.n_head * len(plan.selection.layers)

    def limits(n_bytes: float) -> dict[str, float]:
        per_token = {"compute": flops, "link": n_bytes, "disk": n_bytes}
        return {name: rate.value / max(per_token[name], 1e-9) for name, rate in rates.items()}

    instead = min(limits(n_bytes - squares + rows).values()) if squares else None
    return Projection(dict(rates), limits(n_bytes), instead)


def device_bytes(config: RunConfig, plan: Plan) -> int:
    """Project the memory that a run needs on its GPU: weights, the block's stream, a micro-batch's work and copies."""
    model = plan.model
    shape = plan.geometry
    item = COMPUTE_BYTES[config.compute]
    wide = padded(shape.seq_len)
    rows = shape.micro * wide
    d = model.d_model
    weights = sum(prod(s) for s in model.shapes().values()) * item + 2 * model.d_vocab * d * max(
        item, 4
    )
    work = rows * (4 * d * 4 + (5 * d + 2 * model.d_mlp) * item + 8 * model.n_head * 4)
    sequence = max((sequence_bytes(spec) for spec in plan.arrays), default=0)
    copies = 3 * shape.micro * sequence
    copies += 16 * model.n_head * wide**2 if "attn_scores" in plan.selection.sites else 0
    if set(plan.selection.sites) & set(HEAD_SITES):
        copies += logit_rows(model.d_vocab, 4 + item) * model.d_vocab * (8 + item)
    return GPU_BASE_BYTES + int(1.1 * (weights + 4 * shape.block * wide * d + work + copies))


def flops_per_token(plan: Plan) -> float:
    """Return the floating-point operations of a forward for one token: weights, causal attention, unembedding."""
    model = plan.model
    n_layer = last_layer(plan.selection, plan.model.n_layer)
    shapes = model.shapes()
    weights = sum(
        prod(shape) for name, shape in shapes.items() if name.startswith("h.0.") and len(shape) == 2
    )
    attention = 2 * plan.geometry.seq_len * model.d_model
    head = model.d_vocab * model.d_model if set(plan.selection.sites) & set(HEAD_SITES) else 0
    return 2.0 * (n_layer * weights + head) + n_layer * attention


def _probe(compute: str) -> float:
    """Return the FLOP/s of this CPU in a matrix product, the best of a few."""
    import torch

    from headwater.extractor.model.forward import COMPUTE
    from headwater.kernels.cpu import products

    a = torch.ones(PROBE_ROWS, PROBE_ROWS, dtype=COMPUTE[compute])
    best = float("inf")
    openblas = compute == "fp32" and products.library() != "torch"
    out = torch.empty_like(a)
    for _ in range(PROBE_ROUNDS):
        start = time.perf_counter()
        if openblas:
            products.multiply(a[None], a, None, out[None])
        else:
            torch.mm(a, a, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * PROBE_ROWS**3 / best
