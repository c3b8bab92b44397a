"""What chance alone would give: intervals, permutations and bootstraps for figures by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

# Fewer layers leave too little freedom beside a line and a step for permutations to be calibrated.
MIN_LAYERS = 6

# A sum of squares below this is rounding: the line explains the series.
NOTHING = 1e-24


def wilson(
    successes: np.ndarray, n: np.ndarray | float, z: float = 1.959964
) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of a proportion (95 % by default), NaN where n is 0 (Wilson 1927)."""
    # The p̂ that lie within z standard errors of p, with the error at p itself and not at p̂:
    # centre = (p̂ + z²/2n) / (1 + z²/n),  half = z √(p̂(1 − p̂)/n + z²/4n²) / (1 + z²/n).
    with np.errstate(invalid="ignore", divide="ignore"):
        p = successes / np.asarray(n, np.float64)
        shrink = 1 + z**2 / n
        centre = (p + z**2 / (2 * n)) / shrink
        error = np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        half = z / shrink * error
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

    # M = I − X X⁺ takes the line X = [1, layer] out. Frisch & Waugh: regressing M y on M step gives the
    # coefficient that the step has beside the line.
    line_L2 = np.column_stack([np.ones(n), np.arange(n)])
    annihilate_LL = np.eye(n) - line_L2 @ np.linalg.pinv(line_L2)
    step_L = np.where(np.arange(n) < at, 0.0, 1.0)
    bare_L = annihilate_LL @ step_L
    rest_LC = annihilate_LL @ y_LC
    fitted_LC = y_LC - rest_LC
    coefficient_C = bare_L @ rest_LC / (bare_L @ bare_L)

    # A permuted residual is not free of the line any more, so the line is taken out again.
    orders_PL = _orders(n, n_permutations, seed)
    shuffled_PLC = rest_LC[orders_PL]
    hat_LL = np.eye(n) - annihilate_LL
    shuffled_PLC = shuffled_PLC - np.einsum("lk,pkc->plc", hat_LL, shuffled_PLC)

    # The share of the variance that the step explains, but for a factor that is the same for all orders.
    along_PC = np.einsum("l,plc->pc", bare_L, shuffled_PLC)
    along_P = (along_PC**2).sum(-1)
    whole_P = (shuffled_PLC**2).sum((1, 2))
    explained_P = along_P / np.where(whole_P > NOTHING, whole_P, 1.0)
    p = 1.0
    if whole_P[0] > NOTHING:
        # Orders that tie with the observed one but for rounding are as extreme as it is.
        p = float((explained_P >= explained_P[0] * (1 - 1e-9)).mean())

    def scalar(parts_C: np.ndarray) -> float:
        if y.ndim == 1:
            return float(parts_C[0])
        return float(np.abs(parts_C).sum() / 2)

    return StepBeyondLine(
        before=scalar(y_LC[:at].mean(0)),
        after=scalar(y_LC[at:].mean(0)),
        by_line=scalar(fitted_LC[at:].mean(0) - fitted_LC[:at].mean(0)),
        beyond_line=scalar(coefficient_C),
        p=p,
        least_p=1 / len(orders_PL),
    )


def _orders(n: int, n_permutations: int, seed: int) -> np.ndarray:
    """Return orders of n layers [P, n], the observed one first: all of them, or as many random ones."""
    if math.factorial(n) <= n_permutations:
        return np.array(list(permutations(range(n))))
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1)
    orders[0] = np.arange(n)
    return orders


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation along the last dimension; NaN where a side is constant."""
    # Pearson's r of the ranks: Σ xy / √(Σ x² Σ y²) with x and y centred.
    x = _centred_ranks(a)
    y = _centred_ranks(b)
    covariance = (x * y).sum(-1)
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    varies = scale > 0
    return np.where(varies, covariance / np.where(varies, scale, 1), np.nan)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=-1)
    return np.asarray(ranks - ranks.mean(-1, keepdims=True))


def _unit_ranks(values: np.ndarray) -> np.ndarray:
    """Return centred ranks of length 1, whose products are Spearman's correlations."""
    ranks = _centred_ranks(values)
    length = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.asarray(ranks / length)


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
    x_LN = _unit_ranks(a_LN[there])
    y_LN = _unit_ranks(b_LN[there])
    rng = np.random.default_rng(seed)
    copies_PLN = np.broadcast_to(y_LN, (n_permutations, *y_LN.shape))
    permuted_PLN = rng.permuted(copies_PLN, axis=-1)
    null_P = (x_LN * permuted_PLN).sum(-1).mean(-1)

    # The observed order counts as one of the null's, so that p is never 0 (Phipson & Smyth 2010).
    as_extreme = (np.abs(null_P) >= abs(mean) - 1e-12).sum()
    p = float((1 + as_extreme) / (1 + n_permutations))
    return by_row, mean, p


def resampled_means(units_LU: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Return bootstrap means of each row, its units drawn with replacement: [n, L]; units that are NaN are left out."""
    rng = np.random.default_rng(seed)
    n_units = units_LU.shape[1]
    drawn_nLU = rng.integers(0, n_units, (n, *units_LU.shape))
    values_nLU = np.take_along_axis(units_LU[None], drawn_nLU, 2)
    there_nL = np.isfinite(values_nLU).sum(-1)
    total_nL = np.nansum(values_nLU, -1)
    return np.where(there_nL > 0, total_nL / np.maximum(there_nL, 1), np.nan)


def thirds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rise and dip along the last dimension: mean of the middle third minus the first's, and minus the last's.

    Thirds of n values have round(n/3) values at both ends, one at least; NaN where that leaves no middle.
    """
    n = values.shape[-1]
    end = max(round(n / 3), 1)
    if n - 2 * end < 1:
        nothing = np.full(values.shape[:-1], np.nan)
        return nothing, nothing
    first = values[..., :end].mean(-1)
    middle = values[..., end : n - end].mean(-1)
    last = values[..., n - end :].mean(-1)
    return np.asarray(middle - first), np.asarray(middle - last)
