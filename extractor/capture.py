"""Carry values from the forward pass to their places in the store: select, cast, mask padding, count overflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from headwater.extractor.model.tap import NoTap
from headwater.extractor.placement import Placement
from headwater.extractor.plan import Plan
from headwater.extractor.selection import Selection
from headwater.extractor.sites import RESID_STATISTICS, SITES
from headwater.kernels.mask import RowBlock
from headwater.kernels.output import ResidualOutput
from headwater.store.layout import ArraySpec
from headwater.store.writer import Part


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

    def close_layer(self, axis: str, index: int) -> None:
        """Say that no more comes for the index along a leading dimension."""


@dataclass
class Recorder:
    """Put chosen values into the store's layout: cast, padding masked, what the stored type cannot hold counted.

    `casts` counts, by array, values that became infinite in the stored dtype and values that were not finite before.
    """

    selection: Selection
    specs: dict[str, ArraySpec]
    sink: Sink
    keep_overflow: bool = False
    casts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lead = {
            axis: {index: i for i, index in enumerate(self.selection.along(axis))}
            for axis in ("layer", "depth", None)
        }

    def holds(self, site: str, layer: int) -> bool:
        """Say whether a site is stored at a layer (or depth)."""
        return site in self.specs and layer in self._lead[SITES[site].axis]

    def close(self, axis: str, index: int) -> None:
        """Tell the sink that a layer or depth is whole, where it is a chosen one."""
        if index in self._lead[axis]:
            self.sink.close_layer(axis, self._lead[axis][index])

    def put(self, at: Placement, site: str, layer: int, value: torch.Tensor, count: bool) -> None:
        """Store what `Placement.choose` left of a value; `count` what the stored type cannot hold."""
        spec = self.specs[site]
        # Padding is computed like the rest and means nothing: it reads as the fill value, and is not counted.
        mask = at.mask(site, value.ndim)
        lead = self._lead[spec.axis][layer]
        for part in self.sink.parts(site, lead, at.first, at.n):
            source = value[part.sequences, part.positions]
            target = torch.from_numpy(part.view)
            target.copy_(source)  # the cast; what lies beyond the stored type becomes infinite
            hidden = None
            if mask is not None:
                # A mask of one column stands for all positions.
                columns = part.positions if mask.shape[1] > 1 else slice(None)
                hidden = mask[part.sequences, columns]
            if count and target.is_floating_point():
                self._check(at, site, layer, source, target, hidden)
            if hidden is not None:
                target.masked_fill_(hidden, spec.fill)

    def put_rows(
        self,
        at: Placement,
        site: str,
        layer: int,
        sequence: int,
        block: RowBlock,
        value: torch.Tensor,
    ) -> None:
        """Store one row block [N, Q, K] of the pattern or the scores as rows of causal tiles.

        Tile j of a row of tiles holds the keys [j E, (j + 1) E). The block's keys begin at `block.key`: those before
        are hidden from all its queries, those behind its last query too, and read as the fill value.
        """
        spec = self.specs[site]
        edge = spec.chunk[-1]
        length = at.length
        last = min(block.last, length)
        if block.first >= last:
            return
        if at.heads is not None:
            value = value.index_select(0, at.heads)
        row = block.first // edge
        lead = self._lead["layer"][layer]
        tiles = torch.from_numpy(self.sink.tile_row(site, lead, at.first + sequence, row))
        n_rows = last - block.first
        top = block.first - row * edge
        # Heads are stored in groups, [group, head in the group]; a part of the padded rows is left out.
        source = value.view(*tiles.shape[1:3], *value.shape[1:])[:, :, :n_rows]
        for j in range(row + 1):
            target = tiles[j, :, :, top : top + n_rows]
            low = max(j * edge, block.key)
            high = min((j + 1) * edge, last)
            is_partly_hidden = low > j * edge or high < (j + 1) * edge
            if is_partly_hidden:
                target.fill_(spec.fill)
            if low < high:
                inside = slice(low - j * edge, high - j * edge)
                keys = slice(low - block.key, high - block.key)
                target[..., inside].copy_(source[..., keys])
        if site == "attn_scores":
            self._hide_scores(at, layer, tiles[:, :, :, top : top + n_rows], source)
        # The softmax makes a row finite, or NaN on every key that it sees, its own among them.
        elif not bool(torch.isfinite(source.diagonal(block.first - block.key, -2, -1).sum())):
            self.note(at, site, layer, 0, int((~torch.isfinite(source)).sum()))
        if last == length or block.last % edge == 0:
            self.sink.send_tiles(site)

    def put_tiles(self, at: Placement, site: str, layer: int, tiles: torch.Tensor) -> None:
        """Store all causal tiles [N, tile, E, E] of one sequence, the one of `at`, with its chosen heads.

        Row r of the tiles holds r + 1 of them, behind the r (r + 1) / 2 of the rows above.
        """
        lead = self._lead["layer"][layer]
        side = -(-at.length // tiles.shape[-1])
        for row in range(side):
            target = torch.from_numpy(self.sink.tile_row(site, lead, at.first, row))
            grouped = tiles.view(*target.shape[1:3], *tiles.shape[1:])
            above = row * (row + 1) // 2
            source = grouped[:, :, above : above + row + 1]
            target.copy_(source.permute(2, 0, 1, 3, 4))
            self.sink.send_tiles(site)

    def _hide_scores(
        self, at: Placement, layer: int, stored: torch.Tensor, source: torch.Tensor
    ) -> None:
        """Make hidden keys (−inf before the softmax) NaN, and count what overflowed besides."""
        n_hidden = int(torch.isneginf(source).sum())
        n_infinite = int(torch.isinf(stored).sum())
        broken = int(torch.isnan(source).sum() + torch.isposinf(source).sum())
        if n_infinite > n_hidden or broken:
            self.note(at, "attn_scores", layer, n_infinite - n_hidden, broken)
        stored.masked_fill_(torch.isneginf(stored), torch.nan)

    def _check(
        self,
        at: Placement,
        site: str,
        layer: int,
        source: torch.Tensor,
        stored: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> None:
        # Nearly always all is finite: the least and the largest value say so in one pass.
        low, high = torch.aminmax(stored)
        if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
            return
        real = torch.ones((), dtype=torch.bool)
        if hidden is not None:
            real = ~hidden
        overflow = int((torch.isinf(stored) & torch.isfinite(source) & real).sum())
        nonfinite = int((~torch.isfinite(source) & real).sum())
        if overflow or nonfinite:
            self.note(at, site, layer, overflow, nonfinite)

    def note(self, at: Placement, site: str, layer: int, overflow: int, nonfinite: int) -> None:
        """Count values that the stored type cannot hold; raise OverflowFound unless they are to be kept."""
        count = self.casts.setdefault(site, {"overflow": 0, "nonfinite": 0})
        count["overflow"] += overflow
        count["nonfinite"] += nonfinite
        if self.keep_overflow:
            return
        dtype = self.specs[site].dtype
        axis = SITES[site].axis
        where = site
        if axis:
            where = f"{site} at {axis} {layer}"
        sequences = f"{at.first} to {at.first + at.n - 1}"
        if overflow:
            raise OverflowFound(
                f"{overflow} values of {where} are too large for {dtype} (largest "
                f"{np.finfo(dtype).max:g}) in sequences {sequences}. "
                f"Store them wider in a new run, with --dtype {site}=float32, or keep the infinities "
                "with --on-overflow keep."
            )
        raise OverflowFound(
            f"{nonfinite} values of {where} are NaN or infinite before they are stored, in sequences "
            f"{sequences}. Try --compute fp32; keep them with "
            "--on-overflow keep in a new run."
        )


class CaptureTap(NoTap):
    """The tap of extraction: it hands what is chosen of each value to its recorder, at once."""

    def __init__(
        self, plan: Plan, arrays: Sequence[ArraySpec], sink: Sink, keep_overflow: bool = False
    ) -> None:
        self.selection = plan.selection
        self.top_k = plan.top_k
        self._n_positions = plan.geometry.seq_len
        self._n_head = plan.model.n_head
        specs = {spec.name: spec for spec in arrays}
        self.recorder = Recorder(plan.selection, specs, sink, keep_overflow)

    def place(self, first: int, row_start_BT: torch.Tensor) -> None:
        """Say which sequences of the run come next, and which of their positions are padding."""
        self.at = self._placement(first, row_start_BT)

    def _placement(self, first: int, row_start_BT: torch.Tensor) -> Placement:
        return Placement.make(self.selection, first, row_start_BT, self._n_positions, self._n_head)

    def wants(self, site: str, layer: int) -> bool:
        """Say whether a site is stored at a layer (or depth)."""
        return self.recorder.holds(site, layer)

    @property
    def wants_previous(self) -> bool:
        """Whether the residual stream one depth before is needed."""
        return "resid_cosine" in self.selection.sites

    def take_depth(
        self,
        depth: int,
        x_BTD: torch.Tensor,
        previous_BTD: torch.Tensor | None = None,
        told: ResidualOutput | None = None,
    ) -> None:
        """Store the residual stream and its statistics at one depth; what kernels told of it is not needed."""
        if self.wants("resid", depth):
            self.take("resid", depth, x_BTD)
        if not any(self.wants(site, depth) for site in RESID_STATISTICS):
            return
        x = x_BTD[:, : self.at.length]
        norm = torch.linalg.vector_norm(x, dim=-1)
        if self.wants("resid_norm", depth):
            self.take("resid_norm", depth, norm)
        if self.wants("resid_cosine", depth):
            # cos = x·y / (|x| |y|), NaN at depth 0, which is no overflow.
            cosine = torch.full_like(norm, torch.nan)
            if previous_BTD is not None:
                before = previous_BTD[:, : self.at.length]
                norms = norm * torch.linalg.vector_norm(before, dim=-1)
                cosine = torch.linalg.vecdot(x, before) / norms
            self._store("resid_cosine", depth, cosine, count=previous_BTD is not None)
        if self.wants("resid_max", depth) or self.wants("resid_argmax", depth):
            largest, dimension = x.abs().max(-1)
            for site, value in (("resid_max", largest), ("resid_argmax", dimension)):
                if self.wants(site, depth):
                    self.take(site, depth, value)

    def take(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Store a value of the micro-batch; a loss is NaN where there is no next token, and not counted."""
        self._store(site, layer, value, count=site != "loss")

    def _store(self, site: str, layer: int, value: torch.Tensor, count: bool) -> None:
        self.recorder.put(self.at, site, layer, self.at.choose(site, value), count)

    def take_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> None:
        """Store one row block [N, Q, K] of the pattern or the scores as rows of causal tiles."""
        self.recorder.put_rows(self.at, site, layer, sequence, block, value)

    def end(self, axis: str, index: int) -> None:
        """Close a layer or depth, all of which is stored."""
        self.recorder.close(axis, index)

    def finish(self) -> None:
        """Wait until everything is stored: it is."""
