"""Figures of interventions: plateaus, what makes them, heads along a path, patching, ablation, repeated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater.analysis.engine.analysis import Plot, Shown
from headwater.analysis.engine.results import RunResults
from headwater.analysis.plots.draw import (
    HEIGHT,
    colour_of,
    heat,
    legend,
    letter,
    make_figure,
    number_ticks,
    shade_of,
)

MOST_TARGETS = 6


class Plateau(Shown):
    """Sweeps of a state from one prompt's to another's."""

    name = "plateau"
    plots = (
        Plot(
            "plateau_map",
            "How wide the flat parts at both ends of the path are, by depth of the state that is moved.",
            "headwater.analysis.plots.interventions:plateau_map",
            together=False,
        ),
        Plot(
            "plateau_curves",
            "How far the output has gone along the path between two states, pair by pair.",
            "headwater.analysis.plots.interventions:plateau_curves",
            together=False,
        ),
    )


class PlateauParts(Shown):
    """Plateaus when a part of the model is frozen or made linear."""

    name = "plateau_parts"
    plots = (
        Plot(
            "plateau_parts",
            "The width of plateaus when a part of the model is frozen or made linear.",
            "headwater.analysis.plots.interventions:plateau_parts",
            together=False,
        ),
    )


class PlateauHeads(Shown):
    """What each head does along the path."""

    name = "plateau_heads"
    plots = (
        Plot(
            "plateau_heads",
            "Which heads change along the path, split into pattern, values and both.",
            "headwater.analysis.plots.interventions:plateau_heads",
            together=False,
        ),
        Plot(
            "saturation",
            "One head along the path: scores, pattern and output; the head whose pattern moves most.",
            "headwater.analysis.plots.interventions:saturation",
            together=False,
        ),
    )


class PlateauJacobian(Shown):
    """How sensitive the output is along the path."""

    name = "plateau_jacobian"
    plots = (
        Plot(
            "jacobian",
            "How sensitive the output is to the state that is moved, along the path.",
            "headwater.analysis.plots.interventions:jacobian",
            together=False,
        ),
    )


class Patch(Shown):
    """Clean activations patched into corrupt prompts."""

    name = "patch"
    plots = (
        Plot(
            "patching",
            "Share of the clean logit difference that each place restores.",
            "headwater.analysis.plots.interventions:patching",
            together=False,
        ),
    )


class Ablate(Shown):
    """Ablation by scale."""

    name = "ablate"
    plots = (
        Plot(
            "ablation",
            "Loss, attention on the first token and norms over the scale of the target.",
            "headwater.analysis.plots.interventions:ablation",
            together=False,
        ),
        Plot(
            "ablation_heads",
            "Derivative of each head's first-token share by the scale, and its share without the target.",
            "headwater.analysis.plots.interventions:ablation_heads",
            together=False,
        ),
    )


class Effects(Shown):
    """Direct and total effects of heads and MLPs."""

    name = "effects"
    plots = (
        Plot(
            "effects",
            "What the loss loses without each head and MLP, directly and in total.",
            "headwater.analysis.plots.interventions:effects",
            together=False,
        ),
    )


class Repeated(Shown):
    """Prompts of one repeated token."""

    name = "repeated"
    plots = (
        Plot(
            "repeated",
            "One token repeated: attention and norms of the first layers.",
            "headwater.analysis.plots.interventions:repeated",
            together=False,
        ),
    )


def plateau_map(runs: Sequence[RunResults]) -> Any:
    """Draw the width by depth moved and output as a heat map, one for each path."""
    data = runs[0].results["plateau"]
    paths = [str(path) for path in data.path.values]
    figure, axes = make_figure(1, len(paths), height=1.25 * HEIGHT)
    mean = data.width.mean("pair").transpose("path", "depth", "output").values
    high = max(float(np.nanmax(mean)), 2 * float(data.attrs["tau"]))
    for at, (axis, path) in enumerate(zip(axes[0], paths, strict=True)):
        heat(
            figure,
            axis,
            mean[at],
            f"width (a line: {2 * data.attrs['tau']:g})",
            0.0,
            high,
            bar=at == len(paths) - 1,
        )
        number_ticks(axis, "x", [*data.output.values[:-1], "L"], 16)
        number_ticks(axis, "y", data.depth.values)
        axis.set(
            title=path,
            xlabel="output: depth (L: logits)",
            ylabel="moved at depth" if at == 0 else "",
        )
    letter(axes)
    return figure


def plateau_curves(runs: Sequence[RunResults]) -> Any:
    """Draw distance, ratio and KL along the path, by the depth at which the state is moved."""
    data = runs[0].results["plateau"]
    mean = data.isel(path=0).mean("pair")
    figure, axes = make_figure(1, 3)
    for depth in data.depth.values:
        one = mean.sel(depth=depth)
        colour = shade_of(depth / max(int(data.depth.max()), 1))
        name = f"depth {depth}" if depth in (data.depth.values[0], data.depth.values[-1]) else None
        axes[0, 0].plot(data.alpha, one.distance.sel(output=-1), color=colour, label=name)
        axes[0, 1].plot(data.alpha, one.distance.isel(output=-2), color=colour, label=name)
        axes[0, 2].plot(data.alpha, one.kl, color=colour, label=name)
    for axis in axes[0, :2]:
        axis.plot([0, 1], [0, 1], ":", color="#666666", lw=0.9)
        axis.axhline(data.attrs["tau"], color="#666666", lw=0.6, ls=(0, (4, 2)))
    axes[0, 0].set(title="logits, distance to A", ylabel="‖o − o_A‖ / ‖o_B − o_A‖", xlabel="α")
    axes[0, 1].set(title="last residual stream", xlabel="α")
    axes[0, 2].set(title="KL(A ‖ α)", ylabel="nats", xlabel="α")
    legend(axes[0, 0])
    letter(axes)
    return figure


def plateau_parts(runs: Sequence[RunResults]) -> Any:
    """Draw widths with parts held: all layers at once, and one switch in one layer."""
    data = runs[0].results["plateau_parts"]
    several = "layer_width" in data
    figure, axes = make_figure(1, 2 if several else 1, height=1.3 * HEIGHT)
    each = data.width.sel(out="logits").mean("depth")
    width = each.mean("pair")
    error = each.std("pair", ddof=1) / np.sqrt(len(data.pair)) if len(data.pair) > 1 else None
    place = np.arange(len(width))
    colours = [colour_of(0 if "alone" not in str(name) else 1) for name in data.scenario.values]
    axes[0, 0].barh(place, width, xerr=error, color=colours, error_kw={"lw": 0.8})
    axes[0, 0].axvline(2 * data.attrs["tau"], color="#444444", lw=0.8, ls=(0, (4, 2)))
    axes[0, 0].set(
        yticks=place,
        yticklabels=data.scenario.values.tolist(),
        xlabel="width at the logits (dashed: a line)",
        title="all layers, mean over depths",
    )
    axes[0, 0].invert_yaxis()
    if several:
        base = data.width.sel(scenario="nothing held", out="logits")
        change = (data.layer_width.sel(out="logits") - base).mean(("pair", "depth"), skipna=True)
        heat(
            figure,
            axes[0, 1],
            change.transpose("switch", "layer"),
            "change of width",
            diverging=True,
        )
        number_ticks(axes[0, 1], "x", data.layer.values)
        number_ticks(axes[0, 1], "y", data.switch.values)
        axes[0, 1].set(title="one switch in one layer", xlabel="layer")
    letter(axes)
    return figure


def plateau_heads(runs: Sequence[RunResults]) -> Any:
    """Draw the response of heads to the whole step: change of pattern, shares of the three terms, own-score curves."""
    data = runs[0].results["plateau_heads"].isel(depth=0)
    figure, axes = make_figure(1, 3, height=1.1 * HEIGHT, width_ratios=(1, 1, 1.3))
    change = data.pattern_change.isel(step=-1).mean("pair")
    heat(figure, axes[0, 0], change.transpose("layer", "head"), "½ Σ|Δp|", 0, 1)
    share = data.term_share.isel(step=-1).mean("pair").sel(term_of="pattern")
    heat(
        figure,
        axes[0, 1],
        share.transpose("layer", "head"),
        "share of the pattern term",
        -1,
        1,
        diverging=True,
    )
    for axis, title in zip(
        axes[0], ("change of the pattern", "Δz by moving attention"), strict=False
    ):
        number_ticks(axis, "x", data["head"].values)
        number_ticks(axis, "y", data.layer.values)
        axis.set(title=title, xlabel="head", ylabel="layer")
    largest = int(np.abs(data.curvature.mean("pair")).argmax())
    one = data.isel(head=largest).mean("pair")
    for at, name in enumerate(data.moved.values):
        axes[0, 2].plot(
            data.alpha, one.own_score.sel(moved=name), color=colour_of(at), label=f"{name} moved"
        )
    axes[0, 2].plot(data.alpha, one.own_score_measured, ":", color="black", label="LayerNorm on")
    axes[0, 2].set(title=f"own score, head {int(data.depth)}.{largest}", xlabel="α", ylabel="score")
    legend(axes[0, 2])
    letter(axes)
    return figure


def saturation(runs: Sequence[RunResults]) -> Any:
    """Draw one head along the path of the first pair: scores, pattern and output; the head whose pattern moves most."""
    data = runs[0].results["plateau_heads"].isel(depth=0)
    layer = int(data.depth)
    head = int(data.pattern_change.sel(layer=layer).isel(pair=0, step=-1).argmax())
    figure, axes = make_figure(1, 3)
    one = data.isel(head=head)
    keys = np.argsort(-np.nan_to_num(one.pattern.max("step").values))[:5]
    for at, key in enumerate(keys):
        name = "own position" if key == len(one.key) - 1 else f"key {key}"
        axes[0, 0].plot(data.alpha, one.scores.isel(key=key), color=colour_of(at), label=name)
        axes[0, 1].plot(data.alpha, one.pattern.isel(key=key), color=colour_of(at))
    change = one.z_change.sel(layer=layer).isel(pair=0)
    axes[0, 2].plot(data.alpha, change / change[-1], color="black", label="‖Δz‖, of the whole")
    axes[0, 2].plot(
        data.alpha,
        one.pattern_change.sel(layer=layer).isel(pair=0),
        color=colour_of(0),
        label="½ Σ|Δp|",
    )
    axes[0, 2].plot([0, 1], [0, 1], ":", color="#666666", lw=0.9)
    axes[0, 0].set(
        title=f"scores, layer {layer} head {head}", xlabel="α", ylabel="score before the softmax"
    )
    axes[0, 1].set(title="pattern", xlabel="α", ylabel="probability", ylim=(-0.03, 1.03))
    axes[0, 2].set(title="output of the head", xlabel="α")
    legend(axes[0, 0])
    legend(axes[0, 2])
    letter(axes)
    return figure


def jacobian(runs: Sequence[RunResults]) -> Any:
    """Draw the norms of the Jacobian along the path, pair by pair."""
    data = runs[0].results["plateau_jacobian"]
    figure, axes = make_figure(1, 2)
    for axis, name, title in (
        (axes[0, 0], "along", "along the path"),
        (axes[0, 1], "frobenius", "Frobenius norm"),
    ):
        axis.plot(data.alpha, data[name].T, color=colour_of(0), lw=0.7, alpha=0.5)
        axis.plot(data.alpha, data[name].mean("pair"), color="black")
        axis.set(title=title, xlabel="α", ylabel="norm of the Jacobian", ylim=(0, None))
    letter(axes)
    return figure


def patching(runs: Sequence[RunResults]) -> Any:
    """Draw how much of the logit difference each site, layer and position restores; heads: the last position."""
    data = runs[0].results["patch"]
    sites = [str(name) for name, value in data.data_vars.items() if "position" in value.dims]
    figure, axes = make_figure(1, len(sites), width=max(7.2, 2.6 * len(sites)), height=1.2 * HEIGHT)
    for at, (axis, site) in enumerate(zip(axes[0], sites, strict=True)):
        mean = data[site].mean("pair")
        across = "head" if "head" in mean.dims else "position"
        mean = mean.max("position") if across == "head" else mean
        heat(figure, axis, mean, "restored", -1, 1, diverging=True, bar=at == len(sites) - 1)
        number_ticks(axis, "x", data[across].values, 9)
        number_ticks(axis, "y", data[str(mean.dims[0])].values)
        title = f"{site} (best position)" if across == "head" else site
        axis.set(
            title=title,
            xlabel=across if across == "head" else "position from the end",
            ylabel=str(mean.dims[0]),
        )
    letter(axes)
    return figure


def ablation(runs: Sequence[RunResults]) -> Any:
    """Draw loss, first-token share and the cosine with the unchanged run over the scale, target by target."""
    data = runs[0].results["ablate"]
    figure, axes = make_figure(1, 3, height=1.1 * HEIGHT)
    targets = data.target.values
    shown = targets[
        np.unique(
            np.linspace(0, len(targets) - 1, min(len(targets), MOST_TARGETS)).round().astype(int)
        )
    ]
    for at, target in enumerate(shown):
        one = data.sel(target=target)
        colour = colour_of(at)
        name = str(target) if len(targets) > 1 else None
        axes[0, 0].plot(data.scale, one.loss, marker="o", color=colour, label=name)
        low = one.loss - one.loss_change_error
        high = one.loss + one.loss_change_error
        axes[0, 0].fill_between(data.scale, low, high, color=colour, alpha=0.15, lw=0)
        axes[0, 1].plot(
            data.scale, one.share.mean(("layer", "head")), marker="o", color=colour, label=name
        )
        cosine = one.cosine.isel(depth=-1)
        axes[0, 2].plot(data.scale, cosine.sel(group="others"), marker="o", color=colour)
        axes[0, 2].plot(data.scale, cosine.sel(group="first"), "--", marker="o", color=colour)
    if "dloss" in data and len(targets) == 1:
        x = np.array([0.6, 1.4])
        axes[0, 0].plot(
            x,
            float(data.loss_unchanged) + float(data.dloss[0]) * (x - 1),
            color="black",
            lw=0.9,
            label="slope at 1",
        )
    for axis in axes[0]:
        axis.axvline(1, color="#666666", lw=0.6, ls=(0, (4, 2)))
    axes[0, 0].set(title="loss (band: its change ± error)", ylabel="nats", xlabel="scale")
    axes[0, 1].set(title="first-token share", ylabel="mean over layers and heads", xlabel="scale")
    axes[0, 2].set(
        title="last depth against scale 1", ylabel="cosine (dashed: first position)", xlabel="scale"
    )
    legend(axes[0, 0])
    letter(axes)
    return figure


def ablation_heads(runs: Sequence[RunResults]) -> Any:
    """Draw the derivative of each head's first-token share with respect to the scale, and the share without it."""
    data = runs[0].results["ablate"].isel(target=0)
    figure, axes = make_figure(1, 2, height=1.1 * HEIGHT)
    heat(
        figure,
        axes[0, 0],
        data.dshare.transpose("layer", "head"),
        "d share / d scale at 1",
        diverging=True,
    )
    least = data.share.isel(scale=int(np.argmin(data.scale.values))) - data.share_unchanged
    heat(
        figure, axes[0, 1], least.transpose("layer", "head"), "change of the share", diverging=True
    )
    for axis, title in (
        (axes[0, 0], "what a larger value does"),
        (axes[0, 1], f"at scale {float(data.scale.min()):g}"),
    ):
        number_ticks(axis, "x", data["head"].values)
        number_ticks(axis, "y", data.layer.values)
        axis.set(title=title, xlabel="head", ylabel="layer")
    letter(axes)
    return figure


