"""Coherence by layer: fractions with their intervals, the transition, heads' shares, the mix of token classes.

Shapes: K kinds of directions, L layers, C token classes; scores and flags of one kind are [L(, N), rank].
"""

from __future__ import annotations

import numpy as np

from headwater.analysis.engine.results import Variables
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
KL = ("kind", "layer")
CENTRAL_95 = (0.025, 0.975)
Values = dict[str, np.ndarray]


def _units(values: np.ndarray) -> np.ndarray:
    """Return what is resampled, by layer: the means of heads, or the directions of the MLP, [L, U]."""
    # The directions of a head share its weights, so that heads and not directions are independent.
    by_head = values.ndim == 3
    if by_head:
        return _mean(values, -1)
    return values.astype(np.float64)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return means of what is not NaN, NaN of nothing."""
    n = np.isfinite(values).sum(axis)
    total = np.nansum(values, axis)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def fractions(
    coherent: Values, z: Values, log_count: Values, n_bootstrap: int, seed: int
) -> Variables:
    """Return coherent_fraction by kind and layer with Wilson's interval and bootstrap bands, and its rise and dip."""
    n_layer = len(coherent["w_out"])
    flat = {kind: coherent[kind].reshape(n_layer, -1) for kind in KINDS}
    scored_KL = np.stack([np.isfinite(flat[kind]).sum(1) for kind in KINDS])
    count_KL = np.stack([(flat[kind] == 1).sum(1) for kind in KINDS])
    size_KL = np.stack([np.full(n_layer, coherent[kind][0].size) for kind in KINDS])
    fraction_KL = _means_by_layer(coherent)
    low_KL, high_KL = wilson(count_KL, scored_KL)

    units = [_units(coherent[kind]) for kind in KINDS]
    drawn_KBL = np.stack([resampled_means(one, n_bootstrap, seed) for one in units])
    band_low_KL, band_high_KL = np.quantile(drawn_KBL, CENTRAL_95, 1)
    data: Variables = {
        "coherent_fraction": (KL, fraction_KL),
        "coherent_low": (KL, low_KL),
        "coherent_high": (KL, high_KL),
        "band_low": (KL, band_low_KL),
        "band_high": (KL, band_high_KL),
        "n_coherent": (KL, count_KL),
        "n_scored": (KL, scored_KL),
        "n_directions": (KL, size_KL),
        "mean_z": (KL, _means_by_layer(z)),
        "mean_log_count": (KL, _means_by_layer(log_count)),
    }
    rise_K, dip_K = thirds(fraction_KL)
    rises_KB, dips_KB = thirds(drawn_KBL)
    for name, value_K, resampled_KB in (("rise", rise_K, rises_KB), ("dip", dip_K, dips_KB)):
        low_K, high_K = np.quantile(resampled_KB, CENTRAL_95, 1)
        data[name] = ("kind",), value_K
        data[f"{name}_low"] = ("kind",), low_K
        data[f"{name}_high"] = ("kind",), high_K
    return data


def _means_by_layer(values: Values) -> np.ndarray:
    """Return the means over all directions of a layer, [K, L]."""
    means = []
    for kind in KINDS:
        of_layers = values[kind].reshape(len(values[kind]), -1)
        means.append(_mean(of_layers, 1))
    return np.stack(means)


def transition(fraction_KL: np.ndarray, l_in: int | None) -> Variables:
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
    data: Variables = {name: (("kind",), np.array(value)) for name, value in names.items()}
    at = np.array(np.nan)
    if l_in is not None:
        at = np.array(float(l_in))
    data["l_in"] = (), at
    return data


def head_shares(coherent: Values, z: Values, share: np.ndarray | None, seed: int) -> Variables:
    """Correlate heads' shares with the coherence of their circuits, within layers."""
    fraction_KLN = np.stack([_mean(coherent[kind], -1) for kind in HEAD_KINDS])
    data: Variables = {"head_fraction": (("head_kind", "layer", "head"), fraction_KLN)}
    if share is None:
        return data
    z_KLN = np.stack([_mean(z[kind], -1) for kind in HEAD_KINDS])
    by_layer = []
    means = []
    p_values = []
    for values_LN in (*fraction_KLN, *z_KLN):
        correlation_L, mean, p = spearman_within(share, values_LN, seed=seed)
        by_layer.append(correlation_L)
        means.append(mean)
        p_values.append(p)
    n_kinds = len(HEAD_KINDS)
    mk = ("measure", "head_kind")
    data["first_token_share"] = ("layer", "head"), share
    data["share_coherence"] = (*mk, "layer"), np.array(by_layer).reshape(2, n_kinds, -1)
    data["share_coherence_mean"] = mk, np.array(means).reshape(2, n_kinds)
    data["share_coherence_p"] = mk, np.array(p_values).reshape(2, n_kinds)
    return data


def class_mixes(better: Values, strings: np.ndarray, l_in: int | None) -> Variables:
    """Return the mix of token classes at the better end of the directions, by kind and layer, and how it changes."""
    classes = classify(list(strings))
    mixes = []
    for kind in KINDS:
        by_layer = classes[better[kind]].reshape(len(better[kind]), -1)
        mixes.append(class_shares(by_layer))
    mix_KLC = np.stack(mixes)

    # Half the summed difference of two mixes is the share that changed its class (total variation).
    change_K = np.full(len(KINDS), np.nan)
    if l_in:
        after = mix_KLC[:, l_in:].mean(1)
        before = mix_KLC[:, :l_in].mean(1)
        change_K = np.abs(after - before).sum(-1) / 2
    found = [step_beyond_line(mix, l_in or 0) for mix in mix_KLC]
    return {
        "class_share": (("kind", "layer", "token_class"), mix_KLC),
        "vocabulary_class_share": (("token_class",), class_shares(classes)),
        "class_change": (("kind",), change_K),
        "class_change_beyond_line": (("kind",), np.array([one.beyond_line for one in found])),
        "class_change_p": (("kind",), np.array([one.p for one in found])),
        "token_text": (("d_vocab",), strings),
    }
