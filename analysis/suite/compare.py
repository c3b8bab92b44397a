"""Compare runs: model sizes over depth_fraction, checkpoints of one training over its steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater.analysis.engine.results import RunResults
from headwater.analysis.suite.registry import summarise

AXES = ("depth_fraction", "layer_fraction", "step_fraction")
CONVENTIONS = (
    "One run after another along `run`. Values over depth or layer keep their own depth_fraction or layer_fraction; "
    "on_grid gives them at common fractions, by linear interpolation. step is the training step that was given, or "
    "that of a name such as step-1000, checkpoint-1000 or ckpt-1000 of the run or its model; −1: none."
)
STEP = re.compile(r"(?:^|[^a-z])(?:step|checkpoint|ckpt|iter)s?[-_=.]?(\d+)", re.IGNORECASE)


def compare(
    runs: Sequence[RunResults],
    name: str,
    variable: str,
    steps: Sequence[int] | None = None,
    n_grid: int = 0,
    **chosen: Any,
) -> Any:
    """Put one variable of one analysis of several runs side by side; return a dataset by run.

    `chosen` selects along the other dimensions (query_set="second_half"); what is left beside depth or layer (heads) is
    averaged. Values are [run, index], NaN past a run's own depths, with `fraction` of the same shape; `n_grid` adds
    `on_grid` [run, grid]. Raises ValueError where a run lacks the result or the variable is not over depth.
    """
    import xarray

    rows = []
    fractions = []
    for run in runs:
        if name not in run.results:
            raise ValueError(
                f"{run.label} has no {name}. Make it with `headwater analyze {run.path} {name}`."
            )
        data = run.results[name]
        if variable not in data:
            raise ValueError(
                f"{name} has no {variable!r}; expected one of {', '.join(data.data_vars)}."
            )
        one = data[variable].sel(chosen)
        along = [
            axis for axis in AXES if axis in one.coords and one.coords[axis].dims[0] in one.dims
        ]
        if not along:
            raise ValueError(
                f"{variable} of {name} has dimensions {one.dims}, so it can't be put over depth."
            )
        dim = one.coords[along[0]].dims[0]
        rows.append(one.mean([d for d in one.dims if d != dim]).values.astype(np.float64))
        fractions.append(one.coords[along[0]].values.astype(np.float64))
    n = max(map(len, rows))
    padded = [
        np.stack([np.pad(r, (0, n - len(r)), constant_values=np.nan) for r in part])
        for part in (rows, fractions)
    ]
    data = {"value": (("run", "index"), padded[0]), "fraction": (("run", "index"), padded[1])}
    coords: dict[str, Any] = {
        "run": [run.label for run in runs],
        "step": ("run", steps_of(runs, steps)),
    }
    if n_grid:
        grid = np.linspace(0, 1, n_grid)
        inside = [
            np.interp(grid, f, r, left=np.nan, right=np.nan)
            for f, r in zip(fractions, rows, strict=True)
        ]
        data["on_grid"], coords["grid"] = (("run", "grid"), np.stack(inside)), grid
    attributes = {
        "analysis": "compare",
        "of": name,
        "variable": variable,
        "conventions": CONVENTIONS,
        "fingerprints": [run.results[name].attrs.get("fingerprint", "") for run in runs],
    }
    return xarray.Dataset(data, coords, attributes)


def steps_of(runs: Sequence[RunResults], steps: Sequence[int] | None = None) -> np.ndarray:
    """Return the training step of each run: as given, or that of a label or model such as step-1000; −1 for none."""
    if steps is not None:
        if len(steps) != len(runs):
            raise ValueError(
                f"{len(steps)} steps are given for {len(runs)} runs; expected one for each."
            )
        return np.array(steps)
    found = []
    for run in runs:
        model = str(next(iter(run.results.values())).attrs.get("model", "")) if run.results else ""
        named = (STEP.search(text.rstrip("/").rpartition("/")[2]) for text in (run.label, model))
        found.append(next((int(match[1]) for match in named if match), -1))
    return np.array(found)


def side_by_side(
    runs: Sequence[RunResults], steps: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """List the headline figures of several runs: one row a figure, with its analysis, label, and one value a run.

    Runs are in the order of their training steps, which come first, where all have one; else as given.
    """
    at = steps_of(runs, steps)
    rows: list[dict[str, Any]] = []
    if (at >= 0).all():
        order = np.argsort(at, kind="stable")
        runs = [runs[i] for i in order]
        own = {run.label: int(step) for run, step in zip(runs, at[order], strict=True)}
        rows.append({"analysis": "", "figure": "training step", "values": own})
    names = [name for name in runs[0].results if all(name in run.results for run in runs)]
    for name in names:
        figures = [summarise(name, run.results[name]) for run in runs]
        for label in figures[0]:
            values = {run.label: f.get(label) for run, f in zip(runs, figures, strict=True)}
            rows.append({"analysis": name, "figure": label, "values": values})
    return rows
