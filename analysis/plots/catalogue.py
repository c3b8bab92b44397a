"""The figures by name: what each shows, which results it needs, and the function that draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from headwater.analysis.engine.results import RunResults
from headwater.analysis.suite import figures

KINDS = ("png", "svg", "pdf")
PER_FIGURE = 6


@dataclass(frozen=True)
class Plot:
    """A figure. `needs` are analyses; `draw` names its function; `together` says whether several runs share it;
    `variable` must be in the result of the first analysis."""

    name: str
    needs: tuple[str, ...]
    caption: str
    draw: str
    together: bool = True
    variable: str = ""

    def figure(self, runs: Sequence[RunResults]) -> Any:
        """Draw it for runs that hold the results; ValueError without matplotlib."""
        module, _, name = self.draw.partition(":")
        function: Callable[[Sequence[RunResults]], Any] = getattr(
            import_module(f"headwater.analysis.plots.{module}"), name
        )
        with figures.style():
            return figures.finish(function(runs))

    def holds(self, run: RunResults) -> bool:
        """Say whether a run has the results that the figure needs."""
        there = set(self.needs) <= set(run.results)
        return there and (not self.variable or self.variable in run.results[self.needs[0]])


PLOTS = (
    Plot(
        "phases",
        ("cosine",),
        "How the stream changes from each depth to the next (cosine, CKA), and its norm and "
        "anisotropy at each depth.",
        "stream:phases",
    ),
    Plot(
        "depth_cosine",
        ("cosine",),
        "Mean cosine of every token's residual stream between two depths.",
        "stream:depth_cosine",
        together=False,
    ),
    Plot(
        "norms",
        ("norms",),
        "The norm of the stream, and its cosine and growth from each depth to the next.",
        "stream:norms",
    ),
    Plot(
        "block_influence",
        ("cosine",),
        "How far each layer turns the stream (ShortGPT's BI where raw).",
        "stream:block_influence",
    ),
    Plot(
        "spectra",
        ("svd",),
        "Singular values of the stream at every depth; dark: early, light: late.",
        "stream:spectra",
        together=False,
    ),
    Plot(
        "dimensions",
        ("svd",),
        "How many dimensions the stream uses, with and without first positions.",
        "stream:dimensions",
    ),
    Plot(
        "sink_layers",
        ("sinks",),
        "Mass on the first key by layer, the transition, and how evenly the rest lies.",
        "attention:sink_layers",
    ),
    Plot(
        "sink_map",
        ("sinks",),
        "Mass on the first key, second-half queries, head by head.",
        "attention:sink_map",
        together=False,
    ),
    Plot(
        "received",
        ("sinks",),
        "What every key receives; keys that fewer than 16 rows see are left out. Dark: early "
        "layers, light: late.",
        "attention:received",
        together=False,
    ),
    Plot(
        "words",
        ("sinks",),
        "Mass on earlier tokens of the query's own word over that on other keys at the same "
        "distances; above 0: more.",
        "attention:words",
        together=False,
        variable="attn_word",
    ),
    Plot(
        "false_sinks",
        ("false_sinks",),
        "One token repeated: norms of the others over that of the first, and attention on the first; "
        "beside rows of different tokens.",
        "attention:false_sinks",
        together=False,
    ),
    Plot(
        "massive_depth",
        ("massive",),
        "The largest activations over depth, and their ratio to the median.",
        "massive:massive_depth",
    ),
    Plot(
        "massive_made",
        ("massive_origin",),
        "Which components and neurons add to the largest of these activations; the sums are exact.",
        "massive:massive_made",
        together=False,
    ),
    Plot(
        "lens",
        ("lens",),
        "What each depth predicts when it is read as if it were the last.",
        "output:lens",
    ),
    Plot(
        "attribution",
        ("attribution",),
        "Direct contributions to the logit of the next token, less the vocabulary's "
        "mean; the sums are exact.",
        "output:attribution",
        together=False,
    ),
    Plot(
        "head_pairs",
        ("heads",),
        "Kendall's τ_b between the orders in which two heads rank the same keys.",
        "attention:head_pairs",
        together=False,
    ),
    Plot(
        "coherence",
        ("coherence",),
        "Fraction of the weights' SVD directions whose top tokens stand near each other "
        "in the corpus; bands: bootstrap.",
        "output:coherence",
        together=False,
    ),
    Plot(
        "weight_spectra",
        ("weights",),
        "Singular values of the weights by layer; dark: early, light: late.",
        "output:weight_spectra",
        together=False,
    ),
    Plot(
        "plateau_map",
        ("plateau",),
        "How wide the flat parts at both ends of the path are, by depth of the "
        "state that is moved.",
        "interventions:plateau_map",
        together=False,
    ),
    Plot(
        "plateau_curves",
        ("plateau",),
        "How far the output has gone along the path between two states, pair by pair.",
        "interventions:plateau_curves",
        together=False,
    ),
    Plot(
        "plateau_parts",
        ("plateau_parts",),
        "The width of plateaus when a part of the model is frozen or made linear.",
        "interventions:plateau_parts",
        together=False,
    ),
    Plot(
        "plateau_heads",
        ("plateau_heads",),
        "Which heads change along the path, split into pattern, values and both.",
        "interventions:plateau_heads",
        together=False,
    ),
    Plot(
        "saturation",
        ("plateau_heads",),
        "One head along the path: scores, pattern and output; the head whose pattern moves most.",
        "interventions:saturation",
        together=False,
    ),
    Plot(
        "jacobian",
        ("plateau_jacobian",),
        "How sensitive the output is to the state that is moved, along the path.",
        "interventions:jacobian",
        together=False,
    ),
    Plot(
        "patching",
        ("patch",),
        "Share of the clean logit difference that each place restores.",
        "interventions:patching",
        together=False,
    ),
    Plot(
        "ablation",
        ("ablate",),
        "Loss, attention on the first token and norms over the scale of the target.",
        "interventions:ablation",
        together=False,
    ),
    Plot(
        "ablation_heads",
        ("ablate",),
        "Derivative of each head's first-token share by the scale, and its "
        "share without the target.",
        "interventions:ablation_heads",
        together=False,
    ),
    Plot(
        "effects",
        ("effects",),
        "What the loss loses without each head and MLP, directly and in total.",
        "interventions:effects",
        together=False,
    ),
    Plot(
        "repeated",
        ("repeated",),
        "One token repeated: attention and norms of the first layers.",
        "interventions:repeated",
        together=False,
    ),
)


@dataclass(frozen=True)
class Drawn:
    """A figure that was drawn: its plot, the labels of its runs, and itself."""

    plot: Plot
    labels: tuple[str, ...]
    figure: Any

    @property
    def name(self) -> str:
        """A name for a file."""
        return self.plot.name if self.plot.together else f"{self.plot.name}-{self.labels[0]}"


def draw(runs: Sequence[RunResults], names: Iterable[str] = ()) -> list[Drawn]:
    """Draw the named figures (all, where none is named) that the runs' results allow.

    A figure that several runs can share has at most PER_FIGURE of them on its axes; others are drawn run by run.
    Raises ValueError for a name that is not known, or where no figure can be drawn.
    """
    known = {plot.name: plot for plot in PLOTS}
    names = list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no plot {unknown[0]!r}; expected some of {', '.join(known)}.")
    drawn = []
    for plot in [known[name] for name in names] or PLOTS:
        there = [run for run in runs if plot.holds(run)]
        size = PER_FIGURE if plot.together else 1
        groups = [there[at : at + size] for at in range(0, len(there), size)]
        drawn += [
            Drawn(plot, tuple(run.label for run in group), plot.figure(group)) for group in groups
        ]
    if not drawn:
        wanted = sorted(
            {need for plot in ([known[name] for name in names] or PLOTS) for need in plot.needs}
        )
        raise ValueError(
            f"no result to draw. Make some with `headwater analyze RUN {' '.join(wanted)}`."
        )
    return drawn


def save_figures(
    drawn: Iterable[Drawn], folder: Path, kind: str = "png", dpi: int = 150
) -> list[Path]:
    """Write figures as files of a kind (`dpi` for png); return their paths."""
    if kind not in KINDS:
        raise ValueError(f"the format is {kind!r}; expected one of {', '.join(KINDS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for one in drawn:
        path = folder / f"{one.name}.{kind}"
        if path in paths:
            path = folder / f"{one.name}-{len(paths)}.{kind}"
        path.write_bytes(figures.render(one.figure, kind, dpi))
        paths.append(path)
    return paths
