"""Coherence by layer: fractions with their intervals, the transition, heads' shares, the mix of token classes.

Shapes: K kinds of directions, L layers, C token classes; scores and flags of one kind are [L(, N), rank].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headwater.analysis.weights.chance import (
    resampled_means,
    spearman_within,
    step_beyond_line,
    thirds,
    wilson,
)
from headwater.analysis.weights.token_classes import class_shares, classify

KINDS = ("ov_read", "ov_write", "w_in_raw", "w_in_folded", "w_out", "qk_query", "qk_key")
HEAD_KINDS = ("ov_read", "ov_write", "qk_query", "qk_key")
Values = dict[str, np.ndarray]


def _units(values: np.ndarray) -> np.ndarray:
    """Return what is resampled, by layer: the means of heads, or the directions of the MLP, [L, U]."""
    return _mean(values, -1) if values.ndim == 3 else values.astype(np.float64)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return means of what is not NaN, NaN of nothing."""
    n = np.isfinite(values).sum(axis)
    return np.where(n > 0, np.nansum(values, axis) / np.maximum(n, 1), np.nan)


def fractions(
    coherent: Values, z: Values, log_count: Values, n_bootstrap: int, seed: int
) -> dict[str, Any]:
    """Return coherent_fraction by kind and layer with Wilson's interval and bootstrap bands, and its rise and dip."""
    n_layer = len(coherent["w_out"])

    def flat(values: Values) -> np.ndarray:
        return np.stack([_mean(values[kind].reshape(n_layer, -1), 1) for kind in KINDS])

    n = np.stack([np.isfinite(coherent[kind]).reshape(n_layer, -1).sum(1) for kind in KINDS])
    count = np.stack([(coherent[kind] == 1).reshape(n_layer, -1).sum(1) for kind in KINDS])
    size = np.stack([np.full(n_layer, coherent[kind][0].size) for kind in KINDS])
    drawn = np.stack([resampled_means(_units(coherent[kind]), n_bootstrap, seed) for kind in KINDS])
    band = np.quantile(drawn, [0.025, 0.975], 1)
    fraction = flat(coherent)
    low, high = wilson(count, n)
    rise, dip = thirds(fraction)
    kl = ("kind", "layer")
    data: dict[str, Any] = {
        "coherent_fraction": (kl, fraction),
        "coherent_low": (kl, low),
        "coherent_high": (kl, high),
        "band_low": (kl, band[0]),
        "band_high": (kl, band[1]),
        "n_coherent": (kl, count),
        "n_scored": (kl, n),
        "n_directions": (kl, size),
        "mean_z": (kl, flat(z)),
        "mean_log_count": (kl, flat(log_count)),
    }
    for name, value, resampled in zip(("rise", "dip"), (rise, dip), thirds(drawn), strict=True):
        low, high = np.quantile(resampled, [0.025, 0.975], 1)
        data |= {
            name: (("kind",), value),
            f"{name}_low": (("kind",), low),
            f"{name}_high": (("kind",), high),
        }
    return data


def transition(fraction_KL: np.ndarray, l_in: int | None) -> dict[str, Any]:
    """Compare coherent fractions before and after l_in with what a line over the layers explains; NaN without l_in."""
    found = [step_beyond_line(values, l_in or 0) for values in fraction_KL]
    names = {
        "before": [one.before for one in found],
        "after": [one.after for one in found],
        "difference": [one.after - one.before for one in found],
        "difference_by_line": [one.by_line for one in found],
        "difference_beyond_line": [one.beyond_line for one in found],
        "difference_p": [one.p for one in found],
        "least_p": [one.least_p for one in found],
    }
    data: dict[str, Any] = {name: (("kind",), np.array(value)) for name, value in names.items()}
    return data | {"l_in": ((), np.nan if l_in is None else float(l_in))}


def head_shares(coherent: Values, z: Values, share: np.ndarray | None, seed: int) -> dict[str, Any]:
    """Correlate heads' shares with the coherence of their circuits, within layers."""
    fraction = np.stack([_mean(coherent[kind], -1) for kind in HEAD_KINDS])
    data: dict[str, Any] = {"head_fraction": (("head_kind", "layer", "head"), fraction)}
    if share is None:
        return data
    mean = np.stack([_mean(z[kind], -1) for kind in HEAD_KINDS])
    found = [
        [spearman_within(share, side, seed=seed) for side in measure]
        for measure in (fraction, mean)
    ]
    mk = ("measure", "head_kind")
    return data | {
        "first_token_share": (("layer", "head"), share),
        "share_coherence": ((*mk, "layer"), np.array([[one[0] for one in row] for row in found])),
        "share_coherence_mean": (mk, np.array([[one[1] for one in row] for row in found])),
        "share_coherence_p": (mk, np.array([[one[2] for one in row] for row in found])),
    }


def class_mixes(better: Values, strings: np.ndarray, l_in: int | None) -> dict[str, Any]:
    """Return the mix of token classes at the better end of the directions, by kind and layer, and how it changes."""
    classes = classify(list(strings))
    mixes = [class_shares(classes[better[kind]].reshape(len(better[kind]), -1)) for kind in KINDS]
    mix_KLC = np.stack(mixes)
    change = np.full(len(KINDS), np.nan)
    if l_in:
        moved = mix_KLC[:, l_in:].mean(1) - mix_KLC[:, :l_in].mean(1)
        change = np.abs(moved).sum(-1) / 2
    found = [step_beyond_line(mix, l_in or 0) for mix in mix_KLC]
    return {
        "class_share": (("kind", "layer", "token_class"), mix_KLC),
        "vocabulary_class_share": (("token_class",), class_shares(classes)),
        "class_change": (("kind",), change),
        "class_change_beyond_line": (("kind",), np.array([one.beyond_line for one in found])),
        "class_change_p": (("kind",), np.array([one.p for one in found])),
        "token_text": (("d_vocab",), strings),
    }
