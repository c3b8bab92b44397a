"""How the heads of a layer relate: overlap, divergence, shared targets, opposite orders, each beside its null."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Analysis, Figures, Plot, as_function, rounded_one
from headwater.analysis.engine.options import COUNT, numbers_from, setting
from headwater.analysis.engine.reducer import Chunk, Reducer, State, chosen_leads, need_sites
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import Prepared, Steps
from headwater.analysis.measures.head_rows import (
    MIN_KEYS,
    PAIR_QUANTITIES,
    benjamini_hochberg,
    conditional_information,
    pair_figures,
    rest_keys,
    student_tail,
)
from headwater.extractor.settings import INDICES
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

TAU = -0.3
Q_VALUE = 0.01
MASS = 0.1
TAU_AT = PAIR_QUANTITIES.index("tau")
N_SEQUENCES = 128
N_QUERIES = 32
N_KEYS = 128
LAYERS_HELP = "layers: 0,4:8, -1; by default all that are stored"
QUERIES_HELP = "positions of the sampled rows, instead of evenly spaced ones"
CONVENTIONS = (
    "Means over sampled rows: `sequences` as evenly spaced pairs of neighbours, `queries` evenly spaced positions. "
    "first: the row's first visible key. cosine of rows of the pattern; js: Jensen–Shannon divergence, nats; "
    "same_argmax: share of rows whose largest entries are at one key; tau: Kendall's τ_b over the visible keys but the "
    "first and the query's own, at least 4, at most `keys` evenly spaced ones, chosen without regard to mass; rows on "
    "which a head is constant are left out. The *_null values compare head with the row of other_head at the same "
    "query of the other sequence of the pair (where both rows see the same keys); same_argmax_excess: the value minus "
    "its null. *_error: standard error over n_pairs pairs of sequences, rows of one not being independent. "
    "argmax_information: mutual information of the argmax keys given the query position, nats, Miller–Madow; with few "
    "sequences it is biased, as its null shows. p: one-sided t-test over pairs of sequences that tau − tau_null is "
    "below 0; q: Benjamini–Hochberg over all pairs of heads of all layers. inverted: tau ≤ −.3, q < .01 and both "
    "non_sink_mass (1 − mass on first) ≥ .1."
)


class Heads(Reducer):
    """Sums of PAIR_QUANTITIES, of themselves and of their null, and the argmax keys of the sampled rows.

    Shapes: 2 (real, null), 4 quantities, L layers, N heads, S sampled sequences, Q sampled queries. State: total and n
    [2, 4, L, N, N]; means, square and n_means [4, L, N, N], over pairs of sequences of their mean and its square;
    sink [L, N], n_row [L]; difference, difference_square and n_pair [L, N, N], of the τ of a pair of
    sequences minus its null; argmax [S, L, N, Q], −1 where there is none.
    """

    name = "heads"
    sites = ("pattern",)

    def __init__(
        self,
        run: Run,
        layers: Sequence[int],
        n_sequences: int,
        n_queries: int,
        n_keys: int,
        queries: Sequence[int] | None = None,
    ) -> None:
        self.leads = tuple(layers)
        self.n_keys = n_keys
        self.n_head, self.length = run["pattern"].shape[2], run.manifest.n_positions
        self.tokens = 2 * self.length
        self.queries = sampled_queries(self.length, n_queries, queries)
        starts = [
            at
            for b in range(run.manifest.n_blocks)
            for at in range(*run.manifest.block_range(b), 2)
        ]
        wanted = max(-(-n_sequences // 2), 1)
        chosen = np.unique(
            np.linspace(0, len(starts) - 1, min(wanted, len(starts))).round().astype(np.int64)
        )
        self.slots = {starts[i]: 2 * slot for slot, i in enumerate(chosen)}

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        n_layer = len(self.leads)
        n = self.n_head
        state: State = {name: np.zeros((2, 4, n_layer, n, n)) for name in ("total", "n")}
        state |= {
            name: np.zeros((n_layer, n, n))
            for name in ("difference", "difference_square", "n_pair")
        }
        state |= {name: np.zeros((4, n_layer, n, n)) for name in ("means", "square", "n_means")}
        state |= {"sink": np.zeros((n_layer, n)), "n_row": np.zeros(n_layer)}
        state["argmax"] = np.full(
            (2 * len(self.slots), n_layer, n, len(self.queries)), -1, np.int32
        )
        return state

    @property
    def working_bytes(self) -> int:
        """Bytes of the sampled rows of two sequences, of what compares them, and of signs of pairs of keys."""
        rows = len(self.queries) * self.n_head * self.length * 8
        return (
            8 * rows
            + self.n_head * self.n_keys**2 * 16
            + 16 * len(self.queries) * self.n_head**2 * 8
        )

    def update(self, state: State, chunk: Chunk) -> None:
        """Add one layer of a pair of sequences."""
        assert self.leads is not None
        slot = self.slots.get(chunk.first)
        if slot is None:
            return
        at = self.leads.index(chunk.lead)
        starts = chunk.row_start_ST[:, self.queries]
        rows = [self._rows(p, start) for p, start in zip(chunk["pattern"], starts, strict=True)]
        sums = np.zeros((2, 2, self.n_head, self.n_head))
        whole = np.zeros((2, 4, self.n_head, self.n_head))
        for s, (p_RNK, start) in enumerate(zip(rows, starts, strict=True)):
            real = start < self.queries
            state["argmax"][slot + s, at][:, real] = p_RNK[real].argmax(-1).T
            first = p_RNK[np.arange(len(start)), :, np.minimum(start, self.length - 1)]
            state["sink"][at] += first[real].sum(0)
            state["n_row"][at] += real.sum()
            for null, other in enumerate(
                rows[s : s + 1] + (rows[1 - s : 2 - s] if len(rows) == 2 else [])
            ):
                chosen = real & (starts[1 - s] == start) if null else real
                keys = [
                    rest_keys(int(start[r]), int(self.queries[r]), self.n_keys)
                    for r in np.flatnonzero(chosen)
                ]
                figures = pair_figures(p_RNK[chosen], other[chosen], keys)
                there = ~np.isnan(figures)
                there[:TAU_AT] = True
                total = np.where(there, figures, 0).sum(1)
                n = there.sum(1)
                state["total"][null, :, at] += total
                state["n"][null, :, at] += n
                sums[null] += total[TAU_AT], n[TAU_AT]
                if not null:
                    whole += total, n
        mean = whole[0] / np.maximum(whole[1], 1)
        known = whole[1] > 0
        state["means"][:, at] += np.where(known, mean, 0)
        state["square"][:, at] += np.where(known, mean**2, 0)
        state["n_means"][:, at] += known
        both = (sums[:, 1] > 0).all(0)
        means = sums[:, 0] / np.maximum(sums[:, 1], 1)
        difference = np.where(both, means[0] - means[1], 0)
        state["difference"][at] += difference
        state["difference_square"][at] += difference**2
        state["n_pair"][at] += both

    def _rows(self, pattern_NQK: np.ndarray, start_R: np.ndarray) -> np.ndarray:
        """Return the sampled rows [R, N, K], 0 at keys that are not visible."""
        keys = np.arange(self.length)
        seen = (keys >= start_R[:, None]) & (keys <= self.queries[:, None])
        rows = pattern_NQK[:, self.queries].astype(np.float64).transpose(1, 0, 2)
        return np.where(seen[:, None], rows, 0.0)

    def merge(self, a: State, b: State) -> State:
        """Join two states."""
        argmax = np.maximum(a.pop("argmax"), b["argmax"])
        super().merge(a, b)
        a["argmax"] = argmax
        return a

    def finalise(self, state: State) -> State:
        """Return the state: `heads` reads it."""
        return state


def sampled_queries(
    length: int, n_queries: int, queries: Sequence[int] | None = None
) -> np.ndarray:
    """Return `n_queries` evenly spaced positions from 1 on, or those that are named; raise ValueError for others."""
    if queries is None:
        return np.unique(np.linspace(1, length - 1, n_queries).round().astype(np.int64))
    named = np.unique(np.array(list(queries), np.int64))
    if not len(named) or not 1 <= named[0] <= named[-1] < length:
        raise ValueError(
            f"queries are {named.tolist()}; expected positions from 1 to {length - 1}."
        )
    return named


def pattern_layers(run: Run, layers: str | Iterable[int] | None) -> list[int]:
    """Return the layers asked for, all by default; raise RunError where the run holds no pattern of them."""
    need_sites(run, "pattern")
    return chosen_leads(run, "pattern", layers)


@dataclass(frozen=True)
class HeadsAnalysis(Analysis):
    """Compare all heads of each layer on sampled rows of stored patterns, in one pass.

    `queries` names the positions of the rows, instead of `n_queries` evenly spaced ones.
    Returns a dataset with cosine, js, same_argmax, tau and argmax_information [layer, head, other_head], each with its
    null, same_argmax_excess, p, q, inverted, and non_sink_mass [layer, head].
    """

    name = "heads"
    title = "head by head: overlap, divergence, shared targets, opposite orders, with nulls"
    needs = (("pattern",),)
    section = "Heads compared"
    brings = ("favourites",)
    plots = (
        Plot(
            "head_pairs",
            "Kendall's τ_b between the orders in which two heads rank the same keys.",
            "headwater.analysis.plots.attention:head_pairs",
            together=False,
        ),
    )

    layers: str | Iterable[int] | None = setting(None, INDICES, LAYERS_HELP, "LAYERS")
    n_sequences: int = setting(N_SEQUENCES, COUNT, "sampled rows", "SEQUENCES", flag="--sequences")
    n_queries: int = setting(
        N_QUERIES, COUNT, "sampled queries of a row", "QUERIES", flag="--queries"
    )
    n_keys: int = setting(N_KEYS, COUNT, "sampled keys of a row", "KEYS", flag="--keys")
    queries: Sequence[int] | None = setting(
        None, numbers_from(0), QUERIES_HELP, "LIST", flag="--query-positions"
    )

    def prepare(self, run: Run, state_bytes: int = 0) -> Prepared:
        """Make it ready for the engine; it takes one pass."""
        n_sequences = self.n_sequences
        n_queries = self.n_queries
        n_keys = self.n_keys
        chosen = pattern_layers(run, self.layers)
        if run["pattern"].shape[2] < 2:
            raise RunError(
                f"{run.path} holds the pattern of one head; heads compares several. Extract with more --heads."
            )
        if n_sequences < 1 or n_queries < 1 or n_keys < MIN_KEYS:
            raise ValueError(
                f"n_sequences, n_queries, n_keys are {n_sequences}, {n_queries}, {n_keys}; expected at least 1, 1 and "
                f"{MIN_KEYS}."
            )
        leads = [run.leads("pattern").index(layer) for layer in chosen]
        reducer = Heads(run, leads, n_sequences, n_queries, n_keys, self.queries)

        def steps() -> Steps:
            (state,) = yield [reducer]
            return _dataset(run, leads, state, prepared)

        asked = n_queries if self.queries is None else reducer.queries.tolist()
        arguments = {
            "layers": chosen,
            "sequences": n_sequences,
            "queries": asked,
            "keys": n_keys,
            "tau": TAU,
            "q": Q_VALUE,
            "mass": MASS,
        }
        prepared = Prepared("heads", 1, steps, arguments)
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return how many pairs are inverted, and the most opposite order."""
        return {
            "inverted_pairs": len(inverted_pairs(result)),
            "smallest_tau": rounded_one(np.nanmin(result.tau.values)),
        }


