"""How many phases a model has over depth: levels of its step sizes, against fewer levels and a straight line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

MOST_PHASES = 3
MIN_STEPS = 6
LEVEL = 0.05
N_NOISE = 2000
NAMES = ("one phase", "two phases", "three phases")
CONVENTIONS = (
    "Step size: 1 − cosine of consecutive depths, states centred, first positions left out. One, two and three levels "
    "over depth are fitted by least squares. Another level is reported where p ≤ .05: the share of series drawn from "
    "the fit with one level less, its residuals as normal noise, in which it takes away as much of the error "
    "(parametric bootstrap). ramp: a straight line has a smaller BIC than the levels so found. Fewer than 6 steps "
    "cannot tell."
)


@dataclass(frozen=True)
class Phases:
    """What step sizes do over depth.

    `kind` is "one phase", "two phases", "three phases", "ramp" or "too few layers"; `changes` are the first steps of
    the later phases, `levels` the mean step of each, `p` that of each further level,
    a refused one included.
    """

    kind: str
    changes: tuple[int, ...] = ()
    levels: tuple[float, ...] = ()
    p: tuple[float, ...] = ()


def find_phases(steps: Sequence[float] | np.ndarray) -> Phases:
    """Compare one, two and three levels and a line on step sizes over depth; raise ValueError for gaps."""
    f = np.asarray(steps, np.float64)
    n = len(f)
    if n < MIN_STEPS:
        return Phases("too few layers")
    if not np.isfinite(f).all():
        raise ValueError(f"the step sizes are {f.tolist()}; expected a number for every layer.")
    # Below this an error is rounding, and nothing is left to be explained.
    nothing = 1e-12 * float((f**2).sum())
    n_levels = 1
    error, places = _fit_levels(f[None], 1)
    p: list[float] = []
    while n_levels < MOST_PHASES and error[0] > nothing:
        more, more_places = _fit_levels(f[None], n_levels + 1)
        fitted = _means(f, places[0])
        p.append(_level_p(fitted, float(error[0]), float(more[0]), n_levels))
        if p[-1] > LEVEL:
            break
        n_levels += 1
        error, places = more, more_places
    slope, base = np.polyfit(np.arange(n), f, 1)
    line = float(((f - base - slope * np.arange(n)) ** 2).sum())
    # k levels have k − 1 places of change
    if _bic(line, n, 2) < _bic(float(error[0]), n, 2 * n_levels - 1) and error[0] > nothing:
        return Phases("ramp", p=tuple(p))
    levels = tuple(float(part.mean()) for part in np.split(f, places[0]))
    return Phases(NAMES[n_levels - 1], tuple(int(c) for c in places[0]), levels, tuple(p))


def _bic(error: float, n: int, n_parameters: int) -> float:
    return float(n * np.log(max(error, 1e-300) / n) + n_parameters * np.log(n))


def _means(f: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the fit: every value replaced by the mean of its level."""
    return np.concatenate([np.full(len(part), part.mean()) for part in np.split(f, places)])


def _level_p(fitted: np.ndarray, error: float, more: float, n_levels: int) -> float:
    """Return how often one level more explains as much in series drawn from a fit."""
    n = len(fitted)
    noise = np.random.default_rng(n).standard_normal((N_NOISE, n))
    # The fit has spent a degree of freedom on each level and on each place of change.
    spread = np.sqrt(error / max(n - 2 * n_levels + 1, 1))
    drawn = fitted + spread * noise
    left = _fit_levels(drawn, n_levels + 1)[0] / _fit_levels(drawn, n_levels)[0]
    return (1 + int((left <= more / error).sum())) / (1 + N_NOISE)


def _fit_levels(f_SL: np.ndarray, n_levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit levels to series [S, L]; return the least squared errors [S] and the places of change [S, n_levels − 1]."""
    n_series, n = f_SL.shape
    zero = np.zeros((n_series, 1))
    # Sums over any stretch are differences of running sums, so a fit costs no pass over the series.
    sums = np.concatenate([zero, f_SL.cumsum(1)], 1)
    squares = np.concatenate([zero, (f_SL**2).cumsum(1)], 1)
    best = np.full(n_series, np.inf)
    places = np.zeros((n_series, n_levels - 1), int)
    for changes in combinations(range(1, n), n_levels - 1):
        edges = (0, *changes, n)
        error = np.zeros(n_series)
        for first, last in pairwise(edges):
            part = sums[:, last] - sums[:, first]
            error += squares[:, last] - squares[:, first] - part**2 / (last - first)
        error = np.maximum(error, 0.0)  # differences of sums may end just below 0
        better = error < best
        best[better] = error[better]
        places[better] = changes
    return best, places
