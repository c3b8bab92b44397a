"""The figures of a result that are worth a line: short labels and values."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Figures = dict[str, Any]


def summarise(name: str, dataset: Any) -> Figures:
    """Return the headline figures of an analysis's result, by label; numbers, words or short lists of numbers."""
    return SUMMARIES[name](dataset) if name in SUMMARIES else {}


def _round(values: Any) -> Any:
    """Round to four significant digits."""
    return json.loads(
        json.dumps([float(f"{v:.4g}") for v in np.ravel(values)]), parse_constant=lambda _: None
    )


def _one(value: Any) -> Any:
    return _round(value)[0]


def _layer(value: Any) -> Any:
    """Return a layer, or why there is none: ramp, none, too few layers and so on."""
    if np.isfinite(value):
        return int(value)
    said = str(value.attrs["transition"])
    return "none" if said == "steps" else said


def _cosine(d: Any) -> Figures:
    plain = d.isel(centring=0, positions=0, outliers=0)
    bare = d.isel(centring=1, positions=1, outliers=1)
    return {
        "consecutive": _round(plain.consecutive),
        "consecutive_centred_without_first_and_outliers": _round(bare.consecutive),
        "anisotropy": _round(plain.anisotropy),
        "outlier_dimensions": [int(i) for i in d.outlier_dimensions.values],
    }


def _norms(d: Any) -> Figures:
    plain = d.sel(positions="all")
    return {"norm": _round(plain.norm), "consecutive": _round(plain.consecutive)}


def _cka(d: Any) -> Figures:
    return {
        f"consecutive_{positions}": _round(np.diagonal(d.cka.sel(positions=positions).values, 1))
        for positions in ("all", "without_first")
    }


def _sinks(d: Any) -> Figures:
    share = d.first_token_share.sel(query_set="second_half")
    layer, head = np.unravel_index(np.nanargmax(share.values), share.shape)
    return {
        "l_in": _layer(d.l_in),
        "l_out": _layer(d.l_out),
        "concentrates_in": _layer(d.concentrates_in),
        "second_half_share": _round(d.share_by_layer.sel(query_set="second_half")),
        "strongest_head": f"L{int(d.layer[layer])}H{int(d['head'][head])}",
        "strongest_share": _one(share.values[layer, head]),
    }


def _false_sinks(d: Any) -> Figures:
    attention = {"largest_false_attention": _one(d.false_attention.max())}
    ratio = d.relative_ratio
    if not np.isfinite(ratio).any():
        said = "the first position stands out at no depth of rows of different tokens"
        return {"largest_ratio_relative_to_different_tokens": said} | attention
    at = dict(
        zip(ratio.dims, np.unravel_index(np.nanargmax(ratio.values), ratio.shape), strict=True)
    )
    one = d.isel(at)
    return {
        "largest_ratio_relative_to_different_tokens": _one(one.relative_ratio),
        "its_token": str(one.token_text.item() if "token_text" in d else one.repeated.item()),
        "its_depth": int(at["depth"]),
        "its_norm_and_that_of_the_first": _round([one.norm, one.first_norm]),
        "of_different_tokens": _round([one.control_norm, one.control_first_norm]),
    } | attention


def _massive(d: Any) -> Figures:
    from headwater.analysis.measures.massive import massive_dimensions

    size = d.max_size.max("positions").values
    return {
        "strict": massive_dimensions(d, "strict"),
        "large": massive_dimensions(d, "large")[:8],
        "largest": _one(size.max()),
        "largest_ratio": _one(d.largest_ratio.max()),
        "max_by_depth": _round(size),
    }


def _origin(d: Any) -> Figures:
    one = d.isel(event=0)
    mlp = int(np.abs(one.mlp_out.values).argmax())
    largest = one.neuron_contribution.isel(rank=0)
    layer = int(np.abs(largest.values).argmax())  # need not be in the layer of the largest MLP
    return {
        "dimension": int(one.dimension),
        "position": int(one.position),
        "token_of_its_text": int(one.text_position),
        "largest_mlp": f"layer {mlp}: {_one(one.mlp_out[mlp])}",
        "largest_neuron": f"L{layer}N{int(one.neuron[layer, 0])}: {_one(largest[layer])}",
    }


