"""Linear centred kernel alignment between depths, with and without first positions (Kornblith et al. 2019).

CKA = ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) with the columns of X and Y centred over the tokens that are in. Exact and streaming:
the d_model × d_model cross-scatters are accumulated in float64 and merged by Chan's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headwater.analysis.engine.analysis import Analysis, Figures, as_function, rounded
from headwater.analysis.engine.moments import merge_mean, merge_scatter
from headwater.analysis.engine.options import setting
from headwater.analysis.engine.reducer import Chunk, Reducer, State, need_sites
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import Prepared, Steps
from headwater.extractor.settings import one_of
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

SITE = "resid"
STATE_BYTES = 512 << 20
CONVENTIONS = (
    "linear CKA between two depths, columns centred over the tokens that are in; positions without_first leaves out "
    "each row's first visible key; NaN for pairs that were not asked for"
)


class CrossScatter(Reducer):
    """Means of some depths and cross-scatters of some pairs of them, first positions and the rest apart.

    `pairs` are pairs of leads. State: n [2], mean [2, L, D], scatter [2, pairs, D, D].
    """

    name = "cka"
    joint = True
    tokens = 1024

    def __init__(self, run: Run, site: str, pairs: Sequence[tuple[int, int]]) -> None:
        self.sites, self.pairs = (site,), list(pairs)
        self.leads = tuple(sorted({lead for pair in pairs for lead in pair}))
        self.width = run[site].shape[-1]
        self._row = max(self.tokens, run.manifest.n_positions) * self.width * 8

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        return {
            "n": np.zeros(2),
            "mean": np.zeros((2, len(self.leads), self.width)),
            "scatter": np.zeros((2, len(self.pairs), self.width, self.width)),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of one state."""
        assert self.leads is not None
        return 16 * (1 + self.width * (len(self.leads) + len(self.pairs) * self.width))

    @property
    def working_bytes(self) -> int:
        """Bytes of the rows of every depth in float64, and of the products."""
        assert self.leads is not None
        return (len(self.leads) + 2) * self._row + 4 * 8 * self.width**2

    def update(self, state: State, chunk: Chunk) -> None:
        """Add the positions of a chunk."""
        assert self.leads is not None
        text = chunk.text(self.sites[0])
        for part, keep in enumerate((text.first, text.real & ~text.first)):
            if not keep.any():
                continue
            rows = {
                lead: chunk.rows(self.sites[0], lead, keep).astype(np.float64)
                for lead in self.leads
            }
            n = float(len(rows[self.leads[0]]))
            means = np.stack([rows[lead].sum(0) / n for lead in self.leads])
            for lead, mean in zip(self.leads, means, strict=True):
                rows[lead] -= mean
            steps = dict(zip(self.leads, means - state["mean"][part], strict=True))
            for at, (i, j) in enumerate(self.pairs):
                product = rows[i].T @ rows[j]
                merge_scatter(
                    state["scatter"][part, at],
                    product,
                    float(state["n"][part]),
                    n,
                    steps[i],
                    steps[j],
                )
            count = np.full(len(self.leads), state["n"][part])
            merge_mean(count, state["mean"][part], np.full(len(self.leads), n), means)
            state["n"][part] += n

    def merge(self, a: State, b: State) -> State:
        """Join two states."""
        assert self.leads is not None
        for part in (0, 1):
            n_a = float(a["n"][part])
            n_b = float(b["n"][part])
            steps = dict(zip(self.leads, b["mean"][part] - a["mean"][part], strict=True))
            for at, (i, j) in enumerate(self.pairs):
                merge_scatter(
                    a["scatter"][part, at], b["scatter"][part, at], n_a, n_b, steps[i], steps[j]
                )
            count = np.full(len(self.leads), n_a)
            merge_mean(count, a["mean"][part], np.full(len(self.leads), n_b), b["mean"][part])
        a["n"] += b["n"]
        return a

    def finalise(self, state: State) -> dict[tuple[int, int], np.ndarray]:
        """Return ‖scatter‖_F of every pair, of all positions and of all but the first: [2]."""
        assert self.leads is not None
        step = dict(zip(self.leads, state["mean"][0] - state["mean"][1], strict=True))
        norms = {}
        for at, (i, j) in enumerate(self.pairs):
            scatter = state["scatter"][1, at].copy()
            without = np.sqrt((scatter**2).sum())
            n_rest = float(state["n"][1])
            n_first = float(state["n"][0])
            merge_scatter(scatter, state["scatter"][0, at], n_rest, n_first, step[i], step[j])
            norms[i, j] = np.array([np.sqrt((scatter**2).sum()), without])
        return norms


