"""Where early distributed attention ends: low, then high, then low again over layers, against a line and a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

MIN_JUMP = 0.1
MIN_LAYERS = 4
RISE_LEVEL = 0.04
FALL_LEVEL = 0.01
RAMP_LEVEL = 0.05  # steps are wrong in at most 5 % of noise
ACCURACY = 0.01  # shares are not told apart below this; it keeps a perfect fit's BIC finite
N_NOISE = 4000
RISES = ("up", "up and down")
KINDS = (*RISES, "down")
CHANGES = {"up": 1, "up and down": 2, "down": 1}
CONVENTIONS = (
    "Steps over layers: low – high – low with both changes fitted together, either of which may be absent, beside a "
    "constant and a straight line; BIC counts levels, slope and changes as parameters. A change is reported where "
    "steps have the least BIC, every change is at least .1, and p ≤ .04 (a fall alone, which is not what is looked "
    "for: .01): p is the share of white-noise series of as many layers that such steps fit as unusually well. ramp: "
    "the line has the least BIC and rises or falls by at least .1, its slope's p ≤ .05. none: neither. Fewer than 4 "
    "layers cannot tell."
)


@dataclass(frozen=True)
class Transition:
    """What a series over layers does.

    `kind` is "steps", "ramp", "none" or "too few layers". `into` and `out` are the indices of the first value after the
    rise and after the fall, None where there is none; `jump` is the smaller of the changes. R² and BIC are those of the
    best steps and of the line; `p` is that of the steps (see CONVENTIONS).
    """

    kind: str
    into: int | None = None
    out: int | None = None
    jump: float = np.nan
    r2_steps: float = np.nan
    r2_line: float = np.nan
    bic_steps: float = np.nan
    bic_line: float = np.nan
    bic_constant: float = np.nan
    p: float = np.nan


@dataclass(frozen=True)
class _Steps:
    """The best fit of one of KINDS to many series [S]: squared error, indices of both changes, the smaller change."""

    error: np.ndarray
    into: np.ndarray
    out: np.ndarray
    jump: np.ndarray


def find_transition(values: Sequence[float] | np.ndarray) -> Transition:
    """Compare steps, a line and a constant on a series over layers; raise ValueError for one with gaps."""
    f = np.asarray(values, np.float64)
    n = len(f)
    if n < MIN_LAYERS:
        return Transition("too few layers")
    if not np.isfinite(f).all():
        raise ValueError(f"the series is {f.tolist()}; expected a number for every layer.")
    total = float(((f - f.mean()) ** 2).sum())
    line, slope_p = _line(f)
    fits = {kind: _fit(f[None], kind) for kind in KINDS}
    bics = {kind: _bic(float(fits[kind].error[0]), n, 1 + 2 * CHANGES[kind]) for kind in KINDS}
    bic_line = _bic(line, n, 2)
    bic_constant = _bic(total, n, 1)
    best = min(KINDS, key=lambda kind: bics[kind])
    scale = total if total > 0 else 1.0
    measured: dict[str, Any] = {
        "r2_steps": 1 - float(fits[best].error[0]) / scale if total > 0 else 0.0,
        "r2_line": 1 - line / scale if total > 0 else 0.0,
        "bic_steps": bics[best],
        "bic_line": bic_line,
        "bic_constant": bic_constant,
        "p": _noise_p(n, best, float(fits[best].error[0]) / scale),
    }
    for kind in sorted(KINDS, key=lambda kind: bics[kind]):
        fit = fits[kind]
        p = _noise_p(n, kind, float(fit.error[0]) / scale)
        wins = bics[kind] < min(bic_line, bic_constant)
        level = RISE_LEVEL if kind in RISES else FALL_LEVEL
        if wins and p <= level and float(fit.jump[0]) >= MIN_JUMP:
            measured |= {
                "p": p,
                "bic_steps": bics[kind],
                "r2_steps": 1 - float(fit.error[0]) / scale,
            }
            into = int(fit.into[0]) if kind != "down" else None
            out = int(fit.out[0]) if kind != "up" else None
            return Transition("steps", into, out, float(fit.jump[0]), **measured)
    rises = abs(np.polyfit(np.arange(n), f, 1)[0]) * (n - 1) >= MIN_JUMP
    is_ramp = bic_line < min(bic_constant, bics[best]) and rises and slope_p <= RAMP_LEVEL
    return Transition("ramp" if is_ramp else "none", **measured)


def _bic(error: float, n: int, n_parameters: int) -> float:
    return float(n * np.log(error / n + ACCURACY**2) + n_parameters * np.log(n))


def _line(f: np.ndarray) -> tuple[float, float]:
    """Return the squared error of the straight line, and the two-sided p of its slope."""
    from scipy.stats import linregress

    if not np.ptp(f):
        return 0.0, 1.0
    fit = linregress(np.arange(len(f)), f)
    error = f - fit.intercept - fit.slope * np.arange(len(f))
    return float((error**2).sum()), float(fit.pvalue)


def _fit(f_SL: np.ndarray, kind: str) -> _Steps:
    """Fit one kind of steps to every series by least squares; the error is infinite where the signs do not fit."""
    n_series, n = f_SL.shape
    zero = np.zeros((n_series, 1))
    sums = np.concatenate([zero, f_SL.cumsum(1)], 1)
    squares = np.concatenate([zero, (f_SL**2).cumsum(1)], 1)

    def level(first: int, last: int) -> np.ndarray:
        return np.asarray((sums[:, last] - sums[:, first]) / (last - first))

    def error(first: int, last: int) -> np.ndarray:
        mean = level(first, last)
        return np.asarray(squares[:, last] - squares[:, first] - (last - first) * mean**2)

    best = _Steps(
        np.full(n_series, np.inf),
        np.zeros(n_series, int),
        np.zeros(n_series, int),
        np.zeros(n_series),
    )

    def keep(found: np.ndarray, jump: np.ndarray, into: int, out: int) -> None:
        found = np.maximum(found, 0)  # differences of sums may end just below 0
        better = (jump > 0) & (found < best.error)
        best.error[better], best.jump[better] = found[better], jump[better]
        best.into[better] = into
        best.out[better] = out

    for i in range(1, n):
        if kind != "up and down":
            rise = level(i, n) - level(0, i)
            keep(error(0, i) + error(i, n), rise if kind == "up" else -rise, i, i)
            continue
        for j in range(i + 1, n):
            jump = level(i, j) - np.maximum(level(0, i), level(j, n))
            keep(error(0, i) + error(i, j) + error(j, n), jump, i, j)
    return best


@lru_cache
def _noise(n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return, of white noise over n layers, the sorted unexplained shares by kind, and the sorted least ranks of rises.

    Noise is fitted by one of two kinds unusually well more often than by a given one, so ranks are compared with the
    least rank of each series (Westfall & Young's min-p). Scale and mean of the noise do not matter.
    """
    f_SL = np.random.default_rng(n).standard_normal((N_NOISE, n))
    total = ((f_SL - f_SL.mean(1, keepdims=True)) ** 2).sum(1)
    shares = {kind: _fit(f_SL, kind).error / total for kind in KINDS}
    ordered = {kind: np.sort(values) for kind, values in shares.items()}
    ranks = [np.searchsorted(ordered[kind], shares[kind], side="right") for kind in RISES]
    return ordered, np.sort(np.minimum.reduce(ranks))


def _noise_p(n: int, kind: str, unexplained: float) -> float:
    ordered, least = _noise(n)
    rank = int(np.searchsorted(ordered[kind], unexplained, side="right"))
    as_unusual = int(np.searchsorted(least, rank, side="right")) if kind in RISES else rank
    return (1 + as_unusual) / (1 + N_NOISE)
