"""The tap of a forward pass on a device: values are chosen, cast and counted there, and cross to the host once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from headwater.extractor.capture import CaptureTap, Sink
from headwater.extractor.model.transfer import Transfer, largest_item
from headwater.extractor.placement import Placement
from headwater.extractor.plan import Plan
from headwater.extractor.sites import RESID_STATISTICS
from headwater.kernels.mask import RowBlock
from headwater.kernels.output import ResidualOutput
from headwater.kernels.residual import residual_tap
from headwater.store.layout import ArraySpec

FROM_KERNEL = {
    "resid_norm": "norm",
    "resid_cosine": "cosine",
    "resid_max": "largest",
    "resid_argmax": "dimension",
}


class DeviceTap(CaptureTap):
    """Take values from a `KernelModel`, on whatever device it runs, and let the recorder store them on another thread.

    Between `place` and the end of a block nothing waits for the device, except for room in the transfer's ring.
    """

    def __init__(
        self,
        plan: Plan,
        arrays: Sequence[ArraySpec],
        sink: Sink,
        transfer: Transfer,
        device: torch.device,
        keep_overflow: bool = False,
    ) -> None:
        super().__init__(plan, arrays, sink, keep_overflow)
        self._transfer = transfer
        self._device = device
        self._nothing = torch.zeros(2, dtype=torch.int64, device=device)
        self._slot: torch.Tensor | None = None
        self._places: dict[int, tuple[Placement, Placement]] = {}

    def place(self, first: int, row_start_BT: torch.Tensor) -> None:
        """Say which sequences of the run come next, and which of their positions are padding."""
        if first not in self._places:  # reading row starts waits for the device, so it is done once
            at = self._placement(first, row_start_BT.cpu())
            self._places[first] = at, at.to(self._device)
        self._host_at, self.at = self._places[first]

    def tile(self, site: str) -> tuple[int, torch.dtype]:
        """Return the edge of a square site's causal tiles and the type that they are stored in."""
        return self.recorder.specs[site].chunk[-1], self._type(site)

    def end(self, axis: str, index: int) -> None:
        """Close a layer or depth once everything that was taken before is stored."""
        self._transfer.then(partial(self.recorder.close, axis, index))

    def finish(self) -> None:
        """Wait until everything is stored."""
        self._transfer.drain()

    def slot(self, depth: int, x_BTD: torch.Tensor) -> torch.Tensor | None:
        """Return where the residual tap shall put a copy of the state at a depth, in the stored type."""
        self._slot = None
        if self.wants("resid", depth):
            self._slot = torch.empty_like(x_BTD, dtype=self._type("resid"))
        return self._slot

    def take_depth(
        self,
        depth: int,
        x_BTD: torch.Tensor,
        previous_BTD: torch.Tensor | None = None,
        told: ResidualOutput | None = None,
    ) -> None:
        """Store the residual stream and its statistics at one depth; `told` is what the residual tap said of it."""
        statistics = [site for site in RESID_STATISTICS if self.wants(site, depth)]
        if not statistics and not self.wants("resid", depth):
            return
        if told is None:
            told = residual_tap(
                x_BTD, out=x_BTD, slot=self.slot(depth, x_BTD), previous=previous_BTD
            )
        if self._slot is not None:
            # The kernel counted a row's overflow; of rows that are padding or not chosen nothing is told.
            overflow = self._real("resid", told.overflow).sum()
            nonfinite = self._real("resid", told.nonfinite).sum()
            chosen = self.at.choose("resid", self._slot).contiguous()
            self._send("resid", depth, chosen, torch.stack([overflow, nonfinite]))
            self._slot = None
        values = {site: getattr(told, FROM_KERNEL[site]) for site in statistics}
        if previous_BTD is None and "resid_cosine" in values:
            values["resid_cosine"] = torch.full_like(values["resid_cosine"], torch.nan)
        for site, value in values.items():
            self._store(
                site, depth, value, count=previous_BTD is not None or site != "resid_cosine"
            )

    def take_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> None:
        raise TypeError(
            f"{site} comes in rows of the pattern; a DeviceTap takes the tiles of a KernelModel"
        )

    def take_tiles(
        self, site: str, layer: int, tiles: torch.Tensor, overflow: torch.Tensor | None = None
    ) -> None:
        """Store all causal tiles of a micro-batch, [B, N, tile, E, E]; `overflow` counts values lost in a cast."""
        if self.at.heads is not None:
            tiles = tiles.index_select(1, self.at.heads)
        for b, part in enumerate(tiles):
            lost = broken = self._nothing[0]
            if overflow is not None:
                lost = overflow[b]
            if site == "pattern":  # scores are NaN where a key is hidden, so they say nothing
                broken = (~part.isfinite()).sum()
            at = self._host_at.part(b, b + 1)
            deliver = partial(self._put_tiles, at, site, layer)
            self._transfer.send([part.contiguous(), torch.stack([lost, broken])], deliver)

    def _store(self, site: str, layer: int, value: torch.Tensor, count: bool) -> None:
        chosen = self.at.choose(site, value)
        dtype = self._type(site)
        stored = chosen.to(dtype, copy=True, memory_format=torch.contiguous_format)
        counts = self._nothing
        if count and dtype.is_floating_point:
            counts = self._count(site, chosen, stored)
        self._send(site, layer, stored, counts)

    def _count(self, site: str, value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Count on the device what became infinite in the cast and what was not finite before, int64 [2]."""
        finite = value.isfinite()
        hidden = self.at.mask(site, value.ndim)
        lost = stored.isinf() & finite
        broken = ~finite
        if hidden is not None:
            lost = lost & ~hidden
            broken = broken & ~hidden
        return torch.stack([lost.sum(), broken.sum()])

    def _real(self, site: str, counts_BT: torch.Tensor) -> torch.Tensor:
        """Cut counts of each row to the chosen positions that are no padding."""
        chosen = self.at.choose(site, counts_BT)
        hidden = self.at.mask(site, 2)
        if hidden is None:
            return chosen
        return chosen.masked_fill(hidden, 0)

    def _send(self, site: str, layer: int, stored: torch.Tensor, counts: torch.Tensor) -> None:
        """Send a value in pieces of whole sequences that fit the ring; its counts go with the first."""
        n = stored.shape[0]
        n_bytes = max(stored.numel() * stored.element_size(), 1)
        # One sequence always fits: the ring is made twice as large as the largest (see `ring_capacity`).
        per = max(largest_item(self._transfer.ring.capacity) * n // n_bytes, 1)
        for first in range(0, n, per):
            last = min(first + per, n)
            deliver = partial(self._put, self._host_at.part(first, last), site, layer)
            self._transfer.send([stored[first:last], counts], deliver)
            counts = self._nothing

    def _type(self, site: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.recorder.specs[site].dtype)
        return dtype

    def _put(
        self, at: Placement, site: str, layer: int, stored: torch.Tensor, counts: torch.Tensor
    ) -> None:
        self._note(at, site, layer, counts)
        self.recorder.put(at, site, layer, stored, count=False)

    def _put_tiles(
        self, at: Placement, site: str, layer: int, tiles: torch.Tensor, counts: torch.Tensor
    ) -> None:
        self._note(at, site, layer, counts)
        self.recorder.put_tiles(at, site, layer, tiles)

    def _note(self, at: Placement, site: str, layer: int, counts: torch.Tensor) -> None:
        overflow, nonfinite = counts.tolist()
        if overflow or nonfinite:
            self.recorder.note(at, site, layer, overflow, nonfinite)


def cut_tiles(square_BNQK: torch.Tensor, edge: int, fill: float) -> torch.Tensor:
    """Cut squares [B, N, T, T] into their causal tiles [B, N, tile, E, E]; what lies beyond T is `fill`."""
    n_positions = square_BNQK.shape[-1]
    side = -(-n_positions // edge)
    room = side * edge - n_positions
    padded = torch.nn.functional.pad(square_BNQK, (0, room, 0, room), value=fill)
    rows, keys = torch.tril_indices(side, side, device=padded.device)
    grid = padded.view(*padded.shape[:-2], side, edge, side, edge).transpose(-3, -2)
    tiles: torch.Tensor = grid[..., rows, keys, :, :]
    return tiles.contiguous()
