"""What a head turns to when its favourite token is missing: second favourites, transitivity, the withheld OV logit.

Shapes: R rows, N heads, K keys, V candidate tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Analysis, Figures, as_function, rounded_one
from headwater.analysis.engine.options import COUNT, numbers_from, setting
from headwater.analysis.engine.reducer import Chunk, Reducer, State
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import Prepared, Steps
from headwater.analysis.measures.heads import (
    LAYERS_HELP,
    N_QUERIES,
    N_SEQUENCES,
    QUERIES_HELP,
    pattern_layers,
    sampled_queries,
)
from headwater.analysis.measures.origin import MODEL_HELP, load_run_model
from headwater.extractor.settings import INDICES, MODEL, TEXT
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

    from headwater.extractor.model.weights import Checkpoint

N_TOKENS = 32
MIN_ROWS = 20
N_GROUPS = 16
N_RANDOM = 399
GROUPED = ("rows", "rows_both", "attended", "attended_both", "mass", "mass_both")
CONVENTIONS = (
    "Sampled rows as in `heads`; of each the keys but the first visible one and the query's own. A row attends to the "
    "token of its largest such key; mass: the sum over a token's keys. Candidate tokens are those named, or the most "
    "frequent ones of the run. a is preferred to b where, among rows that hold both (`min_rows` at least), more attend "
    "to a than to b. favourite [rank]: tokens by the number of others to which they are preferred, minus that of those "
    "preferred to them; of equal ones the one attended to more often where it is there. second_absent: P(attends 2nd | "
    "1st absent), second_present: P(attends 2nd | 1st present), both among rows that hold the 2nd; second_effect: "
    "their difference, second_error its standard error over sequences (jackknife over n_groups groups of them, for "
    "rows of a sequence are not independent). transitivity: share of the triples with a preferred to b, b to c, and a "
    "and c compared, in which a is preferred to c. Both arise without any order: a token that is more often there is "
    "attended to more often, and the absence of one leaves more room for others. *_null: the mean over 399 heads that "
    "attend to a random key of the same rows (one number for all heads); *_p: the share of them with as much, "
    "one-sided, at least .0025. withheld_mass: mass on the 2nd where the 1st is absent, minus where it is present; "
    "ov_own: logit that the head adds for a token to itself, W_E → ln_1 → W_V W_O → W_U, biases of V in, ln_f left "
    "out, minus its mean over the vocabulary; ov_top the largest such logit, of ov_top_token; withheld_own, "
    "withheld_top: withheld_mass times these, of the 2nd."
)


class Favourites(Reducer):
    """Counts of rows that hold candidate tokens, and of what each head attends to there.

    State, by group of sequences (G): rows [G, V], rows_both [G, V, V]; attended [G, L, N, V], attended_both [G, L, N,
    V (there), V (attended)], and mass and mass_both alike; random_attended [R, V] and random_attended_both [R, V, V]
    of R heads that attend to a random key of the same rows.
    """

    name = "favourites"
    sites = ("pattern",)

    def __init__(
        self,
        run: Run,
        leads: Sequence[int],
        n_sequences: int,
        queries: np.ndarray,
        tokens: np.ndarray,
    ) -> None:
        self.leads = tuple(leads)
        self.queries = queries
        self.candidates = tokens
        self.n_head, self.length = run["pattern"].shape[2], run.manifest.n_positions
        n = run.manifest.n_sequences
        chosen = np.linspace(0, n - 1, min(n_sequences, n)).round().astype(np.int64)
        self.group = {sequence: slot % N_GROUPS for slot, sequence in enumerate(chosen.tolist())}
        self.n_groups = min(N_GROUPS, len(self.group))

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        v = len(self.candidates)
        grid = (self.n_groups, len(self.leads), self.n_head)
        state = {
            "rows": np.zeros((self.n_groups, v)),
            "rows_both": np.zeros((self.n_groups, v, v)),
            "random_attended": np.zeros((N_RANDOM, v)),
            "random_attended_both": np.zeros((N_RANDOM, v, v)),
        }
        for name in ("attended", "mass"):
            state[name] = np.zeros((*grid, v), np.float32)
            state[f"{name}_both"] = np.zeros((*grid, v, v), np.float32)
        return state

    @property
    def working_bytes(self) -> int:
        """Bytes of the sampled rows of a sequence, and of their sums by token."""
        v = len(self.candidates)
        of_heads = self.n_head * (self.length * 24 + v * 32) + v * 16
        of_random_heads = N_RANDOM * (v + 3) * 8
        return len(self.queries) * (of_heads + of_random_heads) + self.length * v * 8

    def update(self, state: State, chunk: Chunk) -> None:
        """Add one layer of some sequences."""
        assert self.leads is not None
        at = self.leads.index(chunk.lead)
        for s, pattern_NQK in enumerate(chunk["pattern"]):
            group = self.group.get(chunk.first + s)
            if group is None:
                continue
            start = chunk.row_start_ST[s, self.queries]
            real = start < self.queries - 1
            queries = self.queries[real]
            start = start[real]
            keys = np.arange(self.length)
            rest_RK = (keys > start[:, None]) & (keys < queries[:, None])
            member_KV = (chunk.tokens_ST[s][:, None] == self.candidates).astype(np.float64)
            there_RV = (rest_RK @ member_KV) > 0
            rows = np.where(rest_RK, pattern_NQK[:, queries].astype(np.float64), 0.0)
            attended = member_KV[np.where(rest_RK, rows, -1.0).argmax(-1)]
            mass = rows @ member_KV
            there_VR = there_RV.T.astype(np.float64)
            if at == 0:
                state["rows"][group] += there_RV.sum(0)
                state["rows_both"][group] += there_VR @ there_RV
                self._random(state, chunk.first + s, start, queries, member_KV, there_VR)
            for name, value in (("attended", attended), ("mass", mass)):
                state[name][group, at] += value.sum(1)
                state[f"{name}_both"][group, at] += there_VR @ value

    def _random(
        self,
        state: State,
        sequence: int,
        start_R: np.ndarray,
        queries_R: np.ndarray,
        member_KV: np.ndarray,
        there_VR: np.ndarray,
    ) -> None:
        """Add heads that attend to any key but the first and the query's own; the draw depends on the sequence."""
        rng = np.random.default_rng(sequence)
        n_keys = queries_R - start_R - 1
        keys = start_R + 1 + rng.integers(0, n_keys, (N_RANDOM, len(n_keys)))
        attended = member_KV[keys]  # [random head, R, V]
        state["random_attended"] += attended.sum(1)
        state["random_attended_both"] += there_VR @ attended

    def finalise(self, state: State) -> State:
        """Return the state: `favourites` reads it."""
        return state


