"""Massive activations: where they are, how large, and how they rise and fall over depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import (
    Analysis,
    Figures,
    Plot,
    as_function,
    rounded,
    rounded_one,
)
from headwater.analysis.engine.options import POSITIVE, SITE, setting
from headwater.analysis.engine.reducer import Chunk, Reducer, State, need_sites
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import Prepared, Steps
from headwater.analysis.measures.cosine_passes import LARGE, median
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

LEVELS = ("large", "strict")
PARTS = ("first", "rest")
STRICT = 1000.0
STRICT_SIZE = 100.0
CONVENTIONS = (
    "An activation x is massive at level strict (Sun et al. 2024) where |x| > 100 and |x| ≥ 1000 × the median |x| of "
    "its sequence and depth, at level large where |x| ≥ 100 × it; the median is over all real stored positions and all "
    "dimensions, and a sequence whose median is 0 has none. positions first: a row's first visible key; rest: all "
    "others. peak: the activation of the largest |x| of a dimension, with its sign, sequence, position and ratio to "
    "the median of its sequence; of equal ones the earliest. largest_ratio: over all activations. sequences: in how "
    "many sequences a dimension is massive. n_massive and n_by_position count activations. born, died: the first and "
    "last depth at which a dimension is massive anywhere, NaN for never."
)


class Massive(Reducer):
    """The largest activation of every dimension and depth, and counts of the massive ones.

    Shapes: 2 parts (first, rest), 2 levels, L depths, D dimensions, T positions. State: peak [2, L, D] (signed),
    sequence, position, peak_ratio and ratio of the same shape; sequences [2, L, D], n_by_position [2, L, T],
    n_massive [2, 2, L] (level, part); median [L], the sum over sequences, and n [L].
    """

    name = "massive"

    def __init__(self, run: Run, site: str, leads: Sequence[int], large: float = LARGE) -> None:
        self.large = large
        self.sites, self.leads = (site,), tuple(leads)
        self.width, self.n_positions = run[site].shape[-1], run[site].shape[2]
        self._row = run.manifest.n_positions * self.width * 4

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        n = len(self.leads)
        state: State = {
            name: np.zeros((2, n, self.width)) for name in ("peak", "peak_ratio", "ratio")
        }
        state |= {name: np.full((2, n, self.width), -1) for name in ("sequence", "position")}
        state |= {
            "sequences": np.zeros((2, n, self.width), np.int64),
            "n_massive": np.zeros((2, 2, n), np.int64),
        }
        state["n_by_position"] = np.zeros((2, n, self.n_positions), np.int64)
        return state | {"median": np.zeros(n), "n": np.zeros(n, np.int64)}

    @property
    def working_bytes(self) -> int:
        """Bytes of the absolute values of one sequence, of a copy to find the median, and of masks."""
        return 4 * self._row

    def update(self, state: State, chunk: Chunk) -> None:
        """Add one depth."""
        assert self.leads is not None
        at = self.leads.index(chunk.lead)
        site = self.sites[0]
        text = chunk.text(site)
        for s, values in enumerate(chunk[site]):
            if text.real[s].any():
                self._sequence(state, at, chunk.first + s, values, text.real[s], text.first[s])

    def _sequence(
        self,
        state: State,
        at: int,
        sequence: int,
        values_PD: np.ndarray,
        real: np.ndarray,
        first: np.ndarray,
    ) -> None:
        size = np.abs(values_PD, dtype=np.float32)
        size[~real] = 0
        middle = median(size[real])
        state["median"][at] += middle
        state["n"][at] += 1
        for part, rows in enumerate((np.flatnonzero(first), np.flatnonzero(real & ~first))):
            if len(rows):
                place = rows[size[rows].argmax(0)]
                peak = values_PD[place, np.arange(self.width)].astype(np.float64)
                ratio = np.abs(peak) / middle if middle > 0 else np.zeros(self.width)
                np.maximum(state["ratio"][part, at], ratio, out=state["ratio"][part, at])
                found = {
                    "peak": peak,
                    "peak_ratio": ratio,
                    "sequence": np.array(sequence),
                    "position": place,
                }
                _keep_larger(state, found, (part, at))
        lowest = min(self.large, STRICT)
        if middle > 0 and float(size.max()) >= lowest * middle:
            large = size >= self.large * middle
            strict = (size >= STRICT * middle) & (size > STRICT_SIZE)
            for level, massive in enumerate((large, strict)):
                state["sequences"][level, at] += massive.any(0)
                state["n_by_position"][level, at] += massive.sum(1)
                state["n_massive"][level, :, at] += massive[first].sum(), massive[~first].sum()

    def merge(self, a: State, b: State) -> State:
        """Join two states; of equal peaks the earlier one stays."""
        for name in ("sequences", "n_massive", "n_by_position", "median", "n"):
            a[name] += b[name]
        np.maximum(a["ratio"], b["ratio"], out=a["ratio"])
        _keep_larger(a, b, ())
        return a

    def finalise(self, state: State) -> State:
        """Return the state: `massive` reads it."""
        return state


def _keep_larger(state: State, found: State, at: tuple[int, ...]) -> None:
    """Take over the peaks that are larger than those of the state, or the first there are."""
    target = state["peak"][at]
    larger = (np.abs(found["peak"]) > np.abs(target)) | (
        (state["sequence"][at] < 0) & (found["sequence"] >= 0)
    )
    larger |= ~np.isfinite(found["peak"])
    for name in ("peak", "peak_ratio", "sequence", "position"):
        np.copyto(state[name][at], found[name], where=larger, casting="same_kind")
    infinite = ~np.isfinite(target)
    target[infinite] = np.abs(target[infinite])


@dataclass(frozen=True)
class MassiveAnalysis(Analysis):
    """Detect massive activations of a site in one pass over the run.

    Returns a dataset: peak, peak_sequence, peak_position, peak_ratio, largest_ratio [positions, depth, d_model],
    sequences [level, depth, d_model], n_massive [level, positions, depth], n_by_position [level, depth, position],
    median [depth], born and died [level, d_model], max_size [positions, depth] and its dimension. `massive_origin`
    of headwater.analysis.measures.origin says where they are made.
    """

    name = "massive"
    title = "massive activations: where, how large, when they rise and fall"
    needs = (("resid",),)
    section = "Massive activations"
    brings = ("massive_origin",)
    plots = (
        Plot(
            "massive_depth",
            "The largest activations over depth, and their ratio to the median.",
            "headwater.analysis.plots.massive:massive_depth",
        ),
    )

    site: str = setting("resid", SITE, "site", "SITE")
    large: float = setting(
        LARGE, POSITIVE, "an activation is large from this many times the median on", "RATIO"
    )

    def prepare(self, run: Run, state_bytes: int = 0) -> Prepared:
        """Make it ready for the engine; it takes one pass."""
        site = self.site
        need_sites(run, site)
        spec = run.spec(site)
        if spec.axis is None or spec.dims[3:] not in (("d_model",), ("d_mlp",)):
            raise RunError(
                f"massive takes a site of vectors by depth or layer, such as resid; {site} has {spec.dims}."
            )
        if not self.large > 0:
            raise ValueError(f"large is {self.large}; expected a number above 0.")

        def steps() -> Steps:
            (state,) = yield [Massive(run, site, range(len(run.leads(site))), self.large)]
            return _dataset(run, site, state, prepared)

        thresholds = {"large": self.large, "strict": STRICT, "strict_size": STRICT_SIZE}
        name = "massive" if site == "resid" else f"massive_{site}"
        prepared = Prepared(name, 1, steps, {"site": site} | thresholds)
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the massive dimensions, the largest activation, and the largest at every depth."""
        size = result.max_size.max("positions").values
        return {
            "strict": massive_dimensions(result, "strict"),
            "large": massive_dimensions(result, "large")[:8],
            "largest": rounded_one(size.max()),
            "largest_ratio": rounded_one(result.largest_ratio.max()),
            "max_by_depth": rounded(size),
        }


