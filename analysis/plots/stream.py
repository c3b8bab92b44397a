"""Figures of the residual stream: similarity of depths, the three phases, spectra and dimensions."""

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
    number_ticks,
    shade_of,
)

VARIANTS = (
    {"centring": "raw", "positions": "all", "outliers": "in"},
    {"centring": "centred", "positions": "without_first", "outliers": "out"},
)
NAMES = ("raw, every position", "centred, without first\npositions and outliers")
SHORT = ("raw", "centred, without first and outliers")


def depth_cosine(runs: Sequence[RunResults]) -> Any:
    """Draw depth × depth cosine, raw and in the strictest variant, a row of panels for each run."""
    figure, axes = make_figure(len(runs), 2, height=0.46 * WIDTH * len(runs))
    for row, run in zip(axes, runs, strict=True):
        data = run.results["cosine"]
        depth = data.depth.values
        for axis, variant, name in zip(row, VARIANTS, NAMES, strict=True):
            heat(figure, axis, data.cosine.sel(variant), "mean cosine", -1, 1, diverging=True)
            number_ticks(axis, "x", depth)
            number_ticks(axis, "y", depth)
            axis.set(
                xlabel="depth",
                ylabel="depth",
                title=f"{run.label}: {name}" if len(runs) > 1 else name,
            )
    letter(axes)
    return figure


def phases(runs: Sequence[RunResults]) -> Any:
    """Draw what changes between consecutive depths over depth_fraction: cosine, CKA, norm and anisotropy."""
    figure, axes = make_figure(2, 2, height=1.9 * HEIGHT, sharex=True)
    for at, run in enumerate(runs):
        data = run.results["cosine"]
        colour = colour_of(at)
        x = data.depth_fraction.values
        step = data.step_fraction.values
        for variant, name, style in zip(VARIANTS, SHORT, ("-", "--"), strict=True):
            label = f"{run.label}, {name}" if len(runs) > 1 else name
            axes[0, 0].plot(
                step, data.consecutive.sel(variant), style, marker="o", color=colour, label=label
            )
            axes[1, 1].plot(x, data.anisotropy.sel(variant), style, marker="o", color=colour)
        for positions, style in (("all", "-"), ("without_first", "--")):
            name = "all positions" if positions == "all" else "without first"
            if "cka" in run.results:
                cka = np.diagonal(run.results["cka"].cka.sel(positions=positions).values, 1)
                axes[0, 1].plot(
                    step, cka, style, marker="o", color=colour, label=name if at == 0 else None
                )
            axes[1, 0].plot(x, data.norm.sel(positions=positions), style, marker="o", color=colour)
    axes[0, 0].set(title="cosine with the depth before", ylabel="mean cosine")
    axes[0, 1].set(title="linear CKA with the depth before", ylabel="CKA", ylim=(None, 1.03))
    axes[1, 0].set(title="norm", ylabel="mean ‖x‖", xlabel="depth / n_layer", yscale="log")
    axes[1, 1].set(
        title="anisotropy",
        ylabel="mean cosine of two tokens",
        xlabel="depth / n_layer",
        xlim=(-0.03, 1.03),
    )
    for axis in axes[0]:
        legend(axis, loc="lower right", fontsize=6.5)
    letter(axes)
    return figure


def norms(runs: Sequence[RunResults]) -> Any:
    """Draw norm, cosine of consecutive depths and growth of the norm over depth_fraction, first positions in or out."""
    figure, axes = make_figure(1, 3)
    for at, run in enumerate(runs):
        data = run.results["norms"]
        colour = colour_of(at)
        depth = data.depth_fraction.values
        step = data.step_fraction.values
        for positions, style, name in (
            ("all", "-", "all positions"),
            ("without_first", "--", "without first"),
        ):
            one = data.sel(positions=positions)
            label = f"{run.label}, {name}" if len(runs) > 1 else name
            parts = ((depth, one.norm), (step, one.consecutive), (step, one.norm_growth))
            for axis, (x, values) in zip(axes[0], parts, strict=True):
                axis.plot(x, values, style, marker="o", color=colour, label=label)
    axes[0, 0].set(title="norm", ylabel="mean ‖x‖", yscale="log")
    axes[0, 1].set(title="cosine with the depth before", ylabel="mean cosine")
    axes[0, 2].set(
        title="growth of the norm", ylabel="‖x‖ over that of the depth before", yscale="log"
    )
    for axis in axes[0]:
        axis.set(xlabel="depth / n_layer", xlim=(-0.03, 1.03))
    legend(axes[0, 1], fontsize=6.5)
    letter(axes)
    return figure


