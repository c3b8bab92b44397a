"""Draw the figures that the kept results of runs allow, and write them to files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.analysis.engine.analysis import Plot, Shown
from headwater.analysis.engine.results import RunResults
from headwater.analysis.plots.draw import finish, render, style
from headwater.analysis.suite.registry import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("png", "svg", "pdf")
PER_FIGURE = 6


@dataclass(frozen=True)
class Drawn:
    """A figure that was drawn: what it shows, its plot, the labels of its runs, and itself."""

    kind: type[Shown]
    plot: Plot
    labels: tuple[str, ...]
    figure: Figure

    @property
    def name(self) -> str:
        """A name for a file."""
        return self.plot.name if self.plot.together else f"{self.plot.name}-{self.labels[0]}"


def draw(runs: Sequence[RunResults], names: Iterable[str] = ()) -> list[Drawn]:
    """Draw the named figures (all, where none is named) that the runs' results allow.

    A figure that several runs can share has at most PER_FIGURE of them on its axes; others are drawn run by run.
    Raises ValueError for a name that is not known, or where no figure can be drawn.
    """
    known = {plot.name: (kind, plot) for kind, plot in plots()}
    names = list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no plot {unknown[0]!r}; expected some of {', '.join(known)}.")
    chosen = [known[name] for name in names or known]
    drawn = []
    for kind, plot in chosen:
        there = [run for run in runs if holds(run, kind, plot)]
        size = PER_FIGURE if plot.together else 1
        for at in range(0, len(there), size):
            group = there[at : at + size]
            labels = tuple(run.label for run in group)
            drawn.append(Drawn(kind, plot, labels, draw_one(plot, group)))
    if not drawn:
        wanted = sorted({kind.name for kind, _ in chosen})
        raise ValueError(
            f"no result to draw. Make some with `headwater analyze RUN {' '.join(wanted)}`."
        )
    return drawn


def holds(run: RunResults, kind: type[Shown], plot: Plot) -> bool:
    """Say whether a run has the result that a figure shows, with the variable that it needs."""
    result = run.results.get(kind.name)
    return result is not None and (not plot.variable or plot.variable in result)


def draw_one(plot: Plot, runs: Sequence[RunResults]) -> Figure:
    """Draw a figure for runs that hold the result; ValueError without matplotlib."""
    function = plot.function
    with style():
        figure: Figure = finish(function(runs))
        return figure


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
        path.write_bytes(render(one.figure, kind, dpi))
        paths.append(path)
    return paths