def effects(runs: Sequence[RunResults]) -> Any:
    """Draw what the loss loses without each head and MLP, directly and in total."""
    data = runs[0].results["effects"]
    figure, axes = make_figure(1, 3, height=1.1 * HEIGHT)
    for axis, name in ((axes[0, 0], "direct"), (axes[0, 1], "total")):
        heat(
            figure,
            axis,
            data[name].transpose("layer", "head"),
            "increase of the loss, nats",
            diverging=True,
        )
        number_ticks(axis, "x", data["head"].values)
        number_ticks(axis, "y", data.layer.values)
        axis.set(title=f"heads, {name}", xlabel="head", ylabel="layer")
    layer = data.layer.values
    axes[0, 2].bar(layer - 0.2, data.direct_mlp, 0.4, color=colour_of(0), label="direct")
    axes[0, 2].bar(layer + 0.2, data.total_mlp, 0.4, color=colour_of(1), label="total")
    axes[0, 2].set(
        title="MLPs", xlabel="layer", ylabel="increase of the loss, nats", yscale="symlog"
    )
    legend(axes[0, 2])
    letter(axes)
    return figure


def repeated(runs: Sequence[RunResults]) -> Any:
    """Draw norms over depth and first-token shares of heads for repeated tokens at the largest length."""
    data = runs[0].results["repeated"].isel(length=-1)
    figure, axes = make_figure(1, 2, height=1.1 * HEIGHT)
    for at, name in enumerate(data.repeated.values):
        for start, line in zip(data.start.values, ("-", "--"), strict=False):
            one = data.sel(start=start, repeated=name)
            label = f"{name}, {start}" if len(data.start) > 1 else str(name)
            axes[0, 0].plot(
                data.depth, one.norm_ratio, line, marker="o", color=colour_of(at), label=label
            )
            axes[0, 1].plot(
                data.layer, one.first_token_share.max("head"), line, marker="o", color=colour_of(at)
            )
    title = f"norm elsewhere over norm at the first, {int(data.length)} tokens"
    axes[0, 0].set(title=title, xlabel="depth", ylabel="ratio", yscale="log")
    axes[0, 0].set_xticks(data.depth.values)
    axes[0, 1].set(
        title="largest first-token share of a head",
        xlabel="layer",
        ylabel="share",
        ylim=(-0.03, 1.03),
    )
    axes[0, 1].set_xticks(data.layer.values)
    legend(axes[0, 0], fontsize=6.5)
    letter(axes)
    return figure
