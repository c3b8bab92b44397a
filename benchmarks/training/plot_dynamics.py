"""Draw docs/training-dynamics.svg from the table that train_dynamics.py writes.

`python -m headwater.benchmarks.training.plot_dynamics`
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.plots.draw import COLOURS, finish, make_figure, render, style
from headwater.benchmarks.registry import RESULTS

OUT = Path(__file__).resolve().parents[2] / "docs" / "training-dynamics.svg"
ROWS = (("share_max", "share on the first token"), ("largest", "largest |x|"))
LABELS = {
    "none": "moments kept",
    "first": "first reset",
    "second": "second reset",
    "both": "both reset",
}
Table = dict[tuple[str, str, str], dict[int, dict[str, float]]]


def main() -> int:
    """Draw the figure."""
    table = read(RESULTS / "train-dynamics.csv")
    seeds = sorted({seed for seed, _, _ in table})
    warmup = max(w for _, reset, w in table if reset != "scratch")
    with style():
        figure, axes = make_figure(2, 3, height=4.6, sharey="row")
        columns = (
            ("from scratch", ["scratch"], None),
            ("no warm-up", LABELS, "0"),
            ("warm-up", LABELS, warmup),
        )
        for at, (title, resets, w) in enumerate(columns):
            for row, (column, label) in enumerate(ROWS):
                axis = axes[row, at]
                axis.set_title(f"{'abcdef'[3 * row + at]}  {title}")
                if at == 0:
                    axis.set_ylabel(label)
                draw(axis, table, seeds, resets, w, column)
            axes[1, at].set_xlabel("step" if at == 0 else "steps after the reset")
        axes[0, 1].legend(loc="lower right")
    OUT.write_bytes(render(finish(figure), "svg"))
    print(OUT)
    return 0


def read(path: Path) -> Table:
    """Return the values of every step by seed, reset and warm-up."""
    table: Table = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            steps = table.setdefault((row["seed"], row["reset"], row["warmup"]), {})
            steps[int(row["step"])] = {name: float(row[name]) for name, _ in ROWS}
    return table


def draw(
    axis: Any,
    table: Table,
    seeds: list[str],
    resets: Iterable[str],
    warmup: str | None,
    column: str,
) -> None:
    """Draw the mean over seeds of one column, and its range, for each reset."""
    for at, reset in enumerate(resets):
        chosen = [
            next(
                v
                for (s, r, w), v in table.items()
                if s == seed and r == reset and warmup in (None, w)
            )
            for seed in seeds
        ]
        steps = sorted(chosen[0])
        values = np.array([[one[step][column] for step in steps] for one in chosen])
        colour = COLOURS[at]
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        axis.plot(steps, values.mean(0), color=colour, label=LABELS.get(reset))


if __name__ == "__main__":
    sys.exit(main())
