"""Carry values from the forward pass to their places in the store: select, cast, mask padding, count overflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from headwater.extractor.selection import Selection
from headwater.extractor.sites import RESID_STATISTICS, SITES, VECTOR
from headwater.kernels.mask import RowBlock
from headwater.store.layout import ArraySpec
from headwater.store.writer import Part

POSITION_DIMS = ("position", "query", "key")


class OverflowFound(RuntimeError):
    """Values cannot be held by the stored dtype; the message says where and what to do."""


class Sink(Protocol):
    """Where captured values go: a BlockWriter, or memory."""

    def parts(self, name: str, lead: int, first: int, n: int) -> Iterator[Part]:
        """Yield places for sequences [first, first + n)."""

    def tile_row(self, name: str, lead: int, sequence: int, row: int) -> np.ndarray:
        """Return one row of causal tiles to fill."""

    def send_tiles(self, name: str) -> None:
        """Say that the row of tiles is full."""


@dataclass
class CaptureTap:
    """The tap of extraction. `place` it before each micro-batch, then hand it to the model.

    `casts` counts, by array, values that became infinite in the stored dtype and values that were not finite before.
    """

    selection: Selection
    specs: dict[str, ArraySpec]
    sink: Sink
    top_k: int = 1
    keep_overflow: bool = False
    casts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lead = {
            axis: {index: i for i, index in enumerate(self.selection.along(axis))} for axis in ("layer", "depth", None)
        }
        self._sites = frozenset(self.selection.sites)
        self._previous: torch.Tensor | None = None
        self._heads: torch.Tensor | None = None

    def place(self, first: int, row_start_BT: torch.Tensor, n_positions: int, n_head: int) -> None:
        """Say which sequences of the run come next, and which of their positions are padding."""
        self._first, self._n, self._length = first, row_start_BT.shape[0], n_positions
        hidden = row_start_BT[:, :n_positions] > torch.arange(n_positions)
        self._hidden = hidden if bool(hidden.any()) else None
        self._heads = None if len(self.selection.heads) == n_head else torch.tensor(self.selection.heads)
        self._positions = self._chosen_positions(hidden)

    def wants(self, site: str, layer: int) -> bool:
        """Say whether a site is stored at a layer (or depth)."""
        return site in self._sites and layer in self._lead[SITES[site].axis]

    @property
    def wants_previous(self) -> bool:
        """Whether the residual stream one depth before is needed."""
        return "resid_cosine" in self._sites

    def take_depth(self, depth: int, x_BTD: torch.Tensor, previous_BTD: torch.Tensor | None) -> None:
        """Store the residual stream and its statistics at one depth."""
        if self.wants("resid", depth):
            self.take("resid", depth, x_BTD)
        if not any(self.wants(site, depth) for site in RESID_STATISTICS):
            return
        x = x_BTD[:, : self._length]
        norm = torch.linalg.vector_norm(x, dim=-1)
        if self.wants("resid_norm", depth):
            self.take("resid_norm", depth, norm)
        if self.wants("resid_cosine", depth):
            cosine = torch.full_like(norm, torch.nan)
            if previous_BTD is not None:
                before = previous_BTD[:, : self._length]
                cosine = torch.linalg.vecdot(x, before) / (norm * torch.linalg.vector_norm(before, dim=-1))
            self._store("resid_cosine", depth, cosine, count=previous_BTD is not None)
        if self.wants("resid_max", depth) or self.wants("resid_argmax", depth):
            largest, dimension = x.abs().max(-1)
            for site, value in (("resid_max", largest), ("resid_argmax", dimension)):
                if self.wants(site, depth):
                    self.take(site, depth, value)

    def take(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Store a value of the micro-batch."""
        self._store(site, layer, value, count=site != "loss")

    def _store(self, site: str, layer: int, value: torch.Tensor, count: bool) -> None:
        spec = self.specs[site]
        dims = SITES[site].dims[1 if spec.axis is None else 2 :]
        along = next(i for i, dim in enumerate(dims) if dim in POSITION_DIMS) + 1
        value = value.narrow(along, 0, self._length)
        hidden = self._hidden
        if self._heads is not None and "head" in dims:
            value = value.index_select(dims.index("head") + 1, self._heads)
        if self._positions is not None and SITES[site].group == VECTOR:
            index = self._positions.view(*self._positions.shape, *([1] * (value.ndim - 2)))
            value = value.gather(1, index.expand(-1, -1, *value.shape[2:]))
            hidden = None if hidden is None else hidden.gather(1, self._positions)
        mask = None
        if hidden is not None:
            mask = hidden.view(
                hidden.shape[0], *([1] * (along - 1)), hidden.shape[1], *([1] * (value.ndim - along - 1))
            )
        lead = self._lead[spec.axis][layer]
        for part in self.sink.parts(site, lead, self._first, self._n):
            source = value[part.sequences, part.positions]
            target = torch.from_numpy(part.view)
            target.copy_(source)
            cut = None if mask is None else mask[part.sequences, part.positions if along == 1 else slice(None)]
            if count and target.is_floating_point():
                self._check(site, layer, source, target, cut)
            if cut is not None:
                target.masked_fill_(cut, spec.fill)

    def take_rows(self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor) -> None:
        """Store one row block [N, Q, K] of the pattern or the scores as rows of causal tiles."""
        spec = self.specs[site]
        edge, length = spec.chunk[-1], self._length
        last = min(block.last, length)
        if block.first >= last:
            return
        if self._heads is not None:
            value = value.index_select(0, self._heads)
        row, lead = block.first // edge, self._lead["layer"][layer]
        tiles = torch.from_numpy(self.sink.tile_row(site, lead, self._first + sequence, row))
        n_rows, top = last - block.first, block.first - row * edge
        source = value.view(*tiles.shape[1:3], *value.shape[1:])[:, :, :n_rows]
        for j in range(row + 1):
            target = tiles[j, :, :, top : top + n_rows]
            low, high = max(j * edge, block.key), min((j + 1) * edge, last)
            if low > j * edge or high < (j + 1) * edge:
                target.fill_(spec.fill)
            if low < high:
                target[..., low - j * edge : high - j * edge].copy_(source[..., low - block.key : high - block.key])
        if site == "attn_scores":
            self._hide_scores(site, layer, tiles[:, :, :, top : top + n_rows], source)
        elif not bool(torch.isfinite(source[..., 0].sum())):  # the softmax makes a row finite or NaN as a whole
            self._note(site, layer, 0, int((~torch.isfinite(source)).sum()))
        if last == length or block.last % edge == 0:
            self.sink.send_tiles(site)

    def _hide_scores(self, site: str, layer: int, stored: torch.Tensor, source: torch.Tensor) -> None:
        """Make hidden keys (−inf before the softmax) NaN, and count what overflowed besides."""
        n_hidden = int(torch.isneginf(source).sum())
        n_infinite = int(torch.isinf(stored).sum())
        broken = int(torch.isnan(source).sum() + torch.isposinf(source).sum())
        if n_infinite > n_hidden or broken:
            self._note(site, layer, n_infinite - n_hidden, broken)
        stored.masked_fill_(torch.isneginf(stored), torch.nan)

    def _check(
        self, site: str, layer: int, source: torch.Tensor, stored: torch.Tensor, hidden: torch.Tensor | None
    ) -> None:
        low, high = torch.aminmax(stored)
        if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
            return
        real = torch.ones((), dtype=torch.bool) if hidden is None else ~hidden
        overflow = int((torch.isinf(stored) & torch.isfinite(source) & real).sum())
        nonfinite = int((~torch.isfinite(source) & real).sum())
        if overflow or nonfinite:
            self._note(site, layer, overflow, nonfinite)

    def _note(self, site: str, layer: int, overflow: int, nonfinite: int) -> None:
        count = self.casts.setdefault(site, {"overflow": 0, "nonfinite": 0})
        count["overflow"] += overflow
        count["nonfinite"] += nonfinite
        if self.keep_overflow:
            return
        dtype = self.specs[site].dtype
        where = f"{site} at {SITES[site].axis} {layer}" if SITES[site].axis else site
        if overflow:
            raise OverflowFound(
                f"{overflow} values of {where} are too large for {dtype} (largest "
                f"{np.finfo(dtype).max:g}) in sequences {self._first} to {self._first + self._n - 1}. "
                f"Store them wider in a new run, with --dtype {site}=float32, or keep the infinities "
                "with --on-overflow keep."
            )
        raise OverflowFound(
            f"{nonfinite} values of {where} are NaN or infinite before they are stored, in sequences "
            f"{self._first} to {self._first + self._n - 1}. Try --compute fp32; keep them with "
            "--on-overflow keep in a new run."
        )

    def _chosen_positions(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return the selected positions of each sequence, int64 [B, n]; `last` is the last real one."""
        if self.selection.positions is None:
            return None
        if self.selection.positions == (-1,):
            real = (~hidden).to(torch.int64) * torch.arange(1, self._length + 1)
            return (real.amax(1, keepdim=True) - 1).clamp_(min=0)
        return torch.tensor(self.selection.positions).expand(self._n, -1)
