"""The units that `top` ranks: dimensions, neurons, directions, heads.

Shapes: L leads, U units, D width, N heads, Q queries, K keys, P stored positions, T positions of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headwater.store.reader import Run


class Units:
    """What a unit's value is at every position of a sequence; travels to other processes."""

    def __init__(
        self, run: Run, site: str, units: np.ndarray, basis_LUD: np.ndarray | None, mean_LD: Any
    ) -> None:
        self.dims = run[site].dims
        self.units = units
        self.basis = basis_LUD
        self.mean = mean_LD

    def values(self, at: int, values: np.ndarray, row_start_T: np.ndarray) -> np.ndarray:
        """Return the units' values of one sequence at one lead (the at-th one): float64 [P, U]."""
        if self.dims[-2:] == ("query", "key"):
            return np.asarray(other_keys(values[self.units], row_start_T).max(-1).T)
        if self.dims[-2] == "head":
            return np.asarray(np.linalg.norm(values[:, self.units].astype(np.float64), axis=-1))
        if self.basis is None:
            return np.asarray(values[:, self.units], dtype=np.float64)
        x = values.astype(np.float64) - self.mean[at]
        return np.asarray(x @ self.basis[at].T)


def other_keys(pattern_NQK: np.ndarray, row_start_T: np.ndarray) -> np.ndarray:
    """Return a pattern in float64 with 0 at the first visible key, at the query's own, and at hidden keys."""
    t = np.arange(len(row_start_T))
    kept = (t > row_start_T[:, None]) & (t < t[:, None])
    return np.where(kept, pattern_NQK, 0.0)


def basis_of(
    run: Run, site: str, wanted: list[int], directions: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the directions [L, U, D] and means [L, D] of an svd result at the wanted leads."""
    if (
        directions.attrs.get("site") != site
        or directions.attrs["model_digest"] != run.manifest.model["digest"]
    ):
        raise ValueError(
            f"the directions are those of {directions.attrs.get('site')} of {directions.attrs['model']}; expected "
            f"an svd of {site} of the model of {run.path}, {run.manifest.model['name']}."
        )
    axis = str(run.spec(site).axis)
    if "head" in directions["direction"].dims or set(wanted) - set(
        directions[axis].values.tolist()
    ):
        raise ValueError(
            f"the directions lie at {axis} {directions[axis].values.tolist()}; {wanted} was asked for."
        )
    one = directions.sel({axis: wanted}).sel(centring="centred", positions="without_first")
    return one["direction"].transpose(axis, "rank", ...).values, one["mean"].values


def keys_of(
    run: Run,
    leads: list[int],
    heads: np.ndarray,
    sequence: np.ndarray,
    position: np.ndarray,
    row_start: np.ndarray,
) -> np.ndarray:
    """Return the keys that hold the largest weights found: [lead, unit, rank], −1 where there is none."""
    stored = run.plain("head").tolist()
    key = np.full(sequence.shape, -1)
    for lead, unit, rank in np.argwhere(sequence >= 0):
        s = int(sequence[lead, unit, rank])
        q = int(position[lead, unit, rank])
        start = int(row_start[s, q])
        if q - start > 1:
            row = run["pattern"][leads[lead], s, stored.index(heads[unit]), q]
            key[lead, unit, rank] = start + 1 + int(row[start + 1 : q].argmax())
    return key
