"""How the residual stream changes from depth to depth: cosines, block influence, norms, anisotropy.

Per-token cosines between all depths in every variant: raw or corpus-centred, with or without first positions, with or
without outlier dimensions. Two passes: means and outliers come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Analysis, Figures, Plot, rounded
from headwater.analysis.engine.options import OUTLIERS, setting
from headwater.analysis.engine.reducer import State, chosen_indices, need_sites
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import ONE_BY_ONE, Prepared, Scan, Steps, analyse, as_run
from headwater.analysis.measures.cka import STATE_BYTES, CkaAnalysis
from headwater.analysis.measures.cosine_passes import LARGE, SITE, Centres, Pairs
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

VARIANT = ("centring", "positions", "outliers")
CONVENTIONS = (
    "cosine: mean over tokens of the per-token cosine between two depths. centring centred: the mean of each depth "
    "over the positions that are in is taken off first. positions without_first: each row's first visible key is left "
    "out. outliers out: the dimensions of outlier_dimensions are zero at every depth; outlier_sequences counts the "
    "sequences in which a dimension is large at a depth. block_influence = 1 − cosine with the next depth (ShortGPT's "
    "BI where raw, all, in). anisotropy: mean cosine over all ordered pairs of different tokens at one depth, (‖Σu‖² "
    "− N)/(N(N−1)); anisotropy_contribution: its parts by dimension, which add up to it. norm: mean Euclidean norm; "
    "norm_growth: geometric mean over tokens of ‖x‖ at the next depth over ‖x‖. Tokens whose vector is zero have no "
    "cosine and are left out."
)


@dataclass(frozen=True)
class CosineAnalysis(Analysis):
    """Compare the residual stream between depths, in every variant, without CKA; see `cosine`."""

    name = "cosine"
    title = "residual stream between depths: cosines in all variants, block influence, norms, anisotropy"
    needs = (("resid",),)
    section = "The residual stream over depth"
    brings = ("cka",)
    plots = (
        Plot(
            "phases",
            "How the stream changes from each depth to the next (cosine, CKA), and its norm and "
            "anisotropy at each depth.",
            "headwater.analysis.plots.stream:phases",
        ),
        Plot(
            "depth_cosine",
            "Mean cosine of every token's residual stream between two depths.",
            "headwater.analysis.plots.stream:depth_cosine",
            together=False,
        ),
        Plot(
            "block_influence",
            "How far each layer turns the stream (ShortGPT's BI where raw).",
            "headwater.analysis.plots.stream:block_influence",
        ),
    )

    outliers: str | Sequence[int] = setting(
        "large",
        OUTLIERS,
        "dimensions that the variant without outliers leaves out: large (those with massive "
        "activations), none, or a list such as 0,4:8",
        "OUTLIERS",
    )

    def prepare(self, run: Run, state_bytes: int = 0) -> Prepared:
        """Make it ready for the engine; it takes two passes."""
        need_sites(run, SITE)
        leads = list(range(len(run.leads(SITE))))
        if len(leads) < 2:
            raise RunError(
                f"{run.path} holds one depth of {SITE}; cosines need several. Extract with more --depths."
            )
        width = run[SITE].shape[-1]
        named: list[int] | None = []
        if self.outliers == "large":
            named = None
        elif len(self.outliers):
            named = chosen_indices(self.outliers, width, "outliers", "dimensions")

        def steps() -> Steps:
            (centres,) = yield [Centres(run, leads, named is None)]
            found = (
                np.flatnonzero(centres["large"].any(0))
                if named is None
                else np.array(named, np.int64)
            )
            (state,) = yield [Pairs(leads, centres["centre"], found)]
            return _dataset(run, state, found, centres["large"][:, found], prepared)

        prepared = Prepared(
            "cosine",
            2,
            steps,
            {"outliers": self.outliers if named is None else named, "level": LARGE},
        )
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return consecutive cosines and anisotropy as they are, and cosines in the barest variant."""
        plain = result.isel(centring=0, positions=0, outliers=0)
        bare = result.isel(centring=1, positions=1, outliers=1)
        return {
            "consecutive": rounded(plain.consecutive),
            "consecutive_centred_without_first_and_outliers": rounded(bare.consecutive),
            "anisotropy": rounded(plain.anisotropy),
            "outlier_dimensions": [int(i) for i in result.outlier_dimensions.values],
        }