@dataclass(frozen=True)
class FavouritesAnalysis(Analysis):
    """Find every head's favourite tokens on sampled rows of stored patterns, and what their presence withholds.

    `tokens` are the candidates, by default the 32 most frequent of the run. Returns a dataset of the quantities of
    CONVENTIONS by layer, head and rank, with token strings where the run has a tokenizer.
    """

    name = "favourites"
    title = (
        "what heads attend to second when their favourite is absent, and the logits withheld "
        "(needs the model)"
    )
    needs = (("pattern",),)
    section = "Heads compared"

    layers: str | Iterable[int] | None = setting(None, INDICES, LAYERS_HELP, "LAYERS")
    n_sequences: int = setting(N_SEQUENCES, COUNT, "sampled rows", "SEQUENCES", flag="--sequences")
    n_queries: int = setting(
        N_QUERIES, COUNT, "sampled queries of a row", "QUERIES", flag="--queries"
    )
    queries: Sequence[int] | None = setting(
        None, numbers_from(0), QUERIES_HELP, "LIST", flag="--query-positions"
    )
    tokens: Sequence[int] | None = setting(
        None, numbers_from(0), "ids of the candidate tokens; by default the 32 most frequent", "IDS"
    )
    min_rows: int = setting(
        MIN_ROWS, COUNT, "rows that must hold two tokens for their order to count", "ROWS"
    )
    model: str | None = setting(None, TEXT, MODEL_HELP, "MODEL", leads=MODEL)

    def prepare(self, run: Run, state_bytes: int = 0) -> Prepared:
        """Make it ready for the engine; it takes one pass."""
        n_sequences = self.n_sequences
        n_queries = self.n_queries
        min_rows = self.min_rows
        chosen = pattern_layers(run, self.layers)
        if n_sequences < 1 or n_queries < 1 or min_rows < 1:
            raise ValueError(
                f"n_sequences, n_queries, min_rows are {n_sequences}, {n_queries}, {min_rows}; "
                "expected at least 1 each."
            )
        candidates = _candidates(run, self.tokens)
        checkpoint = load_run_model(run, self.model)
        places = sampled_queries(run.manifest.n_positions, n_queries, self.queries)
        leads = [run.leads("pattern").index(layer) for layer in chosen]

        def steps() -> Steps:
            (state,) = yield [Favourites(run, leads, n_sequences, places, candidates)]
            return _dataset(run, chosen, leads, state, candidates, checkpoint, min_rows, prepared)

        arguments = {
            "layers": chosen,
            "sequences": n_sequences,
            "min_rows": min_rows,
            "random_heads": N_RANDOM,
            "tokens": candidates.tolist(),
            "queries": n_queries if self.queries is None else places.tolist(),
        }
        prepared = Prepared("favourites", 1, steps, arguments)
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the largest effect of a missing favourite, its head, and how transitive preferences are."""
        effect = result.second_effect.values
        if not np.isfinite(effect).any():
            return {"second_effect": "no head with rows enough"}
        layer, head = np.unravel_index(np.nanargmax(effect), effect.shape)
        return {
            "largest_second_effect": rounded_one(effect[layer, head]),
            "head": f"L{int(result.layer[layer])}H{int(result['head'][head])}",
            "its_error_over_sequences": rounded_one(result.second_error.values[layer, head]),
            "mean_transitivity": rounded_one(np.nanmean(result.transitivity.values)),
            "transitivity_of_random_attention": rounded_one(result.transitivity_null),
        }


favourites = as_function(FavouritesAnalysis)


def _candidates(run: Run, tokens: Sequence[int] | None) -> np.ndarray:
    if tokens is not None:
        named = np.unique(np.array(list(tokens), np.int64))
        if len(named) < 2 or named[0] < 0 or named[-1] >= run.manifest.model["config"]["d_vocab"]:
            raise ValueError(
                f"tokens are {named.tolist()}; expected two or more ids of the vocabulary."
            )
        return named
    ids = run.tokens
    counts = np.bincount(ids[ids >= 0].ravel())
    most = np.argsort(-counts, kind="stable")[:N_TOKENS]
    return np.sort(most[counts[most] > 0])


def preferences(
    attended_both_VV: np.ndarray, rows_both_VV: np.ndarray, min_rows: int
) -> np.ndarray:
    """Return 1 where the row's token is preferred to the column's, −1 where the other is, 0 where neither: [V, V].

    `attended_both[a, b]` counts rows that hold a and attend to b.
    """
    enough = (rows_both_VV >= min_rows) & ~np.eye(len(rows_both_VV), dtype=bool)
    return np.where(enough, np.sign(attended_both_VV.T - attended_both_VV), 0)


def transitivity(prefer_VV: np.ndarray) -> tuple[float, int]:
    """Return the share of compared triples a ≻ b ≻ c in which a ≻ c, and their number; NaN where there is none."""
    wins = (prefer_VV > 0).astype(np.float64)
    chains = wins @ wins
    compared = float((chains * (prefer_VV != 0)).sum())
    return (float((chains * wins).sum()) / compared if compared else np.nan), int(compared)


def ov_logits(checkpoint: Checkpoint, layer: int, tokens: np.ndarray) -> np.ndarray:
    """Return what every head adds to the logits for each of some tokens, centred over d_vocab: [N, V, d_vocab]."""
    import torch

    from headwater.analysis.weights.circuits import head_weights
    from headwater.analysis.weights.directions import unembedding

    c = checkpoint.config
    t = checkpoint.tensors
    embedded = t["wte.weight"].double()[torch.from_numpy(tokens)]
    gamma, beta = (t[f"h.{layer}.ln_1.{name}"].double() for name in ("weight", "bias"))
    x = torch.nn.functional.layer_norm(embedded, (c.d_model,), gamma, beta, c.layer_norm_epsilon)
    *_, w_v, w_o = head_weights(checkpoint, layer)
    bias = t[f"h.{layer}.attn.c_attn.bias"].double()[2 * c.d_model :].view(c.n_head, 1, c.d_head)
    logits = (x @ w_v + bias) @ w_o @ unembedding(checkpoint).double().T
    return (logits - logits.mean(-1, keepdim=True)).numpy()


def _dataset(
    run: Run,
    layers: list[int],
    leads: list[int],
    state: State,
    tokens: np.ndarray,
    checkpoint: Checkpoint,
    min_rows: int,
    prepared: Prepared,
) -> Any:
    import xarray

    coords = coordinates(run, "pattern", leads)
    heads = [int(h) for h in coords["head"]]
    grid = state["attended"].shape[1:3]
    total = {name: state[name].sum(0, dtype=np.float64) for name in GROUPED}
    names = (
        "second_absent",
        "second_present",
        "second_effect",
        "second_error",
        "second_effect_p",
        "transitivity",
        "transitivity_p",
        "triples",
        "withheld_mass",
        "ov_own",
        "ov_top",
        "ov_top_token",
        "withheld_own",
        "withheld_top",
    )
    out = {name: np.full(grid, np.nan) for name in names}
    ranked = np.empty((*grid, len(tokens)), np.int64)
    null = _random_figures(state, total, min_rows)
    for i, layer in enumerate(layers):
        logits = ov_logits(checkpoint, layer, tokens)[heads]
        for j in range(grid[1]):
            one = _head(state, total, i, j, min_rows)
            one |= {f"{name}_p": _share_as_large(null[name], one[name]) for name in null}
            ranked[i, j] = tokens[one["order"]]
            second = int(one["order"][1])
            own = {
                "ov_own": logits[j, second, tokens[second]],
                "ov_top": logits[j, second].max(),
                "ov_top_token": logits[j, second].argmax(),
            }
            withheld = {
                f"withheld_{what}": one["withheld_mass"] * own[f"ov_{what}"]
                for what in ("own", "top")
            }
            for name, value in (one | own | withheld).items():
                if name in out:
                    out[name][i, j] = value
    variables: dict[str, Any] = {name: (("layer", "head"), value) for name, value in out.items()}
    variables["favourite"] = ("layer", "head", "rank"), ranked
    for name, values in null.items():
        there = values[np.isfinite(values)]
        variables[f"{name}_null"] = (), float(there.mean()) if len(there) else np.nan
    variables["n_groups"] = (), len(state["rows"])
    from headwater.extractor.tokenizer import load_run_tokenizer

    coder = load_run_tokenizer(run)
    if coder is not None:
        strings = coder.token_strings(ranked.ravel())
        variables["favourite_text"] = (
            ("layer", "head", "rank"),
            np.array(strings, object).reshape(ranked.shape),
        )
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes)


def _random_figures(state: State, total: State, min_rows: int) -> dict[str, np.ndarray]:
    """Return second_effect and transitivity of the heads that attend at random."""
    heads = zip(state["random_attended"], state["random_attended_both"], strict=True)
    found = [_figures(total, attended, both, min_rows) for attended, both in heads]
    names = ("second_effect", "transitivity")
    return {name: np.array([one[name] for one in found]) for name in names}


def random_p_values(state: State, min_rows: int = MIN_ROWS) -> dict[str, np.ndarray]:
    """Return second_effect_p and transitivity_p of every head of a reducer's state, [L, N], by quantity."""
    total = {name: state[name].sum(0, dtype=np.float64) for name in GROUPED}
    null = _random_figures(state, total, min_rows)
    grid = total["attended"].shape[:2]
    out = {name: np.full(grid, np.nan) for name in null}
    for at in np.ndindex(*grid):
        own = _figures(total, total["attended"][at], total["attended_both"][at], min_rows)
        for name, values in null.items():
            out[name][at] = _share_as_large(values, own[name])
    return out


