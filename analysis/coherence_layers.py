"""Coherence by layer: fractions with their intervals, the transition, heads' shares, the mix of token classes.

Shapes: K kinds of directions, L layers, C token classes; scores and flags of one kind are [L(, N), rank].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headwater.analysis.chance import (
    circular_shift_p,
    resampled_means,
    spearman_within,
    step_difference,
    thirds,
    wilson,
)
from headwater.analysis.token_classes import class_shares, classify

KINDS = ("ov_read", "ov_write", "w_in_raw", "w_in_folded", "w_out", "qk_query", "qk_key")
HEAD_KINDS = ("ov_read", "ov_write", "qk_query", "qk_key")
Values = dict[str, np.ndarray]


def _units(values: np.ndarray) -> np.ndarray:
    """Return what is resampled, by layer: the means of heads, or the directions of the MLP, [L, U]."""
    return values.mean(-1) if values.ndim == 3 else values.astype(np.float64)


def fractions(coherent: Values, scores: Values, n_bootstrap: int, seed: int) -> dict[str, Any]:
    """Return coherent_fraction by kind and layer with Wilson's interval and bootstrap bands, and its rise and dip."""
    n_layer = len(coherent["w_out"])
    flat = {kind: values.reshape(n_layer, -1) for kind, values in coherent.items()}
    n = np.array([[values.shape[1]] * n_layer for values in flat.values()])
    count = np.stack([values.sum(1) for values in flat.values()])
    drawn = np.stack([resampled_means(_units(coherent[kind]), n_bootstrap, seed) for kind in KINDS])
    band = np.quantile(drawn, [0.025, 0.975], 1)
    fraction = count / n
    low, high = wilson(count, n)
    rise, dip = thirds(fraction)
    kl = ("kind", "layer")
    data: dict[str, Any] = {
        "coherent_fraction": (kl, fraction), "coherent_low": (kl, low), "coherent_high": (kl, high),
        "band_low": (kl, band[0]), "band_high": (kl, band[1]), "n_coherent": (kl, count), "n_directions": (kl, n),
        "mean_score": (kl, np.stack([scores[kind].max(0).reshape(n_layer, -1).mean(1) for kind in KINDS])),
    }  # fmt: skip
    for name, value, resampled in zip(("rise", "dip"), (rise, dip), thirds(drawn), strict=True):
        low, high = np.quantile(resampled, [0.025, 0.975], 1)
        data |= {name: (("kind",), value), f"{name}_low": (("kind",), low), f"{name}_high": (("kind",), high)}
    return data


def transition(coherent: Values, l_in: int) -> dict[str, Any]:
    """Compare coherent fractions before and after l_in; NaN where there is no transition."""
    by_layer = np.stack([values.reshape(len(values), -1).mean(1) for values in coherent.values()])
    nothing = np.full(len(by_layer), np.nan)
    before = after = difference = p = nothing
    if l_in > 0:
        before, after = by_layer[:, :l_in].mean(1), by_layer[:, l_in:].mean(1)
        difference = step_difference(by_layer, l_in)
        p = np.array([circular_shift_p(values, l_in) for values in by_layer])
    names = {"before": before, "after": after, "difference": difference, "difference_p": p}
    return {name: (("kind",), value) for name, value in names.items()} | {"l_in": ((), l_in)}


def head_shares(coherent: Values, scores: Values, share: np.ndarray | None, seed: int) -> dict[str, Any]:
    """Correlate heads' shares with the coherence of their circuits, within layers."""
    fraction = np.stack([coherent[kind].mean(-1) for kind in HEAD_KINDS])
    data: dict[str, Any] = {"head_fraction": (("head_kind", "layer", "head"), fraction)}
    if share is None:
        return data
    mean = np.stack([scores[kind].max(0).mean(-1) for kind in HEAD_KINDS])
    found = [[spearman_within(share, side, seed=seed) for side in measure] for measure in (fraction, mean)]
    mk = ("measure", "head_kind")
    return data | {
        "first_token_share": (("layer", "head"), share),
        "share_coherence": ((*mk, "layer"), np.array([[one[0] for one in row] for row in found])),
        "share_coherence_mean": (mk, np.array([[one[1] for one in row] for row in found])),
        "share_coherence_p": (mk, np.array([[one[2] for one in row] for row in found])),
    }


def class_mixes(tokens: Values, scores: Values, strings: np.ndarray, l_in: int) -> dict[str, Any]:
    """Return the mix of token classes at the better end of the directions, by kind and layer, and how it changes."""
    classes = classify(list(strings))
    mix = []
    for kind in KINDS:
        better = np.take_along_axis(tokens[kind], scores[kind].argmax(0)[None, ..., None], 0)[0]
        mix.append(class_shares(classes[better].reshape(len(better), -1)))
    mix_KLC = np.stack(mix)
    change, p = np.full(len(KINDS), np.nan), np.full(len(KINDS), np.nan)
    if l_in > 0:
        shifted = np.stack([_class_change(np.roll(mix_KLC, shift, 1), l_in) for shift in range(mix_KLC.shape[1])])
        change, p = shifted[0], (shifted >= shifted[0] * (1 - 1e-9)).mean(0)
    return {
        "class_share": (("kind", "layer", "token_class"), mix_KLC),
        "vocabulary_class_share": (("token_class",), class_shares(classes)),
        "class_change": (("kind",), change),
        "class_change_p": (("kind",), p),
        "token_text": (("d_vocab",), strings),
    }


def _class_change(mix_KLC: np.ndarray, at: int) -> np.ndarray:
    return np.asarray(np.abs(mix_KLC[:, at:].mean(1) - mix_KLC[:, :at].mean(1)).sum(-1) / 2)