def block_influence(runs: Sequence[RunResults]) -> Any:
    """Draw how much every layer turns the stream: 1 − cosine, on a logarithmic scale, over depth_fraction."""
    figure, axes = make_figure(1, 2, sharey=True)
    for axis, variant, name in zip(axes[0], VARIANTS, SHORT, strict=True):
        for at, run in enumerate(runs):
            data = run.results["cosine"]
            axis.plot(
                data.step_fraction,
                data.block_influence.sel(variant),
                marker="o",
                color=colour_of(at),
                label=run.label,
            )
        axis.set(title=name, xlabel="depth / n_layer", yscale="log", xlim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("block influence, 1 − cosine")
    if len(runs) > 1:
        legend(axes[0, 0])
    letter(axes)
    return figure


def spectra(runs: Sequence[RunResults]) -> Any:
    """Draw singular values at every depth, relative to the largest, raw and centred without first positions."""
    figure, axes = make_figure(len(runs), 2, sharey=True, height=HEIGHT * len(runs))
    for row, run in zip(axes, runs, strict=True):
        data = run.results["svd"]
        axis_name = str(data.singular_value.dims[2])
        fraction = data[f"{axis_name}_fraction"].values
        chosen = (
            (data.centring.values[0], data.positions.values[0]),
            (data.centring.values[-1], data.positions.values[-1]),
        )
        for axis, (centring, positions) in zip(row, chosen, strict=True):
            sigma = data.singular_value.sel(centring=centring, positions=positions)
            sigma = sigma.mean("head") if "head" in sigma.dims else sigma
            for i, values in enumerate(sigma.values):
                ends = i in (0, len(sigma) // 2, len(sigma) - 1)
                label = f"{axis_name} {int(data[axis_name][i])}" if ends else None
                axis.plot(
                    np.arange(1, len(values) + 1),
                    values / max(values[0], 1e-300),
                    color=shade_of(fraction[i]),
                    lw=1.1,
                    label=label,
                )
            where = "every position" if positions == "all" else "without first positions"
            name = f"{centring}, {where}"
            axis.set(
                xscale="log",
                yscale="log",
                ylim=(1e-4, 1.5),
                xlabel="component",
                title=f"{run.label}: {name}" if len(runs) > 1 else name,
            )
        row[0].set_ylabel("σ / σ₁")
        legend(row[0], loc="lower left")
    letter(axes)
    return figure


def dimensions(runs: Sequence[RunResults]) -> Any:
    """Draw participation ratio and effective rank over depth, with and without first positions, centred."""
    figure, axes = make_figure(1, 2)
    for at, run in enumerate(runs):
        data = run.results["svd"]
        axis_name = str(data.singular_value.dims[2])
        for positions, style in zip(data.positions.values, ("-", "--"), strict=False):
            one = data.sel(centring=data.centring.values[-1], positions=positions)
            label = {"all": "all positions", "without_first": "without first"}[str(positions)]
            label = f"{run.label}, {label}" if len(runs) > 1 else label
            for axis, name in zip(axes[0], ("participation_ratio", "effective_rank"), strict=True):
                values = one[name].mean("head") if "head" in one[name].dims else one[name]
                axis.plot(
                    data[f"{axis_name}_fraction"],
                    values,
                    style,
                    marker="o",
                    color=colour_of(at),
                    label=label,
                )
    axes[0, 0].set(
        title="participation ratio (Σλ)²/Σλ², centred", ylabel="dimensions", yscale="log"
    )
    axes[0, 1].set(title="effective rank exp H(σ/Σσ), centred", ylabel="dimensions", yscale="log")
    for axis in axes[0]:
        axis.set(xlabel="depth / n_layer", xlim=(-0.03, 1.03))
    legend(axes[0, 1] if len(runs) > 1 else axes[0, 0], fontsize=6.5)
    letter(axes)
    return figure
