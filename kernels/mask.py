"""One mask for causal, packed, padded and windowed attention: row t sees the keys [row_start[t], t]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

KEY_STEP = 16


@dataclass(frozen=True)
class RowBlock:
    """Queries [first, last) of one sequence against keys [key, last).

    `hidden` is added to the scores: −inf where a key is not visible, float32 [last − first, last − key]. None stands
    for the plain causal triangle over the last columns. `empty` lists the rows (from `first`) that see nothing, whose
    scores are all −inf.
    """

    first: int
    last: int
    key: int
    hidden: torch.Tensor | None
    empty: torch.Tensor | None

    def seen(self) -> torch.Tensor:
        """Return bool [last − first, last − key]: which keys each query sees."""
        if self.hidden is not None:
            return self.hidden == 0
        n_rows = self.last - self.first
        return torch.ones(n_rows, self.last, dtype=torch.bool).tril_(self.first)


def causal_rows(n_positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the row_start of plain causal attention: int32 zeros [n_positions]."""
    return torch.zeros(n_positions, dtype=torch.int32, device=device)


def visible(row_start: torch.Tensor) -> torch.Tensor:
    """Return bool [..., T, T]: whether query t (next to last) sees key j (last)."""
    n = row_start.shape[-1]
    key = torch.arange(n, device=row_start.device)
    return (key >= row_start[..., None]) & (key <= key[:, None])


def weigh_values(p_NQK: torch.Tensor, v_NKH: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return p v, NaN where a row sees a value that is not finite, and only there, though 0 · NaN is NaN.

    `seen` is bool [..., Q, K]; the leading dimensions of all three are alike, or broadcast.
    """
    finite = v_NKH.isfinite()
    z = p_NQK @ v_NKH.masked_fill(~finite, 0)
    reached = seen.to(z.dtype) @ (~finite).to(z.dtype)
    return z.masked_fill(reached > 0, torch.nan)


def split_rows(row_start: torch.Tensor, n_rows: int) -> list[RowBlock]:
    """Cut the queries of one sequence (row_start int32 [T]) into blocks of `n_rows` and skip keys that none sees."""
    return list(_iter_blocks(row_start, n_rows))


def _iter_blocks(row_start: torch.Tensor, n_rows: int) -> Iterator[RowBlock]:
    n = row_start.shape[0]
    for first in range(0, n, n_rows):
        last = min(first + n_rows, n)
        starts = row_start[first:last]
        # Rows that all start at 0 are plainly causal: a shared triangle serves, and no mask is built.
        if not bool(starts.any()):
            yield RowBlock(first, last, 0, None, None)
            continue
        queries = torch.arange(first, last)
        empty = (starts > queries).nonzero()[:, 0]
        # An empty row starts behind its query; its block's keys must still include the query itself.
        lowest = int(torch.minimum(starts, queries.int()).min())
        # Keys begin at a multiple of 16, so that the rows of a product stay aligned.
        key = lowest // KEY_STEP * KEY_STEP
        keys = torch.arange(key, last)
        seen = (keys >= starts[:, None]) & (keys <= queries[:, None])
        hidden = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        yield RowBlock(first, last, key, hidden, empty if len(empty) else None)