massive = as_function(MassiveAnalysis)


def massive_dimensions(result: Any, level: str = "large") -> list[int]:
    """List the dimensions that are massive at any depth, the one with the largest |x| first."""
    size = np.abs(result["peak"].values).max((0, 1))
    found = np.flatnonzero(result["sequences"].sel(level=level).values.any(0))
    return [int(i) for i in found[np.argsort(-size[found], kind="stable")]]


def _dataset(run: Run, site: str, state: State, prepared: Prepared) -> xarray.Dataset:
    import xarray

    spec = run.spec(site)
    lead = str(spec.axis)
    width = spec.dims[-1]
    numbers = np.array(run.leads(site))
    there = state["sequences"] > 0
    ever = there.any(1)
    size = np.abs(state["peak"])
    part = ("positions", lead, width)
    level = ("level", lead, width)
    variables = {
        "peak": (part, state["peak"]),
        "peak_sequence": (part, state["sequence"]),
        "peak_position": (part, state["position"]),
        "peak_ratio": (part, state["peak_ratio"]),
        "largest_ratio": (part, state["ratio"]),
        "max_size": (("positions", lead), size.max(-1)),
        "max_dimension": (("positions", lead), size.argmax(-1)),
        "median": (
            (lead,),
            state["median"] / np.maximum(state["n"], 1),
            {"note": "mean over sequences"},
        ),
        "sequences": (level, state["sequences"]),
        "n_massive": (("level", "positions", lead), state["n_massive"]),
        "n_by_position": (("level", lead, spec.dims[2]), state["n_by_position"]),
        "born": (("level", width), np.where(ever, numbers[there.argmax(1)], np.nan)),
        "died": (("level", width), np.where(ever, numbers[::-1][there[:, ::-1].argmax(1)], np.nan)),
    }
    coords = coordinates(run, site) | {"positions": list(PARTS), "level": list(LEVELS)}
    if spec.dims[2] == "selected_position":
        coords["selected_position"] = run.plain("selected_position")
    else:
        coords["position"] = np.arange(run.manifest.n_positions)
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes | {"site": site})
