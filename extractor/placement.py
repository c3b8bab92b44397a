"""Which sequences of a run a micro-batch holds, and what of its values is kept: real positions, heads, positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headwater.extractor.selection import Selection
from headwater.extractor.sites import SITES, VECTOR

POSITION_DIMS = ("position", "query", "key")


@dataclass(frozen=True)
class Placement:
    """A micro-batch's place: sequences [first, first + n) of the run, `length` real positions of each.

    `hidden` is bool [B, T] where there is padding, `heads` the chosen heads where not all are, `positions` int64
    [B, n] the chosen positions of each sequence; None stands for nothing hidden, and for all.
    """

    first: int
    n: int
    length: int
    hidden: torch.Tensor | None
    heads: torch.Tensor | None
    positions: torch.Tensor | None

    @staticmethod
    def make(
        selection: Selection, first: int, row_start_BT: torch.Tensor, length: int, n_head: int
    ) -> Placement:
        """Place a micro-batch whose row starts lie on the CPU."""
        # A position whose row begins behind it sees nothing, itself included: that is how padding is written.
        hidden_BT = row_start_BT[:, :length] > torch.arange(length)
        heads = None
        if len(selection.heads) != n_head:
            heads = torch.tensor(selection.heads)
        place = Placement(
            first=first,
            n=row_start_BT.shape[0],
            length=length,
            hidden=None,
            heads=heads,
            positions=_chosen_positions(selection.positions, hidden_BT),
        )
        return replace(place, hidden=hidden_BT) if bool(hidden_BT.any()) else place

    def to(self, device: torch.device) -> Placement:
        """Return the same place with its tensors on a device."""
        return replace(
            self,
            hidden=_moved(self.hidden, device),
            heads=_moved(self.heads, device),
            positions=_moved(self.positions, device),
        )

    def part(self, first: int, last: int) -> Placement:
        """Return the place of the sequences [first, last) of this micro-batch."""
        return replace(
            self,
            first=self.first + first,
            n=last - first,
            hidden=_cut(self.hidden, first, last),
            positions=_cut(self.positions, first, last),
        )

    def choose(self, site: str, value: torch.Tensor) -> torch.Tensor:
        """Cut a site's value [B, …] of a padded micro-batch to what is kept of it; a view where that is possible."""
        dims = inner_dims(site)
        value = value.narrow(_along(dims), 0, self.length)
        if self.heads is not None and "head" in dims:
            value = value.index_select(dims.index("head") + 1, self.heads)
        if self.positions is not None and SITES[site].group == VECTOR:
            # gather wants an index as large as its result: [B, n] is stretched over the dimensions behind.
            inner = value.shape[2:]
            index = self.positions.view(*self.positions.shape, *[1 for _ in inner])
            value = value.gather(1, index.expand(-1, -1, *inner))
        return value

    def mask(self, site: str, n_dims: int) -> torch.Tensor | None:
        """Return what is padding in a chosen value of a site, in a shape that broadcasts over its `n_dims`."""
        hidden = self.hidden
        along = _along(inner_dims(site))
        if hidden is None:
            return None
        if self.positions is not None and SITES[site].group == VECTOR:
            hidden = hidden.gather(1, self.positions)
        shape = [1] * n_dims
        shape[0] = hidden.shape[0]
        shape[along] = hidden.shape[1]
        return hidden.view(shape)


def _moved(value: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if value is None else value.to(device)


def _cut(value: torch.Tensor | None, first: int, last: int) -> torch.Tensor | None:
    return None if value is None else value[first:last]


def inner_dims(site: str) -> tuple[str, ...]:
    """Return the dimensions of a site behind the sequence."""
    dims = SITES[site].dims
    return dims[dims.index("sequence") + 1 :]


def _along(dims: tuple[str, ...]) -> int:
    """Return the dimension of a value [B, …] that goes over positions."""
    for i, dim in enumerate(dims):
        if dim in POSITION_DIMS:
            return i + 1
    raise AssertionError(dims)


def _chosen_positions(
    chosen: tuple[int, ...] | None, hidden_BT: torch.Tensor
) -> torch.Tensor | None:
    """Return the selected positions of each sequence, int64 [B, n]; −1 is the last real one."""
    if chosen is None:
        return None
    if chosen == (-1,):
        # The largest t + 1 of the real positions is one more than the last of them; a row of padding gives 0.
        real = (~hidden_BT).to(torch.int64) * torch.arange(1, hidden_BT.shape[1] + 1)
        return (real.amax(1, keepdim=True) - 1).clamp_(min=0)
    return torch.tensor(chosen).expand(hidden_BT.shape[0], -1)