def _svd(d: Any) -> Figures:
    chosen = {"centring": d.centring.values[-1], "positions": d.positions.values[-1]}
    ratio = d.participation_ratio.sel(chosen)
    return {
        "variant": " ".join(map(str, chosen.values())),
        "participation_ratio": _round(ratio)[:64],
    }


def _tokens(d: Any) -> Figures:
    last = d.isel({d.token.dims[-3]: -1, "centring": -1, "positions": -1, "rank": 0})
    named = last.token_text if "token_text" in d else last.token
    return {"first_direction_at_the_last_depth": " ".join(map(repr, named.values[0, :5].tolist()))}


def _heads(d: Any) -> Figures:
    from headwater.analysis.measures.heads import inverted_pairs

    return {"inverted_pairs": len(inverted_pairs(d)), "smallest_tau": _one(np.nanmin(d.tau.values))}


def _lens(d: Any) -> Figures:
    return {
        "kl": _round(d.kl[0]),
        "top1_agreement": _round(d.top1_agreement[0]),
        "loss": _round(d.loss[0]),
    }


def _attribution(d: Any) -> Figures:
    head = d["head_contribution"][0].values
    layer, best = np.unravel_index(head.argmax(), head.shape)
    return {
        "logit": _one(d.logit[0]),
        "mlp": _round(d.mlp[0]),
        "largest_head": f"L{layer}H{best}: {_one(head[layer, best])}",
    }


def _top(d: Any) -> Figures:
    value = d.value[..., 0].values
    lead, unit = np.unravel_index(np.nanargmax(value), value.shape)
    axis = d["value"].dims[0]
    figures = {
        "site": d.attrs["site"],
        "largest": _one(value[lead, unit]),
        "at": f"{axis} {int(d[axis][lead])}, unit {int(d.unit[unit])}",
    }
    return figures | (
        {"token": repr(str(d.token_text.values[lead, unit, 0]))} if "token_text" in d else {}
    )


def _weights(d: Any) -> Figures:
    sigma = d.w_out_sigma.values
    return {
        "w_out_sigma_1": _round(sigma[:, 0]),
        "ov_sigma_1": _round(d.ov_sigma[:, :, 0].max("head")),
    }


def _coherence(d: Any) -> Figures:
    kinds = [str(kind) for kind in d.kind.values]
    figures: Figures = {
        f"{kind}_coherent": _round(d.coherent_fraction.sel(kind=kind)) for kind in kinds
    }
    scored = d.n_scored.sum("layer") / d.n_directions.sum("layer")
    figures |= {f"{kind}_with_a_score": _one(scored.sel(kind=kind)) for kind in kinds}
    if np.isfinite(d.l_in):
        for kind in kinds:
            one = d.sel(kind=kind)
            figures[f"{kind}_after_minus_before"] = _one(one.difference)
            figures[f"{kind}_beyond_a_line"] = _one(one.difference_beyond_line)
            figures[f"{kind}_p"] = _one(one.difference_p)
    return figures


def _favourites(d: Any) -> Figures:
    effect = d.second_effect.values
    if not np.isfinite(effect).any():
        return {"second_effect": "no head with rows enough"}
    layer, head = np.unravel_index(np.nanargmax(effect), effect.shape)
    return {
        "largest_second_effect": _one(effect[layer, head]),
        "head": f"L{int(d.layer[layer])}H{int(d['head'][head])}",
        "its_error_over_sequences": _one(d.second_error.values[layer, head]),
        "mean_transitivity": _one(np.nanmean(d.transitivity.values)),
        "transitivity_of_random_attention": _one(d.transitivity_null),
    }


SUMMARIES: dict[str, Callable[[Any], Figures]] = {
    "cosine": _cosine,
    "norms": _norms,
    "cka": _cka,
    "sinks": _sinks,
    "false_sinks": _false_sinks,
    "massive": _massive,
    "massive_origin": _origin,
    "svd": _svd,
    "svd_tokens": _tokens,
    "heads": _heads,
    "lens": _lens,
    "attribution": _attribution,
    "top": _top,
    "weights": _weights,
    "coherence": _coherence,
    "favourites": _favourites,
}
