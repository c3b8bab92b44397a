"""The one walk through a model: every micro-batch passes a layer before any goes on to the next.

Layer by layer, what a layer gives is complete for a whole block when the layer is done, so that its shards can be
written and its memory used again; and a layer's weights stay in the cache for all micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwater.extractor.model.batch import Batch, Forward
from headwater.extractor.model.tap import Tap


@dataclass(frozen=True)
class Micro:
    """Sequences that are computed together: those from `first` on, with memory for their residual stream."""

    first: int
    batch: Batch
    x_BTD: torch.Tensor


def walk(model: Forward, micros: Sequence[Micro], tap: Tap, n_layers: int) -> None:
    """Take micro-batches through the first `n_layers` and the output, as far as the tap wants it.

    Their residual streams are changed in place; at the end they hold the state at depth `n_layers`.
    """
    for micro in micros:
        tap.place(micro.first, micro.batch.row_start)
        model.embed(micro.batch, micro.x_BTD)
        tap.take_depth(0, micro.x_BTD, None)
    tap.end("depth", 0)
    walk_layers(model, micros, tap, 0, n_layers)
    for micro in micros:
        tap.place(micro.first, micro.batch.row_start)
        model.finish(micro.x_BTD, micro.batch, tap)


def walk_layers(model: Forward, micros: Sequence[Micro], tap: Tap, first: int, last: int) -> None:
    """Take micro-batches whose streams are at depth `first` through the layers [first, last)."""
    for layer in range(first, last):
        for micro in micros:
            tap.place(micro.first, micro.batch.row_start)
            previous = None
            if tap.wants_previous:  # the layer changes the stream in place
                previous = micro.x_BTD.clone()
            told = model.layer(layer, micro.x_BTD, micro.batch, tap, previous)
            tap.take_depth(layer + 1, micro.x_BTD, previous, told)
        tap.end("layer", layer)
        tap.end("depth", layer + 1)