heads = as_function(HeadsAnalysis)


def inverted_pairs(result: Any) -> list[tuple[int, int, int]]:
    """List the inverted pairs of a `heads` result as (layer, head, other head), the most opposite first."""
    layer, head, other = (result[name].values for name in ("layer", "head", "other_head"))
    tau = result["tau"].values
    found = np.argwhere(np.triu(result["inverted"].values, 1))
    found = found[np.argsort(tau[tuple(found.T)], kind="stable")]
    return [(int(layer[i]), int(head[j]), int(other[k])) for i, j, k in found]


def _information(argmax_SLNQ: np.ndarray) -> np.ndarray:
    """Return argmax_information and its null: [2, L, N, N]."""
    _, n_layer, n, _ = argmax_SLNQ.shape
    other = argmax_SLNQ.reshape(-1, 2, *argmax_SLNQ.shape[1:])[:, ::-1].reshape(argmax_SLNQ.shape)
    out = np.empty((2, n_layer, n, n))
    for layer, i, j in np.ndindex(n_layer, n, n):
        if j >= i:
            out[0, layer, i, j] = conditional_information(
                argmax_SLNQ[:, layer, i], argmax_SLNQ[:, layer, j]
            )
            out[0, layer, j, i] = out[0, layer, i, j]
        out[1, layer, i, j] = conditional_information(argmax_SLNQ[:, layer, i], other[:, layer, j])
    return out


