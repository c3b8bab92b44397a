"""What a head turns to when its favourite token is missing: second favourites, transitivity, the withheld OV logit.

Shapes: R rows, N heads, K keys, V candidate tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.analysis.circuits import head_weights
from headwater.analysis.engine import ONE_BY_ONE, Analysis, Scan, Steps, analyse, as_run
from headwater.analysis.heads import N_QUERIES, N_SEQUENCES, pattern_layers, sampled_queries
from headwater.analysis.origin import load_run_model
from headwater.analysis.reducer import Chunk, Reducer, State
from headwater.analysis.results import coordinates, provenance
from headwater.analysis.weights import unembedding
from headwater.extractor.weights import Checkpoint
from headwater.store.reader import Run

N_TOKENS, MIN_ROWS = 32, 20
CONVENTIONS = (
    "Sampled rows as in `heads`; of each the keys but the first visible one and the query's own. A row attends to the "
    "token of its largest such key; mass: the sum over a token's keys. Candidate tokens are those named, or the most "
    "frequent ones of the run. a is preferred to b where, among rows that hold both (`min_rows` at least), more attend "
    "to a than to b. favourite [rank]: tokens by the number of others to which they are preferred, minus that of those "
    "preferred to them; of equal ones the one attended to more often where it is there. second_absent: P(attends 2nd | "
    "1st absent), second_present: P(attends 2nd | 1st present), both among rows that hold the 2nd; second_effect: "
    "their difference, second_error its standard error. transitivity: share of the triples with a preferred to b, b "
    "to c, and a and c compared, in which a is preferred to c (a random tournament: 1/2). withheld_mass: mass on the "
    "2nd where the 1st is absent, minus where it is present; ov_own: logit that the head adds for a token to itself, "
    "W_E → ln_1 → W_V W_O → W_U, biases of V in, ln_f left out, minus its mean over the vocabulary; ov_top the largest "
    "such logit, of ov_top_token; withheld_own, withheld_top: withheld_mass times these, of the 2nd."
)


class Favourites(Reducer):
    """Counts of rows that hold candidate tokens, and of what each head attends to there.

    State: rows [V], rows_both [V, V]; attended [L, N, V], attended_both [L, N, V (there), V (attended)], and mass and
    mass_both alike.
    """

    name = "favourites"
    sites = ("pattern",)

    def __init__(
        self, run: Run, leads: Sequence[int], n_sequences: int, queries: np.ndarray, tokens: np.ndarray
    ) -> None:
        self.leads, self.queries, self.candidates = tuple(leads), queries, tokens
        self.n_head, self.length = run["pattern"].shape[2], run.manifest.n_positions
        n = run.manifest.n_sequences
        chosen = np.linspace(0, n - 1, min(n_sequences, n)).round().astype(np.int64)
        self.chosen = frozenset(chosen.tolist())

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        v, shape = len(self.candidates), (len(self.leads), self.n_head)
        state = {"rows": np.zeros(v), "rows_both": np.zeros((v, v))}
        state |= {name: np.zeros((*shape, v)) for name in ("attended", "mass")}
        return state | {name: np.zeros((*shape, v, v)) for name in ("attended_both", "mass_both")}

    @property
    def working_bytes(self) -> int:
        """Bytes of the sampled rows of a sequence, and of their sums by token."""
        v = len(self.candidates)
        return len(self.queries) * (self.n_head * (self.length * 24 + v * 32) + v * 16) + self.length * v * 8

    def update(self, state: State, chunk: Chunk) -> None:
        """Add one layer of some sequences."""
        assert self.leads is not None
        at = self.leads.index(chunk.lead)
        for s, pattern_NQK in enumerate(chunk["pattern"]):
            if chunk.first + s not in self.chosen:
                continue
            start = chunk.row_start_ST[s, self.queries]
            real = start < self.queries - 1
            queries, start = self.queries[real], start[real]
            keys = np.arange(self.length)
            rest_RK = (keys > start[:, None]) & (keys < queries[:, None])
            member_KV = (chunk.tokens_ST[s][:, None] == self.candidates).astype(np.float64)
            there_RV = (rest_RK @ member_KV) > 0
            rows = np.where(rest_RK, pattern_NQK[:, queries].astype(np.float64), 0.0)
            attended = member_KV[np.where(rest_RK, rows, -1.0).argmax(-1)]
            mass = rows @ member_KV
            if at == 0:
                state["rows"] += there_RV.sum(0)
                state["rows_both"] += there_RV.T.astype(np.float64) @ there_RV
            for name, value in (("attended", attended), ("mass", mass)):
                state[name][at] += value.sum(1)
                state[f"{name}_both"][at] += there_RV.T.astype(np.float64) @ value

    def finalise(self, state: State) -> State:
        """Return the state: `favourites` reads it."""
        return state


def favourites_analysis(
    run: Run,
    layers: Iterable[int] | None = None,
    n_sequences: int = N_SEQUENCES,
    n_queries: int = N_QUERIES,
    queries: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    min_rows: int = MIN_ROWS,
    model: str | None = None,
) -> Analysis:
    """Describe `favourites` for the engine; it takes one pass."""
    chosen = pattern_layers(run, layers)
    if n_sequences < 1 or n_queries < 1 or min_rows < 1:
        raise ValueError(
            f"n_sequences, n_queries, min_rows are {n_sequences}, {n_queries}, {min_rows}; expected at least 1 each."
        )
    candidates = _candidates(run, tokens)
    checkpoint = load_run_model(run, model)
    places = sampled_queries(run.manifest.n_positions, n_queries, queries)
    leads = [run.leads("pattern").index(layer) for layer in chosen]

    def steps() -> Steps:
        (state,) = yield [Favourites(run, leads, n_sequences, places, candidates)]
        return _dataset(run, chosen, leads, state, candidates, checkpoint, min_rows, analysis)

    arguments = {"layers": chosen, "sequences": n_sequences, "min_rows": min_rows, "tokens": candidates.tolist(),
                 "queries": n_queries if queries is None else places.tolist()}  # fmt: skip
    analysis = Analysis("favourites", 1, steps, arguments)
    return analysis


def favourites(
    run: Run | str | Path,
    layers: Iterable[int] | None = None,
    n_sequences: int = N_SEQUENCES,
    n_queries: int = N_QUERIES,
    queries: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    min_rows: int = MIN_ROWS,
    model: str | None = None,
    scan: Scan = ONE_BY_ONE,
) -> Any:
    """Find every head's favourite tokens on sampled rows of stored patterns, and what their presence withholds.

    `tokens` are the candidates, by default the 32 most frequent of the run. Returns a dataset of the quantities of
    CONVENTIONS by layer, head and rank, with token strings where the run has a tokenizer.
    """
    run = as_run(run)
    wanted = favourites_analysis(run, layers, n_sequences, n_queries, queries, tokens, min_rows, model)
    return analyse(run, [wanted], scan)[0]


def _candidates(run: Run, tokens: Sequence[int] | None) -> np.ndarray:
    if tokens is not None:
        named = np.unique(np.array(list(tokens), np.int64))
        if len(named) < 2 or named[0] < 0 or named[-1] >= run.manifest.model["config"]["d_vocab"]:
            raise ValueError(f"tokens are {named.tolist()}; expected two or more ids of the vocabulary.")
        return named
    ids = run.tokens
    counts = np.bincount(ids[ids >= 0].ravel())
    most = np.argsort(-counts, kind="stable")[:N_TOKENS]
    return np.sort(most[counts[most] > 0])


def preferences(attended_both_VV: np.ndarray, rows_both_VV: np.ndarray, min_rows: int) -> np.ndarray:
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
    c, t = checkpoint.config, checkpoint.tensors
    embedded = t["wte.weight"].double()[torch.from_numpy(tokens)]
    gamma, beta = (t[f"h.{layer}.ln_1.{name}"].double() for name in ("weight", "bias"))
    x = torch.nn.functional.layer_norm(embedded, (c.d_model,), gamma, beta, c.layer_norm_epsilon)
    *_, w_v, w_o = head_weights(checkpoint, layer)
    bias = t[f"h.{layer}.attn.c_attn.bias"].double()[2 * c.d_model :].view(c.n_head, 1, c.d_head)
    logits = (x @ w_v + bias) @ w_o @ unembedding(checkpoint).double().T
    return (logits - logits.mean(-1, keepdim=True)).numpy()


def _dataset(
    run: Run, layers: list[int], leads: list[int], state: State, tokens: np.ndarray, checkpoint: Checkpoint,
    min_rows: int, analysis: Analysis,
) -> Any:  # fmt: skip
    import xarray

    coords = coordinates(run, "pattern", leads)
    heads, grid = [int(h) for h in coords["head"]], state["attended"].shape[:2]
    names = ("second_absent", "second_present", "second_effect", "second_error", "transitivity", "triples",
             "withheld_mass", "ov_own", "ov_top", "ov_top_token", "withheld_own", "withheld_top")  # fmt: skip
    out = {name: np.full(grid, np.nan) for name in names}
    ranked = np.empty((*grid, len(tokens)), np.int64)
    for i, layer in enumerate(layers):
        logits = ov_logits(checkpoint, layer, tokens)[heads]
        for j in range(grid[1]):
            one = _head(state, i, j, min_rows)
            ranked[i, j] = tokens[one["order"]]
            second = int(one["order"][1])
            own = {"ov_own": logits[j, second, tokens[second]], "ov_top": logits[j, second].max(),
                   "ov_top_token": logits[j, second].argmax()}  # fmt: skip
            withheld = {f"withheld_{what}": one["withheld_mass"] * own[f"ov_{what}"] for what in ("own", "top")}
            for name, value in (one | own | withheld).items():
                if name in out:
                    out[name][i, j] = value
    variables: dict[str, Any] = {name: (("layer", "head"), value) for name, value in out.items()}
    variables["favourite"] = ("layer", "head", "rank"), ranked
    if (run.path / "tokenizer.json").is_file():
        from headwater.extractor.tokenizer import load_tokenizer

        strings = load_tokenizer(run.path / "tokenizer.json").token_strings(ranked.ravel())
        variables["favourite_text"] = ("layer", "head", "rank"), np.array(strings, object).reshape(ranked.shape)
    attributes = provenance(run, analysis.name, analysis.arguments, analysis.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes)


def _head(state: State, layer: int, head: int, min_rows: int) -> dict[str, Any]:
    """Return the figures of one head, and its order of the candidate tokens."""
    rows, both = state["rows"], state["rows_both"]
    attended, attended_both = state["attended"][layer, head], state["attended_both"][layer, head]
    prefer = preferences(attended_both, both, min_rows)
    rate = attended / np.maximum(rows, 1)
    order = np.lexsort((-rate, -prefer.sum(1)))
    first, second = int(order[0]), int(order[1])
    n_present, n_absent = both[first, second], rows[second] - both[first, second]
    figures: dict[str, Any] = {"order": order}
    figures["transitivity"], figures["triples"] = transitivity(prefer)
    if min(n_present, n_absent) < 1:
        return figures | {"withheld_mass": np.nan}
    present = attended_both[first, second] / n_present
    absent = (attended[second] - attended_both[first, second]) / n_absent
    mass, mass_both = state["mass"][layer, head], state["mass_both"][layer, head]
    withheld = (mass[second] - mass_both[first, second]) / n_absent - mass_both[first, second] / n_present
    error = np.sqrt(present * (1 - present) / n_present + absent * (1 - absent) / n_absent)
    return figures | {"second_absent": absent, "second_present": present, "second_effect": absent - present,
                      "second_error": error, "withheld_mass": withheld}  # fmt: skip
