"""Figures of attention: the map of sinks, the transition, what keys receive, words, repeated tokens, pairs of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater.analysis.engine.results import RunResults
from headwater.analysis.plots.draw import (
    HEIGHT,
    WIDTH,
    colour_of,
    heat,
    legend,
    letter,
    make_figure,
    mark_text,
    number_ticks,
    shade_of,
)

CONVENTIONS = {"all": "all queries", "second_half": "second half", "last_64": "last 64 queries"}
MOST_LAYERS = 12


def sink_map(runs: Sequence[RunResults]) -> Any:
    """Draw the first-token share of every head, second-half queries, one panel for each run."""
    figure, axes = make_figure(1, len(runs), height=1.15 * HEIGHT)
    for axis, run in zip(axes[0], runs, strict=True):
        data = run.results["sinks"]
        share = data.first_token_share.sel(query_set="second_half")
        heat(figure, axis, share, "first-token share", 0, 1, bar=run is runs[-1])
        number_ticks(axis, "x", data["head"].values)
        number_ticks(axis, "y", data.layer.values)
        for name in ("l_in", "l_out"):
            if np.isfinite(data[name]):
                at = float(np.flatnonzero(data.layer.values == int(data[name]))[0]) - 0.5
                axis.axhline(at, color="white", lw=2.2)
                axis.axhline(at, color="black", lw=1.0, ls=(0, (3, 2)))
                axis.annotate(
                    name,
                    (1, at),
                    xycoords=("axes fraction", "data"),
                    xytext=(-3, 3),
                    ha="right",
                    textcoords="offset points",
                    fontsize=7,
                    fontweight="bold",
                    color="white",
                )
        axis.set(xlabel="head", title=run.label)
    axes[0, 0].set_ylabel("layer")
    return figure


def sink_layers(runs: Sequence[RunResults]) -> Any:
    """Draw share by layer under the three conventions, with l_in and l_out, and the entropies beside it."""
    figure, axes = make_figure(1, 2)
    several = len(runs) > 1
    for at, run in enumerate(runs):
        data = run.results["sinks"]
        x = data.layer_fraction.values if several else data.layer.values
        sets = ("second_half",) if several else tuple(CONVENTIONS)
        for i, name in enumerate(sets):
            axes[0, 0].plot(
                x,
                data.share_by_layer.sel(query_set=name),
                marker="o",
                color=colour_of(at + i),
                label=run.label if several else CONVENTIONS[name],
            )
        for name, style, label in (
            ("entropy_normalised", "-", "entropy"),
            ("entropy_non_sink", "--", "non-sink entropy"),
        ):
            values = data[name].sel(query_set="second_half").mean("head")
            axes[0, 1].plot(
                x, values, style, marker="o", color=colour_of(at), label=label if at == 0 else None
            )
        for name in ("l_in", "l_out"):
            if np.isfinite(data[name]):
                place = float(x[np.flatnonzero(data.layer.values == int(data[name]))[0]])
                if several:
                    axes[0, 0].axvline(place, color=colour_of(at), lw=0.8, ls=(0, (4, 2)))
                else:
                    mark_text(axes[0, 0], place, f"{name} = {int(data[name])}")
    label = "layer / n_layer" if several else "layer"
    title = "first-token share" + (", second half (lines: l_in, l_out)" if several else "")
    axes[0, 0].set(title=title, ylabel="mean share", xlabel=label, ylim=(0, None))
    axes[0, 1].set(
        title="entropy / its largest, second half", ylabel="mean", xlabel=label, ylim=(0, 1.03)
    )
    legend(axes[0, 0], loc="best")
    legend(axes[0, 1], loc="lower left")
    letter(axes)
    return figure


def received(runs: Sequence[RunResults]) -> Any:
    """Draw the attention that each key receives by layer, and how often a key is a sink."""
    figure, axes = make_figure(len(runs), 2, height=HEIGHT * len(runs))
    for row, run in zip(axes, runs, strict=True):
        data = run.results["sinks"]
        key = np.arange(data.sizes["key"]) + 1
        kept = ~data.few_rows.values if not data.few_rows.all() else np.ones(len(key), bool)
        mean = data.received.mean("head").values
        rate = data.sink_rate.mean("head").values
        for i, layer in enumerate(data.layer.values):
            ends = i in (0, len(mean) // 2, len(mean) - 1)
            colour = shade_of(data.layer_fraction.values[i])
            row[0].plot(
                key[kept],
                mean[i][kept],
                color=colour,
                lw=1.1,
                label=f"layer {layer}" if ends else None,
            )
            row[1].plot(key[kept], rate[i][kept], color=colour, lw=1.1)
        name = f"{run.label}: " if len(runs) > 1 else ""
        row[0].set(
            xscale="log",
            yscale="log",
            xlabel="key (1 = first)",
            ylabel="α_k, mean mass per row",
            title=f"{name}attention received",
        )
        epsilon = _argument(data, "epsilon")
        row[1].set(
            xscale="log",
            xlabel="key (1 = first)",
            ylabel="share of heads and sequences",
            title=f"{name}sink rate, α_k > {epsilon}",
        )
        legend(row[0])
    letter(axes)
    return figure


def words(runs: Sequence[RunResults]) -> Any:
    """Draw word share by layer and head."""
    figure, axes = make_figure(1, len(runs), height=HEIGHT)
    for axis, run in zip(axes[0], runs, strict=True):
        data = run.results["sinks"]
        with np.errstate(divide="ignore"):
            heat(figure, axis, np.log2(data.attn_word.values), "log₂ of the ratio", diverging=True)
        number_ticks(axis, "x", data["head"].values)
        number_ticks(axis, "y", data.layer.values)
        axis.set(xlabel="head", ylabel="layer", title=f"{run.label}: mass on the query's own word")
    return figure


def false_sinks(runs: Sequence[RunResults]) -> Any:
    """Draw how the norm of repeated tokens compares with that of the first position, over depth."""
    figure, axes = make_figure(1, 2)
    data = runs[0].results["false_sinks"]
    x = np.arange(data.sizes["depth"])
    for i, start in enumerate(data.start.values):
        for j, length in enumerate(data.length.values):
            one = data.sel(start=start, length=length)
            style = ("-", "--")[i]
            name = "no <bos>" if start == "token" else "<bos> in front"
            axes[0, 0].plot(
                x,
                one.norm_ratio.mean("repeated"),
                style,
                marker="o",
                color=colour_of(j),
                label=f"{length} × one token, {name}",
            )
            axes[0, 1].plot(
                np.arange(data.sizes["layer"]),
                one.first_token_share.mean("repeated"),
                style,
                marker="o",
                color=colour_of(j),
            )
            axes[0, 1].plot(
                np.arange(data.sizes["layer"]),
                one.control_first_token_share,
                ":",
                color=colour_of(j),
                lw=1.0,
            )
    control = data.control_norm_ratio.mean(("start", "length"))
    spread = data.control_norm_ratio_spread.max(("start", "length"))
    axes[0, 0].plot(x, control, ":", color="black", label="different tokens ± sd")
    axes[0, 0].fill_between(x, control - spread, control + spread, color="black", alpha=0.1, lw=0)
    axes[0, 0].set(
        title="norm of the others over that of the first",
        xlabel="depth",
        ylabel="mean ratio",
        ylim=(0, None),
    )
    axes[0, 1].set(
        title="first-token share (dotted: different tokens)",
        xlabel="layer",
        ylabel="mean share",
        ylim=(0, None),
    )
    legend(axes[0, 0], fontsize=6, loc="best")
    letter(axes)
    return figure


def head_pairs(runs: Sequence[RunResults]) -> Any:
    """Draw τ_b between all heads of each layer, less its null; inverted pairs are marked."""
    data = runs[0].results["heads"]
    chosen = np.unique(np.linspace(0, data.sizes["layer"] - 1, MOST_LAYERS).round().astype(int))
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure, axes = make_figure(
        rows, columns, height=(WIDTH / columns) * rows, sharex=True, sharey=True
    )
    for axis in axes.ravel()[len(chosen) :]:
        axis.set_axis_off()
    for axis, layer in zip(axes.ravel(), chosen, strict=False):
        one = data.isel(layer=layer)
        values = (one.tau - one.tau_null).values.copy()
        np.fill_diagonal(values, np.nan)
        image = heat(figure, axis, values, "", -1, 1, diverging=True, bar=False)
        at = np.argwhere(one.inverted.values)
        axis.plot(at[:, 1], at[:, 0], "x", color="black", ms=5)
        number_ticks(axis, "x", one["head"].values, 8)
        number_ticks(axis, "y", one["head"].values, 8)
        axis.set_title(f"layer {int(one.layer)}")
    figure.colorbar(image, ax=axes, label="τ_b − its null (× inverted pair)", shrink=0.7)
    figure.supxlabel("head", fontsize=8)
    figure.supylabel("head", fontsize=8)
    return figure


def _argument(data: Any, name: str) -> Any:
    import json

    return json.loads(data.attrs["arguments"])[name]
