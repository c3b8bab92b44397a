"""Compare the heads of a layer row by row: the quantities that `heads` averages.

Shapes: R rows, N heads, K keys. Rows are attention probabilities in float64, 0 at keys that are not visible.
"""

from __future__ import annotations

import numpy as np

PAIR_QUANTITIES = ("cosine", "js", "same_argmax", "tau")
MIN_KEYS = 4


def entropies(p: np.ndarray) -> np.ndarray:
    """Return −Σ p ln p over the last dimension, in nats."""
    return np.asarray(-(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(-1))


def pair_figures(a_RNK: np.ndarray, b_RNK: np.ndarray, rest: list[np.ndarray]) -> np.ndarray:
    """Compare every head of a with every head of b, row by row: [4, R, N, N] in the order of PAIR_QUANTITIES.

    cosine of the rows; Jensen–Shannon divergence in nats; whether the largest entries are at one key; Kendall's τ_b
    over the keys `rest[r]`, NaN where these are fewer than MIN_KEYS or a head is constant on them.
    """
    n_row, n_head, _ = a_RNK.shape
    out = np.full((4, n_row, n_head, n_head), np.nan)
    norm_a, norm_b = (np.linalg.norm(p, axis=-1) for p in (a_RNK, b_RNK))
    out[0] = a_RNK @ b_RNK.transpose(0, 2, 1) / (norm_a[:, :, None] * norm_b[:, None])
    own_a = entropies(a_RNK)
    own_b = entropies(b_RNK)
    for i in range(n_head):
        middle = entropies((a_RNK[:, i, None] + b_RNK) / 2)
        out[1, :, i] = np.maximum(middle - (own_a[:, i, None] + own_b) / 2, 0)
    out[2] = a_RNK.argmax(-1)[:, :, None] == b_RNK.argmax(-1)[:, None]
    for r, keys in enumerate(rest):
        if len(keys) >= MIN_KEYS:
            out[3, r] = kendall(a_RNK[r][:, keys], b_RNK[r][:, keys])
    return out


def kendall(a_NK: np.ndarray, b_NK: np.ndarray) -> np.ndarray:
    """Return Kendall's τ_b between every row of a and every row of b: [N, N], NaN where one is constant.

    τ_b = Σ sign(a_i − a_j) sign(b_i − b_j) / √(pairs not tied in a × pairs not tied in b).
    """
    i, j = np.triu_indices(a_NK.shape[1], 1)
    signs = [np.sign(p[:, i] - p[:, j]).astype(np.float32) for p in (a_NK, b_NK)]
    untied = [np.abs(s).sum(1, dtype=np.float64) for s in signs]
    scale = np.sqrt(np.multiply.outer(*untied))
    agree = (signs[0] @ signs[1].T).astype(np.float64)
    return np.where(scale > 0, agree / np.where(scale > 0, scale, 1), np.nan)


def rest_keys(first: int, query: int, limit: int) -> np.ndarray:
    """Return the visible keys but the first and the query's own, at most `limit` evenly spaced ones."""
    n = query - first - 1
    if n <= limit:
        return np.arange(first + 1, query)
    return first + 1 + np.linspace(0, n - 1, limit).round().astype(np.int64)


def conditional_information(a_SQ: np.ndarray, b_SQ: np.ndarray) -> float:
    """Return the mutual information of two heads' argmax keys given the query position, in nats (Miller–Madow).

    Keys are integers ≥ 0, −1 where there is none. The mean over query positions, weighted by their sequences, of
    I + (m_a + m_b − m_ab − 1) / 2n with m the numbers of distinct values; positions with one sequence are left out. NaN
    where none remains.
    """
    total = n_total = 0.0
    for a, b in zip(a_SQ.T, b_SQ.T, strict=True):
        there = (a >= 0) & (b >= 0)
        n = int(there.sum())
        if n < 2:
            continue
        joint = a[there].astype(np.int64) * (int(b.max()) + 1) + b[there]
        (h_a, m_a), (h_b, m_b), (h_ab, m_ab) = (
            _plug_in(values) for values in (a[there], b[there], joint)
        )
        total += n * (h_a + h_b - h_ab) + (m_a + m_b - m_ab - 1) / 2
        n_total += n
    return total / n_total if n_total else np.nan


def _plug_in(values: np.ndarray) -> tuple[float, int]:
    """Return the entropy of the empirical distribution and its number of distinct values."""
    counts = np.unique(values, return_counts=True)[1]
    share = counts / len(values)
    return float(-(share * np.log(share)).sum()), len(counts)


def student_tail(t: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Return P(T ≤ t) of Student's distribution; NaN below one degree of freedom."""
    from scipy.special import stdtr

    return np.where(freedom >= 1, stdtr(np.maximum(freedom, 1), t), np.nan)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Return the adjusted p-values (q) of all entries that are not NaN (Benjamini & Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    q = np.full(p.shape, np.nan)
    there = ~np.isnan(p)
    if there.any():
        q[there] = false_discovery_control(p[there])
    return q
