"""Capture with Headwater: one call; the run is sharded Zarr, committed block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import headwater
from headwater.extractor.run import Progress

PACED = True
STATISTICS = (
    "attn_entropy",
    "attn_max",
    "attn_argmax",
    "attn_sink",
    "attn_distance",
    "attn_self",
    "attn_prev",
    "attn_received",
)


def load(model: str) -> str:
    """Return the model's name: extraction reads it itself."""
    return model


def extract(
    model: str, tokens: str, out: str, batch: int, observe: Callable[[], None] | None, **what: Any
) -> None:
    """Extract a run and report every block as it is committed."""
    config = headwater.RunConfig(model=model, tokens=tokens, out=out, block=batch, **what)

    def report(progress: Progress) -> None:
        if observe is not None and progress.entry is not None:
            observe()

    headwater.extract(config, report)


def residual(
    model: str, tokens: str, out: str, batch: int, observe: Callable[[], None] | None = None
) -> None:
    """Store the residual stream at all depths."""
    extract(model, tokens, out, batch, observe, preset="residual")


def patterns(
    model: str, tokens: str, out: str, batch: int, observe: Callable[[], None] | None = None
) -> None:
    """Store the residual stream and every pattern."""
    extract(model, tokens, out, batch, observe, preset="patterns")


def only_statistics(
    model: str, tokens: str, out: str, batch: int, observe: Callable[[], None] | None = None
) -> None:
    """Store the statistics of every pattern."""
    extract(model, tokens, out, batch, observe, sites=STATISTICS)


def read(out: str, site: str, layer: int, sequence: int, position: int, batch: int) -> np.ndarray:
    """Read one vector back: [d_model] of a state, [head, key] of patterns, [head] of statistics."""
    array = headwater.open_run(out)[site]
    return np.array(
        array[layer, sequence, position] if site == "resid" else array[layer, sequence, :, position]
    )