def _errors(state: State) -> np.ndarray:
    """Return the standard errors of PAIR_QUANTITIES over pairs of sequences [4, L, N, N], NaN for fewer than two."""
    n = state["n_means"]
    mean = state["means"] / np.maximum(n, 1)
    variance = np.maximum(state["square"] - n * mean**2, 0) / np.maximum(n - 1, 1)
    return np.where(n > 1, np.sqrt(variance / np.maximum(n, 1)), np.nan)


def _p_value(state: State) -> np.ndarray:
    """Return the one-sided p that tau is not below its null: [L, N, N], NaN on the diagonal and without a null."""
    n = state["n_pair"]
    mean = state["difference"] / np.maximum(n, 1)
    variance = np.maximum(state["difference_square"] - n * mean**2, 0) / np.maximum(n - 1, 1)
    error = np.sqrt(variance / np.maximum(n, 1))
    t = np.where(error > 0, mean / np.where(error > 0, error, 1), np.sign(mean) * 1e9)
    p = student_tail(np.where(n >= 2, t, np.nan), n - 1)
    return np.where(np.eye(n.shape[-1], dtype=bool), np.nan, p)


def _dataset(run: Run, leads: list[int], state: State, prepared: Prepared) -> xarray.Dataset:
    import xarray

    dims = ("layer", "head", "other_head")
    means = np.where(state["n"] > 0, state["total"] / np.maximum(state["n"], 1), np.nan)
    errors = _errors(state)
    variables: dict[str, Any] = {"n_pairs": (dims, state["n_means"][TAU_AT].astype(np.int64))}
    for at, name in enumerate(PAIR_QUANTITIES):
        variables[name], variables[f"{name}_null"] = (dims, means[0, at]), (dims, means[1, at])
        variables[f"{name}_error"] = dims, errors[at]
    variables["same_argmax_excess"] = dims, means[0, 2] - means[1, 2]
    for name, value in zip(("", "_null"), _information(state["argmax"]), strict=True):
        variables[f"argmax_information{name}"] = dims, value
    mass = 1 - state["sink"] / np.maximum(state["n_row"], 1)[:, None]
    p = _p_value(state)
    upper = np.triu(np.ones(p.shape[1:], bool), 1)
    q = benjamini_hochberg(np.where(upper, p, np.nan))
    q = np.where(upper, q, q.transpose(0, 2, 1))
    heavy = (mass[:, :, None] >= MASS) & (mass[:, None] >= MASS)
    variables |= {
        "p": (dims, p),
        "q": (dims, q),
        "inverted": (dims, (means[0, TAU_AT] <= TAU) & (q < Q_VALUE) & heavy),
        "non_sink_mass": (dims[:2], mass),
        "n_rows": (("layer",), state["n_row"].astype(np.int64)),
        "n_tau": (dims, state["n"][0, TAU_AT].astype(np.int64)),
    }
    coords = coordinates(run, "pattern", leads)
    coords["other_head"] = coords["head"]
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes)
