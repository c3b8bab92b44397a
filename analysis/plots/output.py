"""Figures of what depths and components say about the output: logit lens and direct logit attribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Figures, Plot, Shown, rounded, rounded_one
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

if TYPE_CHECKING:
    import xarray


class Weights(Shown):
    """The singular values and directions of a model's weights."""

    name = "weights"
    section = "The weights"
    plots = (
        Plot(
            "weight_spectra",
            "Singular values of the weights by layer; dark: early, light: late.",
            "headwater.analysis.plots.output:weight_spectra",
            together=False,
        ),
    )

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the largest singular values by layer."""
        return {
            "w_out_sigma_1": rounded(result.w_out_sigma.values[:, 0]),
            "ov_sigma_1": rounded(result.ov_sigma[:, :, 0].max("head")),
        }


class Coherence(Shown):
    """How near the top tokens of the weights' directions stand in a corpus."""

    name = "coherence"
    section = "The weights"
    plots = (
        Plot(
            "coherence",
            "Fraction of the weights' SVD directions whose top tokens stand near each other "
            "in the corpus; bands: bootstrap.",
            "headwater.analysis.plots.output:coherence",
            together=False,
        ),
    )

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the share of coherent directions by kind, and how it changes at the transition."""
        names = [str(kind) for kind in result.kind.values]
        coherent = result.coherent_fraction
        scored = result.n_scored.sum("layer") / result.n_directions.sum("layer")
        figures: Figures = {f"{kind}_coherent": rounded(coherent.sel(kind=kind)) for kind in names}
        for kind in names:
            figures[f"{kind}_with_a_score"] = rounded_one(scored.sel(kind=kind))
        if not np.isfinite(result.l_in):
            return figures
        for kind in names:
            one = result.sel(kind=kind)
            figures[f"{kind}_after_minus_before"] = rounded_one(one.difference)
            figures[f"{kind}_beyond_a_line"] = rounded_one(one.difference_beyond_line)
            figures[f"{kind}_p"] = rounded_one(one.difference_p)
        return figures


def lens(runs: Sequence[RunResults]) -> Any:
    """Draw KL to the output, agreement with it, rank and loss of the next token over depth_fraction."""
    figure, axes = make_figure(2, 2, height=1.8 * HEIGHT, sharex=True)
    for at, run in enumerate(runs):
        data = run.results["lens"].isel(position_set=0)
        x = data.depth_fraction.values
        colour = colour_of(at)
        axes[0, 0].plot(x, data.kl, marker="o", color=colour, label=run.label)
        axes[0, 1].plot(
            x, data.top1_agreement, marker="o", color=colour, label="top 1" if at == 0 else None
        )
        axes[0, 1].plot(
            x,
            data.top_k_agreement,
            "--",
            marker="o",
            color=colour,
            label="top k" if at == 0 else None,
        )
        axes[1, 0].plot(x, data.target_rank + 1, marker="o", color=colour)
        axes[1, 1].plot(x, data.loss, marker="o", color=colour, label="loss" if at == 0 else None)
        axes[1, 1].plot(
            x, data.entropy, "--", marker="o", color=colour, label="entropy" if at == 0 else None
        )
    axes[0, 0].set(title="KL(output ‖ depth)", ylabel="nats", yscale="symlog", ylim=(0, None))
    axes[0, 1].set(title="agreement with the output", ylabel="share of tokens", ylim=(-0.03, 1.03))
    axes[1, 0].set(
        title="mean rank of the next token", ylabel="rank", xlabel="depth / n_layer", yscale="log"
    )
    axes[1, 1].set(
        title="loss and entropy read at a depth",
        ylabel="nats",
        xlabel="depth / n_layer",
        xlim=(-0.03, 1.03),
    )
    if len(runs) > 1:
        legend(axes[0, 0])
    legend(axes[0, 1], loc="upper left")
    legend(axes[1, 1])
    letter(axes)
    return figure


def attribution(runs: Sequence[RunResults]) -> Any:
    """Draw direct contributions to the next token's logit: heads as a map, MLPs and the rest as bars."""
    figure, axes = make_figure(len(runs), 2, height=HEIGHT * len(runs))
    for row, run in zip(axes, runs, strict=True):
        data = run.results["attribution"].isel(position_set=0)
        layer = data.layer.values
        heat(figure, row[0], data.head_contribution, "logits", diverging=True)
        number_ticks(row[0], "x", data["head"].values)
        number_ticks(row[0], "y", layer)
        name = f"{run.label}: " if len(runs) > 1 else ""
        row[0].set(xlabel="head", ylabel="layer", title=f"{name}heads")
        attention = data.head_contribution.sum("head") + data.attn_bias
        ticks = ["tok", "pos", *map(str, layer), "bias"]
        place = np.arange(len(ticks))
        inner = place[2:-1]
        row[1].bar(inner - 0.2, attention, 0.4, color=colour_of(0), label="attention")
        row[1].bar(inner + 0.2, data.mlp, 0.4, color=colour_of(1), label="MLP")
        rest = [float(data[what]) for what in ("token_embedding", "position_embedding", "constant")]
        row[1].bar([0, 1, place[-1]], rest, 0.6, color="#777777")
        row[1].axhline(0, color="black", lw=0.6)
        row[1].set(
            xlabel="embeddings, layers, ln_f bias",
            ylabel="logits",
            title=f"{name}mean logit {float(data.logit):.2f} above the vocabulary's",
        )
        step = max(len(layer) // 12, 1)
        shown = [0, 1, *inner[::step], place[-1]]
        row[1].set_xticks(shown, [ticks[i] for i in shown], fontsize=7)
        legend(row[1])
    letter(axes)
    return figure


def coherence(runs: Sequence[RunResults]) -> Any:
    """Draw the coherent fraction of each kind of direction by layer, with bootstrap bands, beside the transition."""
    data = runs[0].results["coherence"]
    beside = "first_token_share" in data
    figure, axes = make_figure(1, 3 if beside else 2)
    highest = float(data.band_high.max())  # NaN where no direction has a score
    x = data.layer_fraction.values
    top = 1.1 * highest if np.isfinite(highest) else 0.0
    unscored: list[str] = []
    for at, kind in enumerate(data.kind.values):
        axis = axes[0, int(str(kind).startswith("w_"))]
        one = data.sel(kind=kind)
        if not np.isfinite(one.coherent_fraction).any():
            unscored.append(str(kind))
            continue
        axis.plot(x, one.coherent_fraction, marker="o", color=colour_of(at), label=str(kind))
        axis.fill_between(x, one.band_low, one.band_high, color=colour_of(at), alpha=0.15, lw=0)
    for axis, title in zip(axes[0], ("OV and QK circuits", "W_in and W_out"), strict=False):
        axis.axhline(0.01, color="#666666", lw=0.8, ls=(0, (4, 2)), label="chance")
        if np.isfinite(data.random_fraction).any():
            random = float(data.random_fraction.max())
            axis.axhline(random, color="#666666", lw=0.8, ls=":", label="random directions")
        axis.set(ylim=(0, max(1.35 * top, 0.02)), title=title, ylabel="coherent fraction")
    if beside:
        axes[0, 2].plot(
            x,
            data.first_token_share.mean("head"),
            marker="o",
            color=colour_of(0),
            label="mean over heads",
        )
        axes[0, 2].set(ylim=(0, 1), title="first-token share", ylabel="mean, second half")
    if unscored:
        figure.supxlabel(f"too few pairs in the corpus: {', '.join(unscored)}", fontsize=7)
    l_in = int(data.l_in) if np.isfinite(data.l_in) else 0
    for axis in axes[0]:
        axis.set(xlabel="layer / n_layer")
        if l_in > 0:
            axis.axvline(
                l_in / len(x), color="#444444", lw=1, ls=":", label=f"transition, layer {l_in}"
            )
        legend(axis, fontsize=6, ncols=2, loc="upper left")
    letter(axes)
    return figure


def weight_spectra(runs: Sequence[RunResults]) -> Any:
    """Draw the singular values of every layer's OV circuits (mean over heads), QK circuits, W_in and W_out."""
    figure, axes = make_figure(2, 2, height=1.8 * HEIGHT)
    data = runs[0].results["weights"]
    sets = (
        ("OV circuits, mean over heads", data.ov_sigma.mean("head")),
        ("QK circuits, mean over heads", data.qk_sigma.mean("head")),
        ("W_in, raw", data.w_in_sigma.sel(fold="raw")),
        ("W_out", data.w_out_sigma),
    )
    for axis, (title, sigma) in zip(axes.ravel(), sets, strict=True):
        for i, values in enumerate(sigma.values):
            ends = i in (0, len(sigma) // 2, len(sigma) - 1)
            axis.plot(
                np.arange(1, len(values) + 1),
                values,
                color=shade_of(data.layer_fraction.values[i]),
                lw=1.1,
                label=f"layer {i}" if ends else None,
            )
        axis.set(title=title, xscale="log", yscale="log", xlabel="component", ylabel="σ")
        axis.set_ylim(max(float(sigma.min()), float(sigma.max()) * 1e-4), None)
    legend(axes[0, 0])
    letter(axes)
    return figure
