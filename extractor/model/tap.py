"""What the forward pass asks and tells while it runs, and the tap that takes nothing."""

from __future__ import annotations

from typing import Protocol

import torch

from headwater.kernels.mask import RowBlock
from headwater.kernels.output import ResidualOutput


class Tap(Protocol):
    """What receives values on their way; the walk says which micro-batch they are of, and when a layer is done."""

    top_k: int

    @property
    def wants_previous(self) -> bool:
        """Whether the residual stream one depth before is needed at each depth."""

    def place(self, first: int, row_start_BT: torch.Tensor) -> None:
        """Learn which sequences come next: those from `first` on, with their padding."""

    def wants(self, site: str, layer: int) -> bool:
        """Say whether a site is to be computed at a layer (or depth)."""

    def take(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Receive a site's value [B, T, …]; the memory is used again after the call."""

    def take_depth(
        self,
        depth: int,
        x_BTD: torch.Tensor,
        previous_BTD: torch.Tensor | None = None,
        told: ResidualOutput | None = None,
    ) -> None:
        """Receive the residual stream at a depth; `told` is what the kernel that made it says of it."""

    def take_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> None:
        """Receive one row block [N, Q, K] of `pattern` or `attn_scores` of one sequence of the batch."""

    def take_tiles(
        self, site: str, layer: int, tiles: torch.Tensor, overflow: torch.Tensor | None = None
    ) -> None:
        """Receive all causal tiles [B, N, tile, E, E] of a square site; `overflow` counts values lost in a cast."""

    def tile(self, site: str) -> tuple[int, torch.dtype]:
        """Return the edge of a square site's causal tiles and the type that they are stored in."""

    def slot(self, depth: int, x_BTD: torch.Tensor) -> torch.Tensor | None:
        """Return where a kernel shall put a copy of the state at a depth, None for no copy."""

    def end(self, axis: str, index: int) -> None:
        """Learn that a layer, or a depth, is done for all micro-batches."""


class NoTap:
    """Take nothing: the plain forward pass. Taps that take a little override `wants` and `take`."""

    top_k: int = 1

    @property
    def wants_previous(self) -> bool:
        """Need no earlier state."""
        return False

    def place(self, first: int, row_start_BT: torch.Tensor) -> None:
        """Need not know."""

    def wants(self, site: str, layer: int) -> bool:
        """Want nothing."""
        return False

    def take(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Fail: nothing is wanted."""
        raise AssertionError(site)

    def take_depth(
        self,
        depth: int,
        x_BTD: torch.Tensor,
        previous_BTD: torch.Tensor | None = None,
        told: ResidualOutput | None = None,
    ) -> None:
        """Take the residual stream where it is wanted."""
        if self.wants("resid", depth):
            self.take("resid", depth, x_BTD)

    def take_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> None:
        """Fail: no rows are wanted."""
        raise AssertionError(site)

    def take_tiles(
        self, site: str, layer: int, tiles: torch.Tensor, overflow: torch.Tensor | None = None
    ) -> None:
        """Fail: no tiles are wanted."""
        raise AssertionError(site)

    def tile(self, site: str) -> tuple[int, torch.dtype]:
        """Fail: no tiles are wanted."""
        raise AssertionError(site)

    def slot(self, depth: int, x_BTD: torch.Tensor) -> torch.Tensor | None:
        """Ask for no copy of the residual stream."""
        return None

    def end(self, axis: str, index: int) -> None:
        """Do nothing."""
