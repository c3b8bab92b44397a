"""The figures of intervention results that are worth a line."""

from __future__ import annotations

from typing import Any

import numpy as np


def headline(dataset: Any) -> dict[str, Any]:
    """Return labels and numbers (or short lists) of a plateau, patch, ablate, effects or repeated result."""
    return {
        name: _plain(value) for name, value in _MAKERS[dataset.attrs["analysis"]](dataset).items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    values = [None if np.isnan(v) else float(f"{float(v):.4g}") for v in np.ravel(value)]
    return values[0] if np.ndim(value) == 0 else values


def _plateau(d: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "depths": " ".join(map(str, d.depth.values)),
        "a line has width": 2 * d.attrs["tau"],
    }
    for path in d.path.values:
        one = d.sel(path=path)
        found[f"width at the logits, {path}"] = one.width_mean.sel(output=-1).values
        found[f"its error over {len(d.pair)} pairs, {path}"] = one.width_error.sel(output=-1).values
        found[f"width at the last depth, {path}"] = one.width_mean.isel(output=-2).values
    return found


def _parts(d: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in d.scenario.values:
        one = d.sel(scenario=name, out="logits")
        found[f"width, {name}"] = one.width_mean.values
        found[f"error over {len(d.pair)} pairs, {name}"] = one.width_error.values
    return found


def _heads(d: Any) -> dict[str, Any]:
    share = d.term_share.isel(step=-1).mean(("pair", "layer", "head"), skipna=True)
    found = {
        f"share of the {term} term": share.sel(term_of=term).values for term in d.term_of.values
    }
    found["mean |curvature| of own scores"] = np.abs(d.curvature).mean(("pair", "head")).values
    return found


def _jacobian(d: Any) -> dict[str, Any]:
    return {
        "along the path": d.along.mean("pair").values,
        "Frobenius": d.frobenius.mean("pair").values,
    }


def _patch(d: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "clean logit difference": d.clean_logit_difference.mean(),
        "corrupt logit difference": d.corrupt_logit_difference.mean(),
    }
    for name in (str(name) for name, value in d.data_vars.items() if "position" in value.dims):
        mean = d[name].mean("pair").values
        if np.isfinite(mean).any():
            at = np.unravel_index(np.nanargmax(mean), mean.shape)
            place = ", ".join(
                f"{dim} {d[dim].values[i]}" for dim, i in zip(d[name].dims[1:], at, strict=True)
            )
            found[f"most restored by {name}"] = f"{mean[at]:.3f} at {place}"
    return found


def _ablate(d: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"scales": d.scale.values, "loss unchanged": d.loss_unchanged}
    for target in d.target.values[:12]:
        one = d.sel(target=target)
        found[f"loss, {target}"] = one.loss.values
        found[f"share, {target}"] = one.share.mean(("layer", "head")).values
        found[f"error of the change of the loss, {target}"] = one.loss_change_error.values
        if "dloss" in d:
            found[f"dloss, {target}"] = [float(one.dloss), float(one.dloss_check)]
            found[f"error of dloss, {target}"] = one.dloss_error
            rising = (one.dshare > 0).mean("head").values
            found[f"heads whose share rises, {target}"] = rising
    return found


def _effects(d: Any) -> dict[str, Any]:
    heads = d.total.stack(place=("layer", "head"))
    order = np.argsort(-heads.values)[:5]
    named = [
        f"L{int(heads['layer'][i])}H{int(heads['head'][i])} {float(heads[i]):.3g}" for i in order
    ]
    return {
        "loss": d.loss,
        "direct, MLP by layer": d.direct_mlp.values,
        "total, MLP by layer": d.total_mlp.values,
        "total, five heads": ", ".join(named),
    }


def _repeated(d: Any) -> dict[str, Any]:
    last = d.isel(length=-1)
    found: dict[str, Any] = {}
    for start in d.start.values:
        for name in d.repeated.values[:8]:
            one = last.sel(start=start, repeated=name)
            found[f"norm ratio, {start} {name}"] = one.norm_ratio.values
            found[f"first-token share, {start} {name}"] = one.first_token_share.max("head").values
    return found


_MAKERS = {
    "plateau": _plateau,
    "plateau_parts": _parts,
    "plateau_heads": _heads,
    "plateau_jacobian": _jacobian,
    "patch": _patch,
    "ablate": _ablate,
    "effects": _effects,
    "repeated": _repeated,
}