def _share_as_large(null: np.ndarray, value: float) -> float:
    """Return the share of a null that is as large as a value, the value counted with it; NaN where either is none."""
    there = null[np.isfinite(null)]
    if not len(there) or np.isnan(value):
        return np.nan
    return float((1 + (there >= value - 1e-12).sum()) / (1 + len(there)))


def _figures(
    total: State, attended: np.ndarray, attended_both: np.ndarray, min_rows: int
) -> dict[str, Any]:
    """Return the order of the candidate tokens and what it says, from counts [V] and [V, V] of one head."""
    rows = total["rows"]
    both = total["rows_both"]
    prefer = preferences(attended_both, both, min_rows)
    rate = attended / np.maximum(rows, 1)
    order = np.lexsort((-rate, -prefer.sum(1)))
    first = int(order[0])
    second = int(order[1])
    present, absent = _rates(rows, both, attended, attended_both, first, second)
    share, n_triples = transitivity(prefer)
    return {
        "order": order,
        "transitivity": share,
        "triples": n_triples,
        "second_absent": absent,
        "second_present": present,
        "second_effect": absent - present,
    }


def _rates(
    rows: np.ndarray,
    both: np.ndarray,
    value: np.ndarray,
    value_both: np.ndarray,
    first: int,
    second: int,
) -> tuple[Any, Any]:
    """Return what goes to the second per row that holds it, with the first there and not; the last dimensions are V."""
    n_present = both[..., first, second]
    n_absent = rows[..., second] - n_present
    to_present = value_both[..., first, second]
    with np.errstate(invalid="ignore", divide="ignore"):
        return to_present / n_present, (value[..., second] - to_present) / n_absent


def _head(state: State, total: State, layer: int, head: int, min_rows: int) -> dict[str, Any]:
    """Return the figures of one head with their errors, and its order of the candidate tokens."""
    own = {
        name: total[name][layer, head]
        for name in ("attended", "attended_both", "mass", "mass_both")
    }
    figures = _figures(total, own["attended"], own["attended_both"], min_rows)
    first, second = (int(token) for token in figures["order"][:2])
    mass_present, mass_absent = _rates(
        total["rows"], total["rows_both"], own["mass"], own["mass_both"], first, second
    )
    # leave out a group of sequences at a time, with the pair of tokens held
    present, absent = _rates(
        total["rows"] - state["rows"],
        total["rows_both"] - state["rows_both"],
        own["attended"] - state["attended"][:, layer, head],
        own["attended_both"] - state["attended_both"][:, layer, head],
        first,
        second,
    )
    left_out = absent - present
    n = len(left_out)
    error = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()) if n > 1 else np.nan
    return figures | {"second_error": error, "withheld_mass": mass_absent - mass_present}
