"""Principal components of any vector site at every layer or depth: exact, streaming, in float64.

One pass accumulates counts, means and scatter matrices (first positions apart from the rest); their eigenvectors are
the right singular vectors of the stacked rows, σ² the eigenvalues. Worst relative error of σ about 3e-9 where
σ_k/σ_1 ≥ 1e-4. Shapes: L leads, N heads (1 for sites without), n rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import (
    STATE_BYTES,
    Analysis,
    Figures,
    Plot,
    as_function,
    rounded,
)
from headwater.analysis.engine.moments import add_rows, merge_mean, merge_scatter, with_room
from headwater.analysis.engine.options import SITE, SOME, setting, some_of
from headwater.analysis.engine.reducer import Chunk, Reducer, State, chosen_leads, need_sites
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import Prepared, Steps
from headwater.extractor.settings import INDICES
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

FIRST = 0
REST = 1
CENTRINGS = ("raw", "centred")
POSITIONS = ("all", "without_first")
VECTORS = ("resid", "mlp_post", "mlp_out", "attn_out", "resid_mid", "mlp_pre")
CONVENTIONS = (
    "Rows are the real positions of all complete sequences, pooled. centring raw: about zero, centred: about the mean "
    "of the rows that are in. positions without_first leaves out each row's first visible key. participation_ratio = "
    "(Σλ)²/Σλ², effective_rank = exp(H(σ/Σσ)), λ = σ², over all components. direction: right singular vectors, their "
    "largest entry positive."
)


class Scatter(Reducer):
    """Counts, means and scatter of a vector site, first positions and the rest apart.

    State: n [2, L], mean [2, L, N, D], scatter [2, L, N, D, D].
    """

    def __init__(self, run: Run, site: str, leads: Sequence[int]) -> None:
        shape = run[site].shape
        dims = run[site].dims
        self.name, self.sites, self.leads = f"svd of {site}", (site,), tuple(leads)
        self.n_groups, self.width = (shape[3] if "head" in dims else 1), shape[-1]
        self._row = max(self.tokens, run.manifest.n_positions) * self.n_groups * self.width * 8

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        groups = (2, len(self.leads), self.n_groups)
        return {
            "n": np.zeros(groups[:2]),
            "mean": np.zeros((*groups, self.width)),
            "scatter": np.zeros((*groups, self.width, self.width)),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of one state."""
        assert self.leads is not None
        return 2 * len(self.leads) * (1 + self.n_groups * self.width * (1 + self.width)) * 8

    @property
    def working_bytes(self) -> int:
        """Bytes of the rows in float64 (twice) and of the products."""
        return 2 * self._row + 4 * 8 * self.width**2

    def update(self, state: State, chunk: Chunk) -> None:
        """Add the rows of one lead."""
        assert self.leads is not None
        at = self.leads.index(chunk.lead)
        site = self.sites[0]
        text = chunk.text(site)
        for part, keep in ((FIRST, text.first), (REST, text.real & ~text.first)):
            if not keep.any():
                continue
            rows = chunk.rows(site, chunk.lead, keep).reshape(-1, self.n_groups, self.width)
            n = state["n"][part, at, ...]
            for group in range(self.n_groups):
                count = n.copy()
                values = with_room(rows[:, group])
                add_rows(
                    count, state["mean"][part, at, group], state["scatter"][part, at, group], values
                )
            n[...] = count

    def merge(self, a: State, b: State) -> State:
        """Join two states."""
        for part, lead in np.ndindex(*a["n"].shape):
            n_a = float(a["n"][part, lead])
            n_b = float(b["n"][part, lead])
            for group in range(self.n_groups):
                step = b["mean"][part, lead, group] - a["mean"][part, lead, group]
                merge_scatter(
                    a["scatter"][part, lead, group],
                    b["scatter"][part, lead, group],
                    n_a,
                    n_b,
                    step,
                    step,
                )
        merge_mean(
            np.repeat(a["n"][..., None], self.n_groups, -1),
            a["mean"],
            np.repeat(b["n"][..., None], self.n_groups, -1),
            b["mean"],
        )
        a["n"] += b["n"]
        return a

    def finalise(self, state: State) -> State:
        """Return the state: `moments` reads it."""
        return state

    @staticmethod
    def moments(
        state: State, lead: int, group: int, centring: str, positions: str
    ) -> tuple[float, Any, Any]:
        """Return count, mean [D] and scatter [D, D] of one variant; the scatter is about zero where it is raw."""
        n = float(state["n"][REST, lead])
        mean = state["mean"][REST, lead, group].copy()
        scatter = state["scatter"][REST, lead, group].copy()
        if positions == "all":
            n_first = float(state["n"][FIRST, lead])
            mean_first = state["mean"][FIRST, lead, group]
            step = mean_first - mean
            merge_scatter(scatter, state["scatter"][FIRST, lead, group], n, n_first, step, step)
            n += n_first
            mean += step * (n_first / max(n, 1))
        if centring == "raw":
            scatter += n * np.multiply.outer(mean, mean)
        return n, mean, scatter


