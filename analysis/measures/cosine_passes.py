"""The two passes behind `cosine`: means and outlier dimensions first, then every pair of depths.

Shapes: L depths, n positions, D d_model, C centrings (raw, centred), P positions (all, without_first), O outlier
dimensions (in, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater.analysis.engine.moments import merge_mean
from headwater.analysis.engine.reducer import TILE_BYTES, Chunk, Reducer, State, iter_tiles
from headwater.store.reader import Run

SITE = "resid"
LARGE = 100.0
ROUNDING = 1e-13


class Centres(Reducer):
    """Mean of every depth, first positions and the rest apart, and how often a dimension is large.

    A dimension is large in a sequence at a depth where some |x| is at least LARGE × the median |x| of that sequence
    and depth (the level `large` of massive activations). State: n [2, L], mean [2, L, D], large [L, D].
    """

    name = "cosine"
    sites = (SITE,)

    def __init__(self, run: Run, leads: Sequence[int], outliers: bool) -> None:
        self.leads = tuple(leads)
        self.outliers = outliers
        self.width = run[SITE].shape[-1]
        self._rows = run.manifest.n_positions * self.width * 8

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        shape = (2, len(self.leads))
        large = np.zeros((len(self.leads), self.width), np.int64)
        return {"n": np.zeros(shape), "mean": np.zeros((*shape, self.width)), "large": large}

    @property
    def working_bytes(self) -> int:
        """Bytes of one sequence in the stored type and in float64, and of comparisons."""
        return 3 * self._rows + (1 << 20)

    def update(self, state: State, chunk: Chunk) -> None:
        """Add one depth, sequence by sequence."""
        assert self.leads is not None
        at = self.leads.index(chunk.lead)
        text = chunk.text(self.sites[0])
        for values, real, first in zip(chunk[self.sites[0]], text.real, text.first, strict=True):
            if not real.any():
                continue
            x_TD = (values if real.all() else values[real]).astype(np.float64)
            members = np.stack([first[real], ~first[real]]).astype(np.float64)
            n = members.sum(1)
            merge_mean(
                state["n"][:, at],
                state["mean"][:, at],
                n,
                (members @ x_TD) / np.maximum(n, 1)[:, None],
            )
            if self.outliers:
                np.abs(x_TD, out=x_TD)
                state["large"][at, large_dimensions(x_TD)] += 1

    def merge(self, a: State, b: State) -> State:
        """Join two states."""
        merge_mean(a["n"], a["mean"], b["n"], b["mean"])
        a["large"] += b["large"]
        return a

    def finalise(self, state: State) -> State:
        """Return centre [P, L, D] of all positions and of all but the first, n [P, L] and large [L, D]."""
        n = state["n"][1].copy()
        mean = state["mean"][1].copy()
        merge_mean(n, mean, state["n"][0], state["mean"][0])
        return {
            "centre": np.stack([mean, state["mean"][1]]),
            "n": np.stack([n, state["n"][1]]),
            "large": state["large"],
        }


def large_dimensions(size_TD: np.ndarray, factor: float = LARGE) -> list[int]:
    """List the dimensions whose largest |x| is at least `factor` × the median of all |x| given."""
    largest = size_TD.max(0)
    n = size_TD.size
    found = []
    for dimension in np.argsort(-largest, kind="stable"):
        limit = largest[dimension] / factor
        below = int(np.count_nonzero(size_TD <= limit))
        if 2 * below < n or (2 * below == n and median(size_TD) > limit):
            break
        found.append(int(dimension))
        if limit == 0:
            return []
    return found


def median(values: np.ndarray) -> float:
    """Return the median of all values (the mean of the middle two where their number is even)."""
    flat = np.ravel(values)
    high = flat.size // 2
    part = np.partition(flat, high)
    return (
        float(part[high]) if flat.size % 2 else (float(part[:high].max()) + float(part[high])) / 2
    )


class Pairs(Reducer):
    """Cosines of all pairs of depths, sums of unit vectors and norms, for every variant.

    State: cosine and n_pair [C, P, O, L, L]; unit, unit_square [C, P, O, L, D]; norm, norm_square, n [P, L];
    log_growth, n_growth [P, L − 1].
    """

    name = "cosine"
    sites = (SITE,)
    joint = True
    tokens = 1024

    def __init__(self, leads: Sequence[int], centre_PLD: np.ndarray, outliers: np.ndarray) -> None:
        self.leads = tuple(leads)
        self.centre = centre_PLD
        self.outliers = outliers
        self.n_lead, self.width = centre_PLD.shape[1:]

    def zero(self) -> State:
        """Make an empty state."""
        n = self.n_lead
        shape = (2, 2, 2, self.n_lead)
        state = {name: np.zeros((*shape, n)) for name in ("cosine", "n_pair")}
        state |= {name: np.zeros((*shape, self.width)) for name in ("unit", "unit_square")}
        state |= {name: np.zeros((2, n)) for name in ("norm", "norm_square", "n")}
        return state | {name: np.zeros((2, n - 1)) for name in ("log_growth", "n_growth")}

    @property
    def working_bytes(self) -> int:
        """Bytes of a tile, its square, and its Gram matrices."""
        n = self.n_lead
        row = self.n_lead * self.width * 8
        n_rows = max(TILE_BYTES // row, 16)
        return int(n_rows * (4 * row + 8 * n * n * 24) + 8 * 8 * n * self.width)

    def update(self, state: State, chunk: Chunk) -> None:
        """Add all depths, tile by tile of positions."""
        assert self.leads is not None
        site = self.sites[0]
        text = chunk.text(site)
        rows = [chunk.rows(site, lead, text.real) for lead in self.leads]
        first = text.first[text.real]
        tiles = iter_tiles(len(first), self.n_lead * self.width * 8)
        buffer = np.empty(
            self.n_lead * max((tile.stop - tile.start for tile in tiles), default=0) * self.width
        )
        for tile in tiles:
            n = tile.stop - tile.start
            x_LnD = buffer[: self.n_lead * n * self.width].reshape(self.n_lead, n, self.width)
            for lead, values in enumerate(rows):
                x_LnD[lead] = values[tile]
            self._tile(state, x_LnD, np.stack([np.ones(n), ~first[tile]]))

    def _tile(self, state: State, x_LnD: np.ndarray, in_Pn: np.ndarray) -> None:
        n = x_LnD.shape[1]
        x_nLD = x_LnD.transpose(1, 0, 2)
        gram = x_nLD @ x_nLD.transpose(0, 2, 1)
        raw = np.einsum("nll->nl", gram).copy()
        self._norms(state, np.sqrt(raw), in_Pn)
        weights_Lvn = np.empty((self.n_lead, 8, n))
        for c, p in ((0, 0), (1, 0), (1, 1)):
            centred = gram
            if c:
                cross = (x_LnD @ self.centre[p].T).transpose(1, 0, 2)
                centred = (
                    gram - cross - cross.transpose(0, 2, 1) + self.centre[p] @ self.centre[p].T
                )
            for o in (0, 1):
                one = centred if not o else centred - self._outlying(x_LnD, c, p)
                inverse_nL = _inverse_norm(np.einsum("nll->nl", one), raw)
                cosine = one * inverse_nL[:, :, None] * inverse_nL[:, None]
                for q in (0, 1) if not c else (p,):
                    there = (inverse_nL > 0) * in_Pn[q][:, None]
                    state["cosine"][c, q, o] += (cosine * in_Pn[q][:, None, None]).sum(0)
                    state["n_pair"][c, q, o] += (there[:, :, None] * there[:, None]).sum(0)
                    weights_Lvn[:, 4 * c + 2 * q + o] = (inverse_nL * in_Pn[q][:, None]).T
        self._units(state, x_LnD, weights_Lvn)

    def _outlying(self, x_LnD: np.ndarray, c: int, p: int) -> Any:
        """Return the part of the Gram matrices that comes from the outlier dimensions: [n, L, L]."""
        if not len(self.outliers):
            return 0.0
        part = x_LnD[..., self.outliers] - c * self.centre[p][:, None, self.outliers]
        return np.einsum("ind,jnd->nij", part, part)

    def _norms(self, state: State, norm_nL: np.ndarray, in_Pn: np.ndarray) -> None:
        there = norm_nL > 0
        both = there[:, 1:] & there[:, :-1]
        safe = np.where(there, norm_nL, 1.0)
        growth = np.where(both, np.log(safe[:, 1:] / safe[:, :-1]), 0.0)
        for p, weight in enumerate(in_Pn):
            state["norm"][p] += (norm_nL * weight[:, None]).sum(0)
            state["norm_square"][p] += (norm_nL**2 * weight[:, None]).sum(0)
            state["n"][p] += weight.sum()
            state["log_growth"][p] += (growth * weight[:, None]).sum(0)
            state["n_growth"][p] += (both * weight[:, None]).sum(0)

    def _units(self, state: State, x_LnD: np.ndarray, weights_Lvn: np.ndarray) -> None:
        """Add the sums of unit vectors and of their squares, (x − centre) / ‖x − centre‖, for all variants."""
        shape = (self.n_lead, 2, 2, 2)
        both = np.concatenate([weights_Lvn, weights_Lvn**2], 1)
        total, total_square = (w.reshape(shape) for w in np.split(both.sum(-1), 2, 1))
        sums = [w.reshape(*shape, -1) for w in np.split(both @ x_LnD, 2, 1)]
        np.square(x_LnD, out=x_LnD)
        squares = (both[:, 8:] @ x_LnD).reshape(*shape, -1)
        for c, p, o in np.ndindex(2, 2, 2):
            centre = self.centre[p] * c
            unit = sums[0][:, c, p, o] - centre * total[:, c, p, o, None]
            square = (
                squares[:, c, p, o]
                - 2 * centre * sums[1][:, c, p, o]
                + centre**2 * total_square[:, c, p, o, None]
            )
            if o:
                unit[:, self.outliers] = square[:, self.outliers] = 0
            state["unit"][c, p, o] += unit
            state["unit_square"][c, p, o] += square

    def finalise(self, state: State) -> State:
        """Return the state: `cosine` reads it."""
        return state


def _inverse_norm(square: np.ndarray, raw_square: np.ndarray) -> np.ndarray:
    """Return 1/√square, 0 where it is zero or lost in the rounding of the raw square."""
    there = square > ROUNDING * raw_square
    return np.where(there, 1 / np.sqrt(np.where(there, square, 1.0)), 0.0)
