"""A hook that looks at values and changes none."""

from __future__ import annotations

import torch

from headwater.extractor.model.batch import Batch, Forward, NoHook
from headwater.extractor.model.tap import Tap
from headwater.kernels.mask import RowBlock


class RecordHook(NoHook):
    """Change nothing, but keep whole values of chosen (site, layer): [B, T, …], patterns [B, N, T, T].

    What no query sees of a pattern is 0. Unlike a tap, a hook that changes nothing changes no bit of the pass.
    """

    def __init__(self, wanted: set[tuple[str, int]]) -> None:
        self.wanted = wanted
        self.kept: dict[tuple[str, int], torch.Tensor] = {}
        self._shape = (0, 0)

    def prepare(self, model: Forward, layer: int, batch: Batch, tap: Tap) -> None:
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
