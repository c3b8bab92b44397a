"""Counts, means and scatter matrices in float64, merged without cancellation (Chan, Golub & LeVeque 1983).

Scatter is Σ (x − mean)(y − mean)ᵀ. Shapes: n rows, D width, leading dimensions are separate groups.
"""

from __future__ import annotations

import numpy as np


def merge_mean(n_a: np.ndarray, mean_a: np.ndarray, n_b: np.ndarray, mean_b: np.ndarray) -> None:
    """Merge counts [...] and means [..., D] of b into those of a, in place."""
    n = n_a + n_b
    mean_a += (mean_b - mean_a) * (n_b / np.maximum(n, 1))[..., None]
    n_a += n_b


def merge_scatter(
    scatter_a: np.ndarray,
    scatter_b: np.ndarray,
    n_a: float,
    n_b: float,
    step_x: np.ndarray,
    step_y: np.ndarray,
) -> None:
    """Merge one scatter matrix [D, D'] of b into that of a, in place.

    `step_x`, `step_y` are mean_b − mean_a of the two sides, before those are merged.
    """
    if n_b == 0:
        return
    scatter_a += scatter_b
    if n_a:
        scatter_a += np.multiply.outer(step_x * (n_a * n_b / (n_a + n_b)), step_y)


def add_rows(
    n: np.ndarray, mean: np.ndarray, scatter: np.ndarray | None, rows_nD: np.ndarray
) -> None:
    """Add rows to one group's count [], mean [D] and, unless None, scatter [D, D], in place.

    `rows_nD` is float64 and has one row more than counts, the last: room for the step between the means, so that one
    product gives the scatter and its correction. It is used up.
    """
    count = np.array(len(rows_nD) - 1, np.float64)
    if count == 0:
        return
    rows = rows_nD[:-1]
    last = rows_nD[-1]
    centre = rows.sum(0) / count
    if scatter is not None:
        rows -= centre
        np.multiply(centre - mean, np.sqrt(n * count / (n + count)), out=last)
        scatter += rows_nD.T @ rows_nD
    merge_mean(n, mean, count, centre)


def with_room(rows_nD: np.ndarray) -> np.ndarray:
    """Copy rows into float64 with one row more, as `add_rows` wants them."""
    out = np.empty((len(rows_nD) + 1, *rows_nD.shape[1:]))
    out[:-1] = rows_nD
    return out
