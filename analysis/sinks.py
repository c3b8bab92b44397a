"""Attention sinks: first-token share, Sink_k^ε, entropies, received attention, distance, transitions, word share.

From stored patterns or from stored row statistics; the two agree within 1e-5 for float32 patterns and 2e-3 for float16
ones (whose rows add up to 1 only within that).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.engine import ONE_BY_ONE, Analysis, Scan, Steps, analyse, as_run
from headwater.analysis.reducer import State
from headwater.analysis.results import coordinates, provenance
from headwater.analysis.sink_rows import QUERY_SETS, ROW_QUANTITIES, STATISTIC_SITES, WORD_REACH, Sinks, Words
from headwater.analysis.transition import Step, transitions
from headwater.store.manifest import RunError
from headwater.store.reader import Run

EPSILON, WINDOW, FEW_ROWS = 0.3, 64, 16
NAMES = {
    "share": "first_token_share",
    "entropy": "entropy",
    "entropy_normalised": "entropy_normalised",
    "entropy_non_sink": "entropy_non_sink",
    "distance": "distance",
}
CONVENTIONS = (
    "Means over real queries, pooled over sequences; a segment is a document of a packed row or the real part of a "
    "row, first is its first visible key. query_set all, second_half of each segment (arXiv 2604.14722), last_64 of "
    "each segment. first_token_share: mass on the first key. entropy in nats; entropy_normalised: over ln(visible "
    "keys), rows with one key left out; entropy_non_sink: entropy of the mass that is not on the first key, "
    "renormalised, over ln(visible keys − 1), rows with fewer than 3 keys or less than 0.001 of such mass left out. "
    "received [key, relative to the first]: α_k, mean mass on the key per row that can see it; sink_rate: fraction of "
    "segments with α_k > ε; sink_rate_window: the same over the first `window` positions of each segment that has "
    "them (Gu et al. 2024, T = 64); sink_metric its mean over layers and heads. few_rows: fewer than 16 rows see the "
    "key. l_in, l_out: steps up and then down in the second-half share by layer (R² ≥ .5, at least .1); −1 is none. "
    "attn_word: mass on earlier tokens of the query's word over that on keys at the same distances outside it, first "
    "keys left out."
)


def sinks_analysis(
    run: Run,
    epsilon: float = EPSILON,
    window: int = WINDOW,
    source: str = "auto",
    words: bool | None = None,
    layers: Iterable[int] | None = None,
) -> Analysis:
    """Describe `sinks` for the engine; it takes one pass."""
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon is {epsilon}; expected a number between 0 and 1.")
    if window < 1:
        raise ValueError(f"window is {window}; expected a number of positions from 1 on.")
    source = _source(run, source)
    site = "pattern" if source == "pattern" else STATISTIC_SITES[0]
    stored = run.leads(site)
    chosen = stored if layers is None else list(layers)
    if not chosen or set(chosen) - set(stored):
        raise RunError(f"{run.path} holds {site} at layers {stored}, but {chosen} was asked for.")
    table = _words(run, source, words)
    leads = [stored.index(layer) for layer in chosen]
    window = min(window, run.manifest.n_positions)

    def steps() -> Steps:
        (state,) = yield [Sinks(run, source, epsilon, window, leads, table)]
        return _dataset(run, site, leads, state, analysis)

    arguments = {"epsilon": epsilon, "window": window, "source": source, "words": table is not None, "layers": chosen}
    analysis = Analysis("sinks", 1, steps, arguments)
    return analysis


def sinks(
    run: Run | str | Path,
    epsilon: float = EPSILON,
    window: int = WINDOW,
    source: str = "auto",
    words: bool | None = None,
    layers: Iterable[int] | None = None,
    scan: Scan = ONE_BY_ONE,
) -> Any:
    """Measure attention sinks of every layer and head in one pass over the run.

    `source` is "pattern", "statistics" (attn_entropy, attn_sink, attn_distance, attn_received) or "auto": patterns
    where the run holds them. Statistics cannot give sink_rate_window unless `window` is the whole row, nor attn_word.
    `words` asks for attn_word, which needs patterns and the run's tokenizer; None computes it where both are there.

    Returns a dataset with the quantities of CONVENTIONS by query_set, layer, head and key.
    """
    run = as_run(run)
    return analyse(run, [sinks_analysis(run, epsilon, window, source, words, layers)], scan)[0]


def _source(run: Run, source: str) -> str:
    if source not in ("auto", "pattern", "statistics"):
        raise ValueError(f"source is {source!r}; expected 'auto', 'pattern' or 'statistics'.")
    held = {"pattern": "pattern" in run.sites, "statistics": set(STATISTIC_SITES) <= set(run.sites)}
    found = next((name for name, there in held.items() if there), None) if source == "auto" else source
    if found is None or not held[found]:
        raise RunError(
            f"{run.path} holds {', '.join(run.sites)}; sinks need {'pattern or ' if source == 'auto' else ''}"
            f"{'pattern' if source == 'pattern' else ', '.join(STATISTIC_SITES)}. Extract a run with "
            "--preset statistics or --sites pattern."
        )
    return found


def _words(run: Run, source: str, words: bool | None) -> Words | None:
    """Build the table of token ids for attn_word."""
    path = run.path / "tokenizer.json"
    there = source == "pattern" and path.is_file()
    if words and not there:
        raise RunError(
            f"{run.path} has no {'tokenizer' if source == 'pattern' else 'pattern'}; attn_word needs stored patterns "
            "and a run made from text."
        )
    if words is False or not there:
        return None
    from headwater.extractor.tokenizer import load_tokenizer

    strings = load_tokenizer(path).token_strings(range(run.manifest.model["config"]["d_vocab"]))
    begins = np.array([text[:1].isalnum() for text in strings])
    return Words(begins, np.array([text[-1:].isalnum() for text in strings]))


def attn_word(mass_2NR: np.ndarray, n_2R: np.ndarray) -> np.ndarray:
    """Return mass on the same word over that on distance-matched other keys, [N]; NaN where no distance has both."""
    both = (n_2R > 0).all(0)
    matched = (mass_2NR[1][:, both] / n_2R[1, both] * n_2R[0, both]).sum(-1)
    return np.where(matched > 0, mass_2NR[0][:, both].sum(-1) / np.where(matched > 0, matched, 1), np.nan)


def _ratio(total: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return total / n, NaN where n is 0."""
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def _dataset(run: Run, site: str, leads: list[int], state: State, analysis: Analysis) -> Any:
    import xarray

    means = dict(zip(ROW_QUANTITIES, _ratio(state["total"], state["n"]), strict=True))
    variables: dict[str, Any] = {NAMES[name]: (("query_set", "layer", "head"), means[name]) for name in ROW_QUANTITIES}
    by_layer = means["share"].mean(-1)
    variables["share_by_layer"] = ("query_set", "layer"), by_layer
    key = ("layer", "head", "key")
    seen = state["n_received"][0]
    variables |= {
        "n_rows": (("query_set",), state["n"][0, :, 0, 0].astype(np.int64)),
        "received": (key, _ratio(state["received"], state["n_received"][:, None])),
        "sink_rate": (key, _ratio(state["above"], state["n_received"][:, None])),
        "received_segments": (("key",), seen.astype(np.int64)),
        "few_rows": (("key",), _ratio(state["rows"][0], seen) < FEW_ROWS),
    }
    if state["n_window"].any():
        rate = _ratio(state["above_window"], state["n_window"][:, None, None])
        variables["sink_rate_window"] = ("layer", "head", "window_key"), rate
        variables["sink_metric"] = ("window_key",), rate.mean((0, 1))
    if state["n_word"].any():
        ratios = [attn_word(state["word"][:, layer], state["n_word"][:, layer]) for layer in range(len(leads))]
        variables["attn_word"] = ("layer", "head"), np.stack(ratios)
        variables["word_mass"] = ("same_word", "layer", "head", "word_distance"), _ratio(
            state["word"], state["n_word"][:, :, None]
        )
    coords = coordinates(run, site, leads) | {"query_set": list(QUERY_SETS)}
    if "attn_word" in variables:
        coords |= {"same_word": [True, False], "word_distance": np.arange(1, WORD_REACH + 1)}
    attributes = provenance(run, analysis.name, analysis.arguments, analysis.passes, CONVENTIONS)
    layers = [int(layer) for layer in coords["layer"]]
    whole = len(layers) == run.manifest.model["config"]["n_layer"]
    steps = transitions(by_layer[QUERY_SETS.index("second_half")]) if whole else (None, None)
    for name, step in zip(("l_in", "l_out"), steps, strict=True):
        variables[name] = _step(step, layers, "none" if whole else "not all layers are there")
    return xarray.Dataset(variables, coords, attributes)


def _step(step: Step | None, layers: list[int], why: str) -> tuple[tuple[()], int, dict[str, Any]]:
    """Return a transition as a scalar variable: the layer after it, −1 for none, with its R² and height, or why not."""
    if step is None:
        return (), -1, {"note": why}
    return (), layers[step.index], {"r2": step.r2, "jump": step.jump}
