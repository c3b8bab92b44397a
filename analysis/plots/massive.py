"""Figures of massive activations: how they rise and fall over depth, and which components and neurons make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater.analysis.engine.results import RunResults
from headwater.analysis.measures.massive import massive_dimensions
from headwater.analysis.plots.draw import HEIGHT, colour_of, legend, letter, make_figure

MOST_DIMENSIONS = 4
MOST_NEURONS = 12


def massive_depth(runs: Sequence[RunResults]) -> Any:
    """Draw the largest |x| at first positions and elsewhere, the median, and the largest dimensions over depth."""
    figure, axes = make_figure(1, 2)
    several = len(runs) > 1
    for at, run in enumerate(runs):
        data = run.results["massive"]
        lead = str(data.max_size.dims[-1])
        x = data[f"{lead}_fraction"].values if several else data[lead].values
        for positions, style, name in (
            ("first", "-", "first position"),
            ("rest", "--", "elsewhere"),
        ):
            axes[0, 0].plot(
                x,
                data.max_size.sel(positions=positions),
                style,
                marker="o",
                color=colour_of(at),
                label=f"{run.label}, {name}" if several else f"largest |x|, {name}",
            )
        axes[0, 0].plot(
            x, data["median"], ":", color=colour_of(at), label=None if several else "median |x|"
        )
        ratio = data.largest_ratio.max("positions").values
        found = massive_dimensions(data)[:MOST_DIMENSIONS] or [int(ratio.max(0).argmax())]
        if several:
            axes[0, 1].plot(x, ratio.max(1), marker="o", color=colour_of(at), label=run.label)
        else:
            for i, dimension in enumerate(found):
                axes[0, 1].plot(
                    x,
                    ratio[:, dimension],
                    marker="o",
                    color=colour_of(i),
                    label=f"dimension {dimension}",
                )
    for level, name in ((100, "large"), (1000, "strict")):
        axes[0, 1].axhline(level, color="#666666", lw=0.8, ls=(0, (4, 2)))
        axes[0, 1].annotate(
            name,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            ha="right",
            textcoords="offset points",
            fontsize=7,
            color="#444444",
        )
    label = f"{lead} / n_layer" if several else lead
    axes[0, 0].set(
        title="largest activations (dotted: median)", ylabel="|x|", xlabel=label, yscale="log"
    )
    axes[0, 1].set(
        title="largest |x| over the median |x| of its sequence",
        ylabel="ratio",
        xlabel=label,
        yscale="log",
    )
    legend(axes[0, 0], fontsize=6.5, loc="lower right")
    legend(axes[0, 1], fontsize=6.5, loc="best")
    letter(axes)
    return figure


def massive_made(runs: Sequence[RunResults]) -> Any:
    """Draw what attention and MLP of every layer add to the largest massive activation, and the neurons that do."""
    figure, axes = make_figure(len(runs), 2, height=1.1 * HEIGHT * len(runs))
    for row, run in zip(axes, runs, strict=True):
        data = run.results["massive_origin"].isel(event=0)
        layer = data.layer.values
        row[0].bar(layer - 0.2, data.attn_out, 0.4, color=colour_of(0), label="attention")
        row[0].bar(layer + 0.2, data.mlp_out, 0.4, color=colour_of(1), label="MLP")
        row[0].plot(
            data.depth.values - 0.5,
            data.resid,
            color="black",
            marker="o",
            lw=1.0,
            label="residual stream",
        )
        row[0].axhline(0, color="black", lw=0.6)
        name = f"{run.label}: " if len(runs) > 1 else ""
        row[0].set(
            xlabel="layer",
            ylabel=f"added to dimension {int(data.dimension)}",
            xticks=layer,
            title=f"{name}dimension {int(data.dimension)} at position {int(data.position)}",
        )
        legend(row[0])
        part = data.neuron_contribution.values
        order = np.argsort(-np.abs(part), axis=None)[:MOST_NEURONS]
        where, rank = np.unravel_index(order, part.shape)
        labels = [
            f"L{layer[i]} N{int(data.neuron[i, j])}" for i, j in zip(where, rank, strict=True)
        ]
        place = np.arange(len(order))[::-1]
        row[1].barh(place, part[where, rank], color=[colour_of(int(i)) for i in where], height=0.7)
        row[1].set_yticks(place, labels, fontsize=6.5)
        row[1].axvline(0, color="black", lw=0.6)
        row[1].set(
            xlabel="activation × weight",
            title=f"{name}the {len(order)} largest neurons (colour: layer)",
        )
        row[1].grid(axis="y", visible=False)
    letter(axes)
    return figure
