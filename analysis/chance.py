"""What chance alone would give: intervals, permutations and bootstraps for figures by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def wilson(successes: np.ndarray, n: np.ndarray | float, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of a proportion (95 % by default), NaN where n is 0 (Wilson 1927)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = successes / np.asarray(n, np.float64)
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def step_difference(values: np.ndarray, at: int) -> np.ndarray:
    """Return the mean from index `at` on minus the mean before it, along the last dimension."""
    return np.asarray(values[..., at:].mean(-1) - values[..., :at].mean(-1))


def circular_shift_p(values: Sequence[float] | np.ndarray, at: int) -> float:
    """Return the share of circular shifts of a series whose |step at `at`| is no smaller than the series' own.

    The shift by 0 is one of them, so no p is below 1/n: neighbouring layers resemble each other, and shifts keep that.
    """
    series = np.asarray(values, np.float64)
    steps = np.array([step_difference(np.roll(series, shift), at) for shift in range(len(series))])
    return float((np.abs(steps) >= abs(steps[0]) * (1 - 1e-9)).mean())


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank along the last dimension from 1, equal values sharing their mean rank."""
    below = (values[..., None] > values[..., None, :]).sum(-1)
    equal = (values[..., None] == values[..., None, :]).sum(-1)
    return np.asarray(below + (equal + 1) / 2)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation along the last dimension; NaN where a side is constant."""
    x, y = (r - r.mean(-1, keepdims=True) for r in (ranks(a), ranks(b)))
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(scale > 0, (x * y).sum(-1) / np.where(scale > 0, scale, 1), np.nan)


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
    x, y = (r - r.mean(-1, keepdims=True) for r in (ranks(a_LN[there]), ranks(b_LN[there])))
    x, y = (r / np.sqrt((r**2).sum(-1, keepdims=True)) for r in (x, y))
    rng = np.random.default_rng(seed)
    null = (x * rng.permuted(np.broadcast_to(y, (n_permutations, *y.shape)), axis=-1)).sum(-1).mean(-1)
    return by_row, mean, float((1 + (np.abs(null) >= abs(mean) - 1e-12).sum()) / (1 + n_permutations))


def resampled_means(units_LU: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Return bootstrap means of each row, its units drawn with replacement: [n, L]."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, units_LU.shape[1], (n, *units_LU.shape))
    return np.asarray(np.take_along_axis(units_LU[None], drawn, 2).mean(-1))


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