def cosine(
    run: Run | str | Path,
    outliers: str | Sequence[int] = "large",
    cka: str | Sequence[tuple[int, int]] | None = "consecutive",
    scan: Scan = ONE_BY_ONE,
) -> Any:
    """Compare the residual stream between depths, in every variant, in two passes over the run.

    `outliers` are the dimensions to leave out in that variant: "large" (those with an activation of at least 100 × the
    median |x| of its sequence and depth, Sun et al. 2024) or a list. `cka` adds linear CKA for "consecutive" depths,
    "all" pairs or given pairs of depths; it costs as much as two SVDs, None leaves it out.

    Returns a dataset: cosine [centring, positions, outliers, depth, other_depth], consecutive and block_influence
    [..., step], anisotropy [..., depth] with its contributions by dimension, norm, norm_rms, norm_growth, cka.
    """
    import xarray

    run = as_run(run)
    wanted = [CosineAnalysis(outliers).prepare(run)]
    if cka is not None:
        state_bytes = scan.state_bytes(run, STATE_BYTES)
        wanted.append(CkaAnalysis(cka).prepare(run, state_bytes))
    results = analyse(run, wanted, scan)
    return (
        xarray.merge(results, combine_attrs="override", join="outer", compat="override")
        if cka
        else results[0]
    )


def _ratio(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return sums / n, NaN where n is 0."""
    return np.where(n > 0, sums / np.maximum(n, 1), np.nan)


def _dataset(
    run: Run,
    state: State,
    outliers: np.ndarray,
    large_LO: np.ndarray,
    prepared: Prepared,
) -> Any:
    import xarray

    mean = _ratio(state["cosine"], state["n_pair"])
    step = np.diagonal(mean, 1, -2, -1)
    n = np.diagonal(state["n_pair"], 0, -2, -1)
    pairs = np.where(n > 1, n * (n - 1), np.nan)
    anisotropy = ((state["unit"] ** 2).sum(-1) - n) / pairs
    contribution = (state["unit"] ** 2 - state["unit_square"]) / pairs[..., None]
    norm = _ratio(state["norm"], state["n"])
    square = _ratio(state["norm_square"], state["n"])
    coords = coordinates(run, SITE)
    depth = coords["depth"]
    coords |= {
        "centring": ["raw", "centred"],
        "positions": ["all", "without_first"],
        "outliers": ["in", "out"],
    }
    coords |= {
        "other_depth": depth,
        "step": depth[1:],
        "step_fraction": ("step", coords["depth_fraction"][1][1:]),
    }
    variables = {
        "cosine": ((*VARIANT, "depth", "other_depth"), mean),
        "n_tokens": ((*VARIANT, "depth"), n.astype(np.int64)),
        "consecutive": (
            (*VARIANT, "step"),
            step,
            {"note": "cosine of the depth `step` with the stored one before"},
        ),
        "block_influence": ((*VARIANT, "step"), 1 - step),
        "anisotropy": ((*VARIANT, "depth"), anisotropy),
        "anisotropy_contribution": ((*VARIANT, "depth", "d_model"), contribution),
        "norm": (("positions", "depth"), norm),
        "norm_rms": (("positions", "depth"), np.sqrt(square)),
        "norm_growth": (
            ("positions", "step"),
            np.exp(_ratio(state["log_growth"], state["n_growth"])),
        ),
        "outlier_dimensions": (("outlier",), outliers.astype(np.int64)),
        "outlier_sequences": (("depth", "outlier"), large_LO),
    }
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes)
