"""The figures of intervention results that are worth a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray

# A figure as it is computed, and as it is shown, in JSON values; NaN is None.
Number = float | np.ndarray | list[float]
Figures = dict[str, str | Number]
Shown = str | float | None | list[float | None]


def headline(dataset: xarray.Dataset) -> dict[str, Shown]:
    """Return labels and numbers (or short lists) of a plateau, patch, ablate, effects or repeated result."""
    figures = _MAKERS[dataset.attrs["analysis"]](dataset)
    return {name: _plain(value) for name, value in figures.items()}


def _plain(value: str | Number) -> Shown:
    if isinstance(value, str):
        return value
    values = [_rounded(number) for number in np.ravel(value)]
    if np.ndim(value) == 0:
        return values[0]
    return values


def _rounded(number: float) -> float | None:
    """Return a number with four digits that count, or None for NaN, which JSON has not."""
    if np.isnan(number):
        return None
    return float(f"{float(number):.4g}")


def _plateau(d: xarray.Dataset) -> Figures:
    found: Figures = {
        "depths": " ".join(map(str, d.depth.values)),
        "a line has width": 2 * d.attrs["tau"],
    }
    for path in d.path.values:
        one = d.sel(path=path)
        found[f"width at the logits, {path}"] = one.width_mean.sel(output=-1).values
        found[f"its error over {len(d.pair)} pairs, {path}"] = one.width_error.sel(output=-1).values
        found[f"width at the last depth, {path}"] = one.width_mean.isel(output=-2).values
    return found


def _parts(d: xarray.Dataset) -> Figures:
    found: Figures = {}
    for name in d.scenario.values:
        one = d.sel(scenario=name, out="logits")
        found[f"width, {name}"] = one.width_mean.values
        found[f"error over {len(d.pair)} pairs, {name}"] = one.width_error.values
    return found


def _heads(d: xarray.Dataset) -> Figures:
    share = d.term_share.isel(step=-1).mean(("pair", "layer", "head"), skipna=True)
    found: Figures = {}
    for term in d.term_of.values:
        found[f"share of the {term} term"] = share.sel(term_of=term).values
    found["mean |curvature| of own scores"] = np.abs(d.curvature).mean(("pair", "head")).values
    return found


def _jacobian(d: xarray.Dataset) -> Figures:
    return {
        "along the path": d.along.mean("pair").values,
        "Frobenius": d.frobenius.mean("pair").values,
    }


def _patch(d: xarray.Dataset) -> Figures:
    found: Figures = {
        "clean logit difference": d.clean_logit_difference.mean().values,
        "corrupt logit difference": d.corrupt_logit_difference.mean().values,
    }
    for name, restored in d.data_vars.items():
        if "position" not in restored.dims:
            continue
        mean = restored.mean("pair")
        if not np.isfinite(mean).any():
            continue
        at = np.unravel_index(np.nanargmax(mean.values), mean.shape)
        place = [f"{dim} {d[dim].values[i]}" for dim, i in zip(mean.dims, at, strict=True)]
        found[f"most restored by {name}"] = f"{mean.values[at]:.3f} at {', '.join(place)}"
    return found


def _ablate(d: xarray.Dataset) -> Figures:
    found: Figures = {"scales": d.scale.values, "loss unchanged": d.loss_unchanged.values}
    for target in d.target.values[:12]:
        one = d.sel(target=target)
        found[f"loss, {target}"] = one.loss.values
        found[f"share, {target}"] = one.share.mean(("layer", "head")).values
        found[f"error of the change of the loss, {target}"] = one.loss_change_error.values
        if "dloss" in d:
            found[f"dloss, {target}"] = [float(one.dloss), float(one.dloss_check)]
            found[f"error of dloss, {target}"] = one.dloss_error.values
            rising = (one.dshare > 0).mean("head").values
            found[f"heads whose share rises, {target}"] = rising
    return found


def _effects(d: xarray.Dataset) -> Figures:
    heads = d.total.stack(place=("layer", "head"))
    order = np.argsort(-heads.values)[:5]
    named = []
    for i in order:
        layer, head = heads.place.values[i]
        named.append(f"L{layer}H{head} {float(heads[i]):.3g}")
    return {
        "loss": d.loss.values,
        "direct, MLP by layer": d.direct_mlp.values,
        "total, MLP by layer": d.total_mlp.values,
        "total, five heads": ", ".join(named),
    }


def _repeated(d: xarray.Dataset) -> Figures:
    last = d.isel(length=-1)
    found: Figures = {}
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
