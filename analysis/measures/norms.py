"""Norms and cosines of consecutive depths, at reading speed: the quick look that `cosine` takes apart.

One pass, raw vectors, dot products of each token in float32, means in float64. Shapes: L depths, n rows, D d_model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Analysis, Figures, Plot, as_function, rounded
from headwater.analysis.engine.reducer import Chunk, Reducer, State, need_sites
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import Prepared, Steps
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

SITE = "resid"
CACHE_BYTES = 3 << 20
CONVENTIONS = (
    "norm: mean Euclidean norm of the residual stream; consecutive: mean per-token cosine of a depth with the stored "
    "one before; norm_growth: geometric mean of the ratio of their norms. Raw; positions without_first leaves out each "
    "row's first visible key. Tokens whose vector is zero have no cosine and are left out. Dot products of a token in "
    "float32 (relative error about 1e-6), means in float64."
)


def widen(values: np.ndarray, out: np.ndarray) -> None:
    """Copy float16 or float32 values, which may be read-only, into a float32 array of the same size.

    torch converts float16 some ten times as fast as numpy does.
    """
    if values.dtype != np.float16 or not values.flags.c_contiguous:
        np.copyto(out, values.reshape(out.shape))
        return
    import torch

    raw = (ctypes.c_char * values.nbytes).from_address(values.ctypes.data)
    torch.from_numpy(out).copy_(torch.frombuffer(raw, dtype=torch.float16).view(out.shape))


class Norms(Reducer):
    """Sums over tokens, of first positions and of the rest.

    State: n, norm [2, L]; n_pair, cosine, log_growth [2, L − 1].
    """

    name = "norms"
    sites = (SITE,)
    joint = True
    tokens = 1024

    def __init__(self, leads: Sequence[int], width: int) -> None:
        self.leads = tuple(leads)
        self.width = width

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        n = len(self.leads)
        state = {name: np.zeros((2, n)) for name in ("n", "norm")}
        return state | {name: np.zeros((2, n - 1)) for name in ("n_pair", "cosine", "log_growth")}

    @property
    def working_bytes(self) -> int:
        """Bytes of the rows of two depths in float32, and of their norms."""
        return 2 * CACHE_BYTES + (1 << 18)

    def update(self, state: State, chunk: Chunk) -> None:
        """Add all depths, in tiles that fit a cache of several MB; two threads wait for each other at small ones."""
        assert self.leads is not None
        site = self.sites[0]
        text = chunk.text(site)
        rows = [chunk.rows(site, lead, text.real) for lead in self.leads]
        first = text.first[text.real]
        step = max(CACHE_BYTES // 2 // (4 * self.width), 16)
        buffers = np.empty((2, step, self.width), np.float32)
        for low in range(0, len(first), step):
            n = min(step, len(first) - low)
            square = np.empty((len(rows), n), np.float32)
            dot = np.empty((len(rows), n), np.float32)
            for at, values in enumerate(rows):
                now = buffers[at % 2, :n]
                before = buffers[1 - at % 2, :n]
                widen(values[low : low + n], now)
                np.vecdot(now, now, out=square[at])
                if at:
                    np.vecdot(now, before, out=dot[at])
            self._add(state, square.astype(np.float64), dot[1:], first[low : low + n])

    def _add(
        self, state: State, square_Ln: np.ndarray, dot_Ln: np.ndarray, first: np.ndarray
    ) -> None:
        norm = np.sqrt(square_Ln)
        there = norm > 0
        both = there[1:] & there[:-1]
        safe = np.where(there, norm, 1.0)
        cosine = np.where(both, dot_Ln / (safe[1:] * safe[:-1]), 0.0)
        growth = np.where(both, np.log(safe[1:] / safe[:-1]), 0.0)
        members = np.stack([first, ~first], 1).astype(np.float64)
        state["n"] += members.sum(0)[:, None]
        values = {"norm": norm, "n_pair": both, "cosine": cosine, "log_growth": growth}
        for name, value in values.items():
            state[name] += (value @ members).T

    def finalise(self, state: State) -> State:
        """Return the state: `norms` reads it."""
        return state


@dataclass(frozen=True)
class NormsAnalysis(Analysis):
    """Measure norms, their growth and the cosines of consecutive depths in one pass at about reading speed.

    Returns a dataset: norm and n_tokens [positions, depth], consecutive and norm_growth [positions, step].
    """

    name = "norms"
    title = "norms and cosines of consecutive depths, at reading speed"
    needs = (("resid",),)
    section = "The residual stream over depth"
    plots = (
        Plot(
            "norms",
            "The norm of the stream, and its cosine and growth from each depth to the next.",
            "headwater.analysis.plots.stream:norms",
        ),
    )

    def prepare(self, run: Run, state_bytes: int = 0) -> Prepared:
        """Make it ready for the engine; it takes one pass."""
        need_sites(run, SITE)
        leads = list(range(len(run.leads(SITE))))
        if len(leads) < 2:
            raise RunError(
                f"{run.path} holds one depth of {SITE}; cosines need several. Extract with more --depths."
            )

        def steps() -> Steps:
            (state,) = yield [Norms(leads, run[SITE].shape[-1])]
            return _dataset(run, state, prepared)

        prepared = Prepared("norms", 1, steps, {})
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return norms and consecutive cosines of all positions."""
        plain = result.sel(positions="all")
        return {"norm": rounded(plain.norm), "consecutive": rounded(plain.consecutive)}


norms = as_function(NormsAnalysis)


def _dataset(run: Run, state: State, prepared: Prepared) -> Any:
    import xarray

    total = {name: np.stack([value.sum(0), value[1]]) for name, value in state.items()}
    pairs = np.where(total["n_pair"] > 0, total["n_pair"], np.nan)
    variables: dict[str, Any] = {
        "norm": (
            ("positions", "depth"),
            total["norm"] / np.where(total["n"] > 0, total["n"], np.nan),
        ),
        "n_tokens": (("positions", "depth"), total["n"].astype(np.int64)),
        "consecutive": (("positions", "step"), total["cosine"] / pairs),
        "norm_growth": (("positions", "step"), np.exp(total["log_growth"] / pairs)),
    }
    coords = coordinates(run, SITE)
    coords |= {
        "positions": ["all", "without_first"],
        "step": coords["depth"][1:],
        "step_fraction": ("step", coords["depth_fraction"][1][1:]),
    }
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes)