@dataclass(frozen=True)
class CkaAnalysis(Analysis):
    """Compare depths by linear CKA: "consecutive" ones, "all" pairs, or a list of pairs of depths.

    Returns a dataset: cka [positions, depth, other_depth]. It takes one pass for every 256 MB of scatter matrices.
    """

    name = "cka"
    title = "linear CKA between depths, with and without first positions"
    needs = (("resid",),)
    section = "The residual stream over depth"

    pairs: str | Sequence[tuple[int, int]] = setting(
        "consecutive",
        one_of("consecutive", "all"),
        "consecutive or all depths",
        "CKA",
        flag="--cka",
    )

    def prepare(self, run: Run, state_bytes: int = STATE_BYTES) -> Prepared:
        """Make it ready for the engine; it takes one pass for every `state_bytes` of scatter matrices."""
        need_sites(run, SITE)
        stored = run.leads(SITE)
        leads = range(len(stored))
        if self.pairs == "consecutive":
            chosen = [(i, i + 1) for i in leads[:-1]]
        elif self.pairs == "all":
            chosen = [(i, j) for i in leads for j in leads if i < j]
        elif isinstance(self.pairs, str):
            raise ValueError(
                f"cka is {self.pairs!r}; expected 'consecutive', 'all', or a list of pairs of depths."
            )
        else:
            if missing := {d for pair in self.pairs for d in pair} - set(stored):
                raise RunError(
                    f"{run.path} holds {SITE} at depths {stored}, but depth {min(missing)} was asked for."
                )
            chosen = [(stored.index(i), stored.index(j)) for i, j in self.pairs]
        if not chosen:
            raise RunError(
                f"{run.path} holds one depth of {SITE}; cka compares several. Extract with more --depths."
            )
        wanted = sorted({(i, i) for pair in chosen for i in pair} | set(chosen))
        per = max(state_bytes // CrossScatter(run, SITE, wanted[:1]).nbytes, 1)
        parts = [wanted[at : at + per] for at in range(0, len(wanted), per)]

        def steps() -> Steps:
            norms: dict[tuple[int, int], np.ndarray] = {}
            for part in parts:
                (found,) = yield [CrossScatter(run, SITE, part)]
                norms |= found
            return _dataset(run, norms, prepared)

        prepared = Prepared("cka", len(parts), steps, {"pairs": self.pairs})
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return CKA of consecutive depths."""
        return {
            f"consecutive_{positions}": rounded(
                np.diagonal(result.cka.sel(positions=positions).values, 1)
            )
            for positions in ("all", "without_first")
        }


cka = as_function(CkaAnalysis)


def _dataset(
    run: Run, norms: dict[tuple[int, int], np.ndarray], prepared: Prepared
) -> xarray.Dataset:
    import xarray

    n = len(run.leads(SITE))
    values = np.full((2, n, n), np.nan)
    for (i, j), cross in norms.items():
        own = norms[i, i] * norms[j, j]
        values[:, i, j] = values[:, j, i] = np.where(
            own > 0, cross**2 / np.where(own > 0, own, 1), np.nan
        )
    coords = coordinates(run, SITE) | {
        "positions": ["all", "without_first"],
        "other_depth": run.leads(SITE),
    }
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(
        {"cka": (("positions", "depth", "other_depth"), values, {"note": CONVENTIONS})},
        coords,
        attributes,
    )
