"""Activation plateaus: move one position's residual stream from one prompt's state to another's and watch the output.

All steps of many pairs are one batch, and only the positions from the moved one on are computed again. Shapes: P pairs,
S steps, R recomputed positions (the moved one first), D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from headwater.analysis.engine.scan import as_run
from headwater.analysis.interventions.plateau_paths import (
    BASELINES,
    PATHS,
    TAU,
    baseline_ends,
    distances,
    make_path,
    relative,
    sharpness,
    width,
)
from headwater.analysis.interventions.prompts import Pair
from headwater.analysis.interventions.replay import Point, Prompts, Replay, Switch
from headwater.kernels.cpu.workspace import Workspace
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

    from headwater.analysis.engine.results import Variables

# Rows of logits at once: 512 × 50,257 × 4 bytes are 103 MB, the largest tensor of a sweep.
ROWS = 512
CONVENTIONS = (
    "The residual stream at depth d and one position of prompt A goes from A's state to B's (the same position from "
    "the end) in A's context. distance = ‖o(α) − o_A‖/‖o_B − o_A‖, mirror the same to B, ratio = d_A/(d_A + d_B), at "
    "the last position; o_B is α = 1 in A's context. width = w_A + w_B, w_A the first α with distance > τ, w_B the "
    "same from B (a line 2τ, a step 1; less than a line's is faster near the ends, not sharper), linear between steps; "
    "sharpness = the largest slope of distance on the grid (a line 1). *_mean and *_error: over the n_pairs pairs, "
    "with the standard error. kl: KL(α = 0 ‖ α) of the next token, nats. output depth: the residual stream there; "
    "logits: after ln_f and W_U. slerp turns the direction and interpolates the norm. Baselines go from A's state as "
    "far as B is, in a random direction or in one drawn from the covariance of a run's residual stream (first "
    "positions left out)."
)


class Sweep:
    """Pairs that were run once, ready to be moved along paths; a few pairs at a time bound the memory."""

    def __init__(
        self, replay: Replay, pairs: Sequence[Pair], n_steps: int, n_last: int = 1
    ) -> None:
        if n_steps < 3:
            raise ValueError(f"--steps is {n_steps}; expected at least 3.")
        if not pairs:
            raise ValueError("there are no pairs; give at least one.")
        self.replay = replay
        self.n_last = n_last
        self.alpha = np.linspace(0, 1, n_steps)
        self.a = Prompts(replay, [pair.a for pair in pairs], n_last)
        with torch.no_grad():
            b = Prompts(replay, [pair.b for pair in pairs], n_last)
        self.b_states = [state[:, 0, 0] for state in b.states]
        self.per_call = max(ROWS // (n_steps * n_last), 1)
        self.n = len(pairs)
        self._scratch = Workspace()

    def ends(self, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two states [P, D] at a depth."""
        return self.a.states[depth][:, 0, 0], self.b_states[depth]

    def parts(self) -> Iterator[slice]:
        """Yield a few pairs at a time."""
        for first in range(0, self.n, self.per_call):
            yield slice(first, min(first + self.per_call, self.n))

    def place(self, depth: int, part: slice, path_PSD: torch.Tensor) -> torch.Tensor:
        """Put states of a path in A's place: [P, S, R, D]."""
        if self.n_last == 1:
            return path_PSD[:, :, None]
        x = self.a.states[depth][part].expand(-1, path_PSD.shape[1], -1, -1).clone()
        x[:, :, 0] = path_PSD
        return x

    def outputs(
        self,
        depth: int,
        part: slice,
        path_PSD: torch.Tensor,
        switches: frozenset[Switch] = frozenset(),
        point: Point | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Move some pairs along a path; return distance, mirror and ratio [P, output, S] and kl [P, S].

        Outputs are the depths 0 to n_layer, NaN before `depth`, then the logits.
        """
        n_layer = self.replay.config.n_layer
        n_pairs, n_steps, _ = path_PSD.shape
        found = np.full((3, n_pairs, n_layer + 2, n_steps), np.nan)

        def look(site: str, at: int, value: torch.Tensor) -> None:
            if site == "resid":
                found[:, :, at] = torch.stack(distances(value[:, :, -1])).numpy()

        with torch.no_grad():
            x = self.replay.run(
                self.place(depth, part, path_PSD),
                depth,
                prefix=self.a.before(part),
                switches=switches,
                point=point,
                look=look,
            )
            scale = None
            if point is not None and ("ln_scale", n_layer) in switches:
                scale = point.values["ln_final_scale", 0][:, :, -1]
            shape = (n_pairs, n_steps, self.replay.unembedding.shape[1])
            out = self._scratch.get("logits", shape, x.dtype)
            logits_PSV = self.replay.logits(x[:, :, -1], scale, out=out)
            kl = np.empty((n_pairs, n_steps))
            # One pair at a time and in place, so that no second tensor [P, S, V] is made.
            for i, logits_SV in enumerate(logits_PSV):
                log_sum = torch.logsumexp(logits_SV, -1)
                p = (logits_SV[0] - log_sum[0]).exp()
                to_b = torch.linalg.vector_norm(logits_SV - logits_SV[-1], dim=-1)
                logits_SV -= logits_SV[0].clone()
                to_a = torch.linalg.vector_norm(logits_SV, dim=-1)
                # KL(p₀ ‖ p) = Σ p₀ (l₀ − log Z₀ − l + log Z) = log Z − log Z₀ − Σ p₀ (l − l₀).
                kl[i] = (log_sum - log_sum[0] - logits_SV @ p).numpy()
                found[:, i, -1] = torch.stack(relative(to_a, to_b)).numpy()
        return found[0], found[1], found[2], kl


def plateau(
    replay: Replay,
    pairs: Sequence[Pair],
    depths: Sequence[int] | None = None,
    n_steps: int = 50,
    paths: Sequence[str] = PATHS,
    n_last: int = 1,
    tau: float = TAU,
    run: Run | str | Path | None = None,
    seed: int = 0,
) -> xarray.Dataset:
    """Sweep pairs × paths × depths × steps; return curves, widths and sharpness as a dataset.

    `paths` are linear, slerp and the baselines random and covariance (which needs a `run` of the same model with
    `resid`). The moved position is the `n_last`-th from the end of A and of B. Dimensions: pair, path, depth (where the
    state is moved), output (depths of the residual stream, then −1 for the logits), step.
    """
    depths = check_depths(depths, replay.config.n_layer)
    sweep = Sweep(replay, pairs, n_steps, n_last)
    shape = (len(pairs), len(paths), len(depths), replay.config.n_layer + 2, n_steps)
    curves = np.full((3, *shape), np.nan, np.float32)
    kl = np.full((*shape[:3], n_steps), np.nan, np.float32)
    alpha = torch.from_numpy(sweep.alpha).to(replay.dtype)
    for i, depth in enumerate(depths):
        a, b = sweep.ends(depth)
        for j, path in enumerate(paths):
            end = _end(path, a, b, depth, run, seed)
            for part in sweep.parts():
                states = make_path(
                    a[part], end[part], alpha, "slerp" if path == "slerp" else "linear"
                )
                *three, kl[part, j, i] = sweep.outputs(depth, part, states)
                curves[:, part, j, i] = three
    return _dataset(sweep, pairs, paths, depths, curves, kl, tau)


def over_pairs(data: Variables, names: Sequence[str]) -> Variables:
    """Return the mean over pairs of variables [pair, …] and its standard error, NaN for fewer than two pairs."""
    found: Variables = {}
    for name in names:
        dims, values = data[name][:2]
        n = len(values)
        error = np.full(values.shape[1:], np.nan)
        if n > 1:
            error = values.std(0, ddof=1) / np.sqrt(n)
        found[f"{name}_mean"] = dims[1:], values.mean(0)
        found[f"{name}_error"] = dims[1:], error
        found["n_pairs"] = (), np.array(n)
    return found


def check_depths(depths: Sequence[int] | None, n_layer: int) -> list[int]:
    """Return depths at which a state can be moved: 0 to n_layer − 1, all by default."""
    if depths is None:
        return list(range(n_layer))
    for depth in depths:
        if not 0 <= depth < n_layer:
            raise ValueError(
                f"--depths has {depth}; a state can be moved at depths 0 to {n_layer - 1} of this model."
            )
    return list(depths)


def _end(
    path: str, a: torch.Tensor, b: torch.Tensor, depth: int, run: Run | str | Path | None, seed: int
) -> torch.Tensor:
    """Return where a path ends."""
    if path not in (*PATHS, *BASELINES):
        raise ValueError(
            f"--paths has {path!r}; expected some of {', '.join((*PATHS, *BASELINES))}."
        )
    if path in PATHS:
        return b
    rng = np.random.default_rng([seed, depth])
    if path == "random":
        directions = rng.standard_normal(tuple(a.shape))
    else:
        if run is None:
            raise ValueError(
                "the covariance baseline takes its moments from a run; name one with --run RUN."
            )
        directions = covariance_directions(as_run(run), depth, len(a), rng)
    return baseline_ends(a, b, torch.from_numpy(directions).to(a))


def covariance_directions(run: Run, depth: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n vectors [n, D] from N(0, Σ), Σ the covariance of a run's residual stream at a depth.

    Σ is never formed: a sum of centred rows with independent normal weights has that covariance.
    """
    array = run["resid"]
    leads = run.leads("resid")
    if depth not in leads:
        raise ValueError(
            f"{run.path} holds resid at depths {leads}, not {depth}. Extract a run that holds it."
        )
    start = run.plain("row_start")
    # Σ w (x − x̄) = Σ w x − (Σ w) x̄, so one pass is enough.
    total: np.ndarray | float = 0.0
    weighted: np.ndarray | float = 0.0
    weights = np.zeros(n)
    rows = 0
    for sequence in np.flatnonzero(run.complete):
        t = np.arange(start.shape[1])
        not_first = start[sequence] < t
        x = array[leads.index(depth), int(sequence)][not_first].astype(np.float64)
        w = rng.standard_normal((n, len(x)))
        total = total + x.sum(0)
        weighted = weighted + w @ x
        weights = weights + w.sum(1)
        rows = rows + len(x)
    if rows < 2:
        raise ValueError(
            f"{run.path} has {rows} positions besides first ones; a covariance needs more."
        )
    centred = weighted - np.multiply.outer(weights, total / rows)
    return np.asarray(centred / np.sqrt(rows))


def _dataset(
    sweep: Sweep,
    pairs: Sequence[Pair],
    paths: Sequence[str],
    depths: list[int],
    curves: np.ndarray,
    kl: np.ndarray,
    tau: float,
) -> xarray.Dataset:
    import xarray

    dims = ("pair", "path", "depth", "output", "step")
    distance, mirror, ratio = curves
    n_layer = sweep.replay.config.n_layer
    data: Variables = {
        "distance": (dims, distance),
        "mirror": (dims, mirror),
        "ratio": (dims, ratio),
        "kl": (("pair", "path", "depth", "step"), kl),
        "width": (dims[:-1], width(distance, mirror, sweep.alpha, tau)),
        "sharpness": (dims[:-1], sharpness(distance, sweep.alpha)),
    }
    data |= over_pairs(data, ("width", "sharpness"))
    coords = {
        "pair": [pair.label for pair in pairs],
        "path": list(paths),
        "depth": depths,
        "alpha": ("step", sweep.alpha),
        "output": [*range(n_layer + 1), -1],
        "depth_fraction": ("depth", np.array(depths) / n_layer),
    }
    attributes = {
        "analysis": "plateau",
        "conventions": CONVENTIONS,
        "tau": tau,
        "n_last": sweep.n_last,
    }
    return xarray.Dataset(data, coords, attributes)
