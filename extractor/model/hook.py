"""The one hook of the forward pass through which values are changed while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from headwater.kernels.mask import RowBlock

if TYPE_CHECKING:
    from headwater.extractor.model.batch import Batch
    from headwater.extractor.model.forward import Model, Tap


class Hook(Protocol):
    """What the forward pass asks before it uses a value; `changes` is false wherever nothing is to be done."""

    def prepare(self, model: Model, layer: int, batch: Batch, tap: Tap) -> None:
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

    def prepare(self, model: Model, layer: int, batch: Batch, tap: Tap) -> None:
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


class RecordHook(NoHook):
    """Change nothing, but keep whole values of chosen (site, layer): [B, T, …], patterns [B, N, T, T].

    What no query sees of a pattern is 0. Unlike a tap, a hook that changes nothing changes no bit of the pass.
    """

    def __init__(self, wanted: set[tuple[str, int]]) -> None:
        self.wanted = wanted
        self.kept: dict[tuple[str, int], torch.Tensor] = {}
        self._shape = (0, 0)

    def prepare(self, model: Model, layer: int, batch: Batch, tap: Tap) -> None:
        """Note the size of the batch."""
        self._shape = (batch.tokens.shape[0], batch.tokens.shape[1])

    def changes(self, site: str, layer: int) -> bool:
        """Ask for what was chosen."""
        return (site, layer) in self.wanted

    def apply(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Copy a value."""
        self.kept[site, layer] = value.clone()

    def apply_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> bool:
        """Copy a row block to its place in the square."""
        if (site, layer) not in self.kept:
            n, length = self._shape
            self.kept[site, layer] = value.new_zeros(n, value.shape[0], length, length)
        self.kept[site, layer][sequence, :, block.first : block.last, block.key : block.last] = (
            value
        )
        return False


NO_HOOK = NoHook()
