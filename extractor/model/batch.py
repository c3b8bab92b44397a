"""Sequences made ready for the forward pass: padded rows, positions, masks, targets, and the hook on their values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from headwater.extractor.model.tap import Tap
from headwater.extractor.model.weights import ModelConfig
from headwater.kernels.cpu.products import GROUP
from headwater.kernels.mask import RowBlock, split_rows
from headwater.kernels.output import ResidualOutput

ROWS = 16
ATTENTION_ROWS = 128
LOGIT_ROWS = 512
LOGIT_BYTES = 64 << 20


class Forward(Protocol):
    """A model as the walk and the hooks see it, a layer at a time."""

    config: ModelConfig

    def embed(self, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the residual stream at depth 0, [B, T, D], written to `out` where one is given."""

    def layer(
        self,
        layer: int,
        x_BTD: torch.Tensor,
        batch: Batch,
        tap: Tap,
        previous: torch.Tensor | None = None,
    ) -> ResidualOutput | None:
        """Advance the residual stream through one layer, in place."""

    def finish(self, x_BTD: torch.Tensor, batch: Batch, tap: Tap) -> None:
        """Give what comes behind the last layer, as far as the tap wants it."""


class Hook(Protocol):
    """What the forward pass asks before it uses a value; `changes` is false wherever nothing is to be done."""

    def prepare(self, model: Forward, layer: int, batch: Batch, tap: Tap) -> None:
        """Make ready for a layer, or for the output where `layer` is n_layer; the scratch memory is free."""

    def changes(self, site: str, layer: int) -> bool:
        """Say whether a site is changed (or looked at) at a layer or depth."""

    def apply(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Change a value [B, T, …] in place; what is left alone keeps its bits."""

    def apply_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> bool:
        """Change one row block [N, Q, K] of `pattern` or `attn_scores` in place; say whether any bit changed."""


class NoHook:
    """Change nothing."""

    def prepare(self, model: Forward, layer: int, batch: Batch, tap: Tap) -> None:
        """Do nothing."""

    def changes(self, site: str, layer: int) -> bool:
        """Say no."""
        return False

    def apply(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Fail: nothing is changed."""
        raise AssertionError(site)

    def apply_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> bool:
        """Fail: nothing is changed."""
        raise AssertionError(site)


NO_HOOK = NoHook()


@dataclass(frozen=True)
class Batch:
    """B sequences of T positions, T padded to a multiple of 16 so that results don't depend on the batch.

    `tokens`, `positions`, `targets` are int64 [B, T], `row_start` int32 [B, T]: position t attends to the keys
    [row_start, t], and nothing where row_start > t (padding). `targets` is the next token, −1 where there is none.
    `hook` changes values on their way.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    row_start: torch.Tensor
    targets: torch.Tensor
    blocks: list[list[RowBlock]]
    hook: Hook = NO_HOOK

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the row blocks are for the CPU and stay there."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("tokens", "positions", "row_start", "targets")
        }
        return replace(self, **moved)


def attention_rows(n_positions: int, tile: int | None = None) -> int:
    """Return how many queries the attention takes at once: at most 128, and a divisor of the tile edge."""
    edge = padded(n_positions)
    if tile is not None and tile < n_positions:
        edge = tile
    if edge <= ATTENTION_ROWS or edge % ATTENTION_ROWS:
        return edge
    return ATTENTION_ROWS


def logit_rows(d_vocab: int, value_bytes: int) -> int:
    """Return how many rows of logits are held at once: LOGIT_BYTES of them, but no less than two groups of rows."""
    rows = min(LOGIT_BYTES // (d_vocab * value_bytes), LOGIT_ROWS)
    return max(rows, 2 * GROUP - 1)


def padded(n_positions: int) -> int:
    """Round a number of positions up to a multiple of 16."""
    return -(-n_positions // ROWS) * ROWS


def make_batch(tokens: np.ndarray, row_start: np.ndarray, tile: int | None = None) -> Batch:
    """Pad token ids and row starts, both int32 [B, T], and derive positions, targets and attention blocks.

    A position counts from the start of its row (t − row_start). The target of a position is the next token where that
    one sees it, so never across documents that are kept apart. Padding is computed as token 0 and means nothing.
    """
    n, length = tokens.shape
    wide = padded(length)
    # What is added at the right begins behind itself, at t + 1, and so sees nothing.
    starts = np.tile(np.arange(1, wide + 1, dtype=np.int32), (n, 1))
    starts[:, :length] = row_start
    ids = np.zeros((n, wide), np.int64)
    ids[:, :length] = tokens
    t = np.arange(wide)
    real = starts <= t
    ids[~real] = 0
    positions = np.where(real, t - starts, 0)
    targets = np.full((n, wide), -1, np.int64)
    # t + 1 is a target of t where both are real and the row of t + 1 begins at t or before: it is the same row.
    follows = real[:, :-1] & real[:, 1:] & (starts[:, 1:] <= t[:-1])
    targets[:, :-1][follows] = ids[:, 1:][follows]
    starts_t = torch.from_numpy(starts)
    n_rows = attention_rows(length, tile)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        starts_t,
        torch.from_numpy(targets),
        [split_rows(row, n_rows) for row in starts_t],
    )