def spectrum(scatter_DD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return singular values [D], falling, and the first k directions [k, D] with their largest entry positive."""
    values, vectors = np.linalg.eigh(scatter_DD)
    directions = vectors[:, ::-1][:, :k].T
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1, keepdims=True), 1)
    return np.sqrt(np.maximum(values[::-1], 0)), directions * np.where(largest < 0, -1.0, 1.0)


def participation_ratio(sigma: np.ndarray) -> float:
    """Return (Σλ)²/Σλ² with λ = σ²; NaN where all are 0."""
    power = sigma**2
    return float(power.sum() ** 2 / (power**2).sum()) if power.any() else np.nan


def effective_rank(sigma: np.ndarray) -> float:
    """Return exp of the entropy of σ/Σσ (Roy & Vetterli 2007); NaN where all are 0."""
    if not sigma.any():
        return np.nan
    share = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@dataclass(frozen=True)
class SvdAnalysis(Analysis):
    """Compute the exact PCA/SVD of a vector site at every layer or depth (or at those of `at`).

    Returns a dataset with singular_value [centring, positions, lead(, head), component], participation_ratio,
    effective_rank, n_rows, mean and the first k directions. q, k, v and z are taken head by head.
    """

    name = "svd"
    title = "spectra and principal directions of a vector site, centred or not, first position in or out"
    needs = tuple((site,) for site in VECTORS)
    section = "The dimensions of the stream"
    brings = ("svd_tokens",)
    plots = (
        Plot(
            "spectra",
            "Singular values of the stream at every depth; dark: early, light: late.",
            "headwater.analysis.plots.stream:spectra",
            together=False,
        ),
        Plot(
            "dimensions",
            "How many dimensions the stream uses, with and without first positions.",
            "headwater.analysis.plots.stream:dimensions",
        ),
    )

    site: str = setting("resid", SITE, "site", "SITE")
    at: str | Iterable[int] | None = setting(
        None, INDICES, "layers or depths: 0,4:8, -1; by default all that are stored", "AT"
    )
    centrings: Sequence[str] = setting(
        CENTRINGS,
        some_of(*CENTRINGS),
        "about zero (raw), about the mean (centred), or both",
        "LIST",
    )
    positions: Sequence[str] = setting(
        POSITIONS,
        some_of(*POSITIONS),
        "rows: all, without_first, or both",
        "LIST",
        flag="--position-sets",
    )
    k: int = setting(32, SOME, "directions", "K")

    def prepare(self, run: Run, state_bytes: int = STATE_BYTES) -> Prepared:
        """Make it ready for the engine; it takes one pass for every `state_bytes` of scatter matrices."""
        site = self.site
        centrings = self.centrings
        positions = self.positions
        need_sites(run, site)
        array = run[site]
        if not {"d_model", "d_mlp", "d_head"} & set(array.dims):
            raise RunError(
                f"svd takes a site of vectors, such as resid or mlp_out; {site} has dimensions {array.dims}."
            )
        for what, given, known in (
            ("centrings", centrings, CENTRINGS),
            ("positions", positions, POSITIONS),
        ):
            if not given or set(given) - set(known):
                raise ValueError(f"{what} is {tuple(given)}; expected some of {known}.")
        stored = run.leads(site)
        wanted = chosen_leads(run, site, self.at, "at")
        leads = [stored.index(i) for i in wanted]
        per = max(state_bytes // Scatter(run, site, leads[:1]).nbytes, 1)
        parts = [leads[i : i + per] for i in range(0, len(leads), per)]

        def steps() -> Steps:
            found = []
            for part in parts:
                reducer = Scatter(run, site, part)
                (state,) = yield [reducer]
                found += [
                    _variants(reducer, state, i, centrings, positions, self.k)
                    for i in range(len(part))
                ]
            return _dataset(run, site, leads, found, centrings, positions, prepared)

        arguments = {
            "site": site,
            "at": wanted,
            "centrings": list(centrings),
            "positions": list(positions),
            "k": self.k,
        }
        prepared = Prepared(
            "svd" if site == "resid" else f"svd_{site}", len(parts), steps, arguments
        )
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the participation ratios of the last variant."""
        chosen = {"centring": result.centring.values[-1], "positions": result.positions.values[-1]}
        ratio = result.participation_ratio.sel(chosen)
        return {
            "variant": " ".join(map(str, chosen.values())),
            "participation_ratio": rounded(ratio)[:64],
        }


svd = as_function(SvdAnalysis)


def _variants(
    reducer: Scatter,
    state: State,
    lead: int,
    centrings: Sequence[str],
    positions: Sequence[str],
    k: int,
) -> dict[str, np.ndarray]:
    """Return every quantity of one lead: [centring, positions, N, …]."""
    grid = (len(centrings), len(positions), reducer.n_groups)
    k = min(k, reducer.width)
    out = {
        "singular_value": np.empty((*grid, reducer.width)),
        "participation_ratio": np.empty(grid),
        "effective_rank": np.empty(grid),
        "n_rows": np.empty(grid),
        "mean": np.empty((*grid, reducer.width)),
        "direction": np.empty((*grid, k, reducer.width)),
    }
    for place in np.ndindex(*grid):
        n, mean, scatter = reducer.moments(
            state, lead, place[2], centrings[place[0]], positions[place[1]]
        )
        sigma, directions = spectrum(scatter, k)
        values = (sigma, participation_ratio(sigma), effective_rank(sigma), n, mean, directions)
        for name, value in zip(out, values, strict=True):
            out[name][place] = value
    return out


def _dataset(
    run: Run,
    site: str,
    leads: Sequence[int],
    found: list[dict[str, np.ndarray]],
    centrings: Sequence[str],
    positions: Sequence[str],
    prepared: Prepared,
) -> xarray.Dataset:
    import xarray

    dims = run[site].dims
    lead = run.spec(site).axis
    per_head = "head" in dims
    heads = ("head",) if per_head else ()
    tails = {"singular_value": ("component",), "mean": (dims[-1],), "direction": ("rank", dims[-1])}
    variables = {}
    for name in found[0]:
        values = np.stack([one[name] for one in found], 2)
        values = values if per_head else values[:, :, :, 0]
        variables[name] = ("centring", "positions", lead, *heads, *tails.get(name, ())), values
    coords = coordinates(run, site, leads) | {
        "centring": list(centrings),
        "positions": list(positions),
        "component": np.arange(found[0]["singular_value"].shape[-1]),
    }
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes | {"site": site})
