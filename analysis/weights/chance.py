"""What chance alone would give: intervals, permutations and bootstraps for figures by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

MIN_LAYERS = (
    6  # fewer leave too little freedom beside a line and a step for permutations to be calibrated
)


def wilson(
    successes: np.ndarray, n: np.ndarray | float, z: float = 1.959964
) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of a proportion (95 % by default), NaN where n is 0 (Wilson 1927)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = successes / np.asarray(n, np.float64)
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


@dataclass(frozen=True)
class StepBeyondLine:
    """A step at a layer beside what a straight line over depth explains (see `step_beyond_line`)."""

    before: float
    after: float
    by_line: float
    beyond_line: float
    p: float
    least_p: float


def step_beyond_line(
    values: Sequence[float] | np.ndarray, at: int, n_permutations: int = 5000, seed: int = 0
) -> StepBeyondLine:
    """Test whether a series over layers steps at index `at` by more than a straight line over depth explains.

    `values` is [layer], or [layer, part] for a mix of parts, of which the summed square of the steps is tested.
    by_line: the difference of the means after and before that the fitted line gives; beyond_line: the step's
    coefficient where line and step are fitted together. p: two-sided, from permuting the residuals of the line and
    comparing the share of their variance that the step explains (Freedman & Lane 1983), all permutations where they
    are at most `n_permutations`. No p is below `least_p`. NaN where a side is empty, or with fewer than 6 layers.
    """
    y = np.asarray(values, np.float64)
    n = len(y)
    if not 0 < at < n or n < MIN_LAYERS or not np.isfinite(y).all():
        return StepBeyondLine(*[math.nan] * 6)
    y_LC = y.reshape(n, -1)
    step = np.where(np.arange(n) < at, 0.0, 1.0)
    line = np.column_stack([np.ones(n), np.arange(n)])
    project = np.eye(n) - line @ np.linalg.pinv(line)
    bare = project @ step
    rest_LC = project @ y_LC
    fitted = y_LC - rest_LC
    if math.factorial(n) <= n_permutations:
        orders = np.array(list(permutations(range(n))))
    else:
        rng = np.random.default_rng(seed)
        orders = rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1)
        orders[0] = np.arange(n)  # the order that was observed is one of them
    shuffled_PLC = rest_LC[orders]
    shuffled_PLC = shuffled_PLC - np.einsum("lk,pkc->plc", np.eye(n) - project, shuffled_PLC)
    along_P = (np.einsum("l,plc->pc", bare, shuffled_PLC) ** 2).sum(-1)
    whole_P = (shuffled_PLC**2).sum((1, 2))
    explained = along_P / np.where(whole_P > 1e-24, whole_P, 1.0)
    p = float((explained >= explained[0] * (1 - 1e-9)).mean())

    def scalar(parts_C: np.ndarray) -> float:
        return float(parts_C[0]) if y.ndim == 1 else float(np.abs(parts_C).sum() / 2)

    return StepBeyondLine(
        before=scalar(y_LC[:at].mean(0)),
        after=scalar(y_LC[at:].mean(0)),
        by_line=scalar(fitted[at:].mean(0) - fitted[:at].mean(0)),
        beyond_line=scalar(bare @ rest_LC / (bare @ bare)),
        p=p if whole_P[0] > 1e-24 else 1.0,
        least_p=1 / len(orders),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation along the last dimension; NaN where a side is constant."""
    x, y = (_centred_ranks(values) for values in (a, b))
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(scale > 0, (x * y).sum(-1) / np.where(scale > 0, scale, 1), np.nan)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=-1)
    return np.asarray(ranks - ranks.mean(-1, keepdims=True))


def spearman_within(
    a_LN: np.ndarray, b_LN: np.ndarray, n_permutations: int = 2000, seed: int = 0
) -> tuple[np.ndarray, float, float]:
    """Return Spearman's correlation within each row [L], its mean over rows, and the mean's two-sided p.

    The null permutes the members of each row. Rows on which a side is constant are left out; p is NaN without any.
    """
    by_row = spearman(a_LN, b_LN)
    there = ~np.isnan(by_row)
    if not there.any():
        return by_row, np.nan, np.nan
    mean = float(by_row[there].mean())
    x, y = (_centred_ranks(values[there]) for values in (a_LN, b_LN))
    x, y = (r / np.sqrt((r**2).sum(-1, keepdims=True)) for r in (x, y))
    rng = np.random.default_rng(seed)
    null = (
        (x * rng.permuted(np.broadcast_to(y, (n_permutations, *y.shape)), axis=-1)).sum(-1).mean(-1)
    )
    return (
        by_row,
        mean,
        float((1 + (np.abs(null) >= abs(mean) - 1e-12).sum()) / (1 + n_permutations)),
    )


def resampled_means(units_LU: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Return bootstrap means of each row, its units drawn with replacement: [n, L]; units that are NaN are left out."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, units_LU.shape[1], (n, *units_LU.shape))
    values = np.take_along_axis(units_LU[None], drawn, 2)
    there = np.isfinite(values).sum(-1)
    return np.where(there > 0, np.nansum(values, -1) / np.maximum(there, 1), np.nan)


def thirds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rise and dip along the last dimension: mean of the middle third minus the first's, and minus the last's.

    Thirds of n values have round(n/3) values at both ends, one at least; NaN where that leaves no middle.
    """
    n = values.shape[-1]
    end = max(round(n / 3), 1)
    if n - 2 * end < 1:
        nothing = np.full(values.shape[:-1], np.nan)
        return nothing, nothing
    first, middle, last = (part.mean(-1) for part in np.split(values, [end, n - end], -1))
    return np.asarray(middle - first), np.asarray(middle - last)
