"""Attention sinks: first-token share, Sink_k^ε, entropies, received attention, distance, transitions, word share.

From stored patterns or from stored row statistics; the two agree within 1e-5 for float32 patterns and 2e-3 for float16
ones (whose rows add up to 1 only within that).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import (
    Analysis,
    Figures,
    Plot,
    as_function,
    rounded,
    rounded_one,
)
from headwater.analysis.engine.options import COUNT, FRACTION, setting
from headwater.analysis.engine.reducer import State, chosen_leads
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import Prepared, Steps
from headwater.analysis.measures.sink_rows import (
    QUERY_SETS,
    ROW_QUANTITIES,
    STATISTIC_SITES,
    WORD_REACH,
    Sinks,
    Words,
    ratio_error,
)
from headwater.analysis.measures.transition import CONVENTIONS as TRANSITION_CONVENTIONS
from headwater.analysis.measures.transition import Transition, find_transition
from headwater.extractor.settings import INDICES, SWITCH, one_of
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

EPSILON = 0.3
WINDOW = 64
FEW_ROWS = 16
MEASURED = ("jump", "r2_steps", "r2_line", "bic_steps", "bic_line", "bic_constant", "p")
NAMES = {
    "share": "first_token_share",
    "entropy": "entropy",
    "entropy_normalised": "entropy_normalised",
    "entropy_non_sink": "entropy_non_sink",
    "distance": "distance",
}
CONVENTIONS = (
    "Means over real queries, pooled over sequences; a segment is a document of a packed row or the real part of a "
    "row, first is its first visible key. query_set all, second_half of each segment (from ⌈n/2⌉ of its n positions; "
    "arXiv 2604.14722), last_64 of each segment. first_token_share: mass on the first key. entropy in nats; "
    "entropy_normalised: over ln(visible keys), rows with one key left out; entropy_non_sink: entropy of the mass that "
    "is not on the first key, renormalised, over ln(visible keys − 1), rows with fewer than 3 keys or less than 0.001 "
    "of such mass left out. *_error: standard error over sequences (of n_sequences; NaN for one), rows of a sequence "
    "not being independent. received [key, relative to the first]: α_k, mean mass on the key per row that can see it; "
    "sink_rate: fraction of segments with α_k > ε; sink_rate_window: the same over the first `window` positions of "
    "each segment that has them (Gu et al. 2024, T = 64); sink_metric its mean over layers and heads. few_rows: fewer "
    "than 16 rows see the key. l_in, l_out: the first layer after the rise and after the fall of the second-half share "
    "by layer, NaN where there is none; concentrates_in, concentrates_out: the same for 1 − entropy_non_sink, for "
    "attention may gather on other keys than the first. Their attribute transition says steps, ramp, none, too few "
    f"layers, or what is missing. {TRANSITION_CONVENTIONS} attn_word: mass on earlier tokens of the query's word over "
    "that on keys at the same distances outside it, first keys left out."
)


@dataclass(frozen=True)
class SinksAnalysis(Analysis):
    """Measure attention sinks of every layer and head in one pass over the run.

    `source` is "pattern", "statistics" (attn_entropy, attn_sink, attn_distance, attn_received) or "auto": patterns
    where the run holds them. Statistics cannot give sink_rate_window unless `window` is the whole row, nor attn_word.
    `words` asks for attn_word, which needs patterns and the run's tokenizer; None computes it where both are there.

    Returns a dataset with the quantities of CONVENTIONS by query_set, layer, head and key.
    """

    name = "sinks"
    title = "first-token share, Sink_k, entropies, received attention, distance, word share, l_in and l_out"
    needs = (("pattern",), STATISTIC_SITES)
    section = "Attention sinks and the transition"
    brings = ("false_sinks",)
    plots = (
        Plot(
            "sink_layers",
            "Mass on the first key by layer, the transition, and how evenly the rest lies.",
            "headwater.analysis.plots.attention:sink_layers",
        ),
        Plot(
            "sink_map",
            "Mass on the first key, second-half queries, head by head.",
            "headwater.analysis.plots.attention:sink_map",
            together=False,
        ),
        Plot(
            "received",
            "What every key receives; keys that fewer than 16 rows see are left out. Dark: early "
            "layers, light: late.",
            "headwater.analysis.plots.attention:received",
            together=False,
        ),
        Plot(
            "words",
            "Mass on earlier tokens of the query's own word over that on other keys at the same "
            "distances; above 0: more.",
            "headwater.analysis.plots.attention:words",
            together=False,
            variable="attn_word",
        ),
    )

    epsilon: float = setting(EPSILON, FRACTION, "ε of Sink_k^ε", "EPSILON")
    window: int = setting(WINDOW, COUNT, "T of Sink_k^ε", "WINDOW")
    source: str = setting(
        "auto", one_of("auto", "pattern", "statistics"), "pattern, statistics or auto", "SOURCE"
    )
    words: bool | None = setting(
        None,
        SWITCH,
        "attn_word, which needs patterns and a tokenizer; by default where both are there",
    )
    layers: str | Iterable[int] | None = setting(
        None, INDICES, "layers: 0,4:8, -1; by default all that are stored", "LAYERS"
    )

    def alternatives(self) -> tuple[tuple[str, ...], ...]:
        """Return the sites of the source that is named."""
        return {"pattern": (("pattern",),), "statistics": (STATISTIC_SITES,)}.get(
            self.source, self.needs
        )

    def prepare(self, run: Run, state_bytes: int = 0) -> Prepared:
        """Make it ready for the engine; it takes one pass."""
        epsilon = self.epsilon
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon is {epsilon}; expected a number between 0 and 1.")
        if self.window < 1:
            raise ValueError(f"window is {self.window}; expected a number of positions from 1 on.")
        source = _source(run, self.source)
        site = "pattern" if source == "pattern" else STATISTIC_SITES[0]
        stored = run.leads(site)
        chosen = chosen_leads(run, site, self.layers)
        table = _words(run, source, self.words)
        leads = [stored.index(layer) for layer in chosen]
        window = min(self.window, run.manifest.n_positions)

        def steps() -> Steps:
            (state,) = yield [Sinks(run, source, epsilon, window, leads, table)]
            return _dataset(run, site, leads, state, prepared)

        arguments = {
            "epsilon": epsilon,
            "window": window,
            "source": source,
            "words": table is not None,
            "layers": chosen,
        }
        prepared = Prepared("sinks", 1, steps, arguments)
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the layers of the transition, the share by layer, and the strongest head."""
        share = result.first_token_share.sel(query_set="second_half")
        layer, head = np.unravel_index(np.nanargmax(share.values), share.shape)
        return {
            "l_in": _layer(result.l_in),
            "l_out": _layer(result.l_out),
            "concentrates_in": _layer(result.concentrates_in),
            "second_half_share": rounded(result.share_by_layer.sel(query_set="second_half")),
            "strongest_head": f"L{int(result.layer[layer])}H{int(result['head'][head])}",
            "strongest_share": rounded_one(share.values[layer, head]),
        }


sinks = as_function(SinksAnalysis)


def _layer(value: xarray.DataArray) -> int | str:
    """Return a layer, or why there is none: ramp, none, too few layers and so on."""
    if np.isfinite(value):
        return int(value)
    said = str(value.attrs["transition"])
    return "none" if said == "steps" else said


def _source(run: Run, source: str) -> str:
    if source not in ("auto", "pattern", "statistics"):
        raise ValueError(f"source is {source!r}; expected 'auto', 'pattern' or 'statistics'.")
    held = {"pattern": "pattern" in run.sites, "statistics": set(STATISTIC_SITES) <= set(run.sites)}
    found = (
        next((name for name, there in held.items() if there), None) if source == "auto" else source
    )
    if found is None or not held[found]:
        raise RunError(
            f"{run.path} holds {', '.join(run.sites)}; sinks need {'pattern or ' if source == 'auto' else ''}"
            f"{'pattern' if source == 'pattern' else ', '.join(STATISTIC_SITES)}. Extract a run with "
            "--preset statistics or --sites pattern."
        )
    return found


def _words(run: Run, source: str, words: bool | None) -> Words | None:
    """Build the table of token ids for attn_word."""
    there = source == "pattern" and "tokenizer.json" in run.manifest.statics
    if words and not there:
        raise RunError(
            f"{run.path} has no {'tokenizer' if source == 'pattern' else 'pattern'}; attn_word needs stored patterns "
            "and a run made from text."
        )
    if words is False or not there:
        return None
    from headwater.extractor.tokenizer import load_run_tokenizer

    coder = load_run_tokenizer(run)
    assert coder is not None
    strings = coder.token_strings(range(run.manifest.model["config"]["d_vocab"]))
    begins = np.array([text[:1].isalnum() for text in strings])
    return Words(begins, np.array([text[-1:].isalnum() for text in strings]))


def attn_word(mass_2NR: np.ndarray, n_2R: np.ndarray) -> np.ndarray:
    """Return mass on the same word over that on distance-matched other keys, [N]; NaN where no distance has both."""
    both = (n_2R > 0).all(0)
    matched = (mass_2NR[1][:, both] / n_2R[1, both] * n_2R[0, both]).sum(-1)
    return np.where(
        matched > 0, mass_2NR[0][:, both].sum(-1) / np.where(matched > 0, matched, 1), np.nan
    )


def _ratio(total: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return total / n, NaN where n is 0."""
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def _dataset(
    run: Run, site: str, leads: list[int], state: State, prepared: Prepared
) -> xarray.Dataset:
    import xarray

    means = dict(zip(ROW_QUANTITIES, _ratio(state["total"], state["n"]), strict=True))
    errors = ratio_error(state["total"], state["n"], state["products"], state["n_sequences"])
    by_head = ("query_set", "layer", "head")
    variables: dict[str, Any] = {NAMES[name]: (by_head, means[name]) for name in ROW_QUANTITIES}
    variables |= {
        f"{NAMES[name]}_error": (by_head, error)
        for name, error in zip(ROW_QUANTITIES, errors, strict=True)
    }
    by_layer = {name: means[name].mean(-1) for name in ("share", "entropy_non_sink")}
    n_rows = state["n"][0, ..., 0]
    n_sequences = state["n_sequences"][0, ..., 0]
    share_error = ratio_error(
        state["total"][0].mean(-1), n_rows, state["layer_products"], n_sequences
    )
    variables |= {
        "share_by_layer": (("query_set", "layer"), by_layer["share"]),
        "share_by_layer_error": (("query_set", "layer"), share_error),
        "entropy_non_sink_by_layer": (("query_set", "layer"), by_layer["entropy_non_sink"]),
        "n_sequences": (("query_set",), n_sequences[:, 0].astype(np.int64)),
    }
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
        ratios = [
            attn_word(state["word"][:, layer], state["n_word"][:, layer])
            for layer in range(len(leads))
        ]
        variables["attn_word"] = ("layer", "head"), np.stack(ratios)
        variables["word_mass"] = (
            ("same_word", "layer", "head", "word_distance"),
            _ratio(state["word"], state["n_word"][:, :, None]),
        )
    coords: dict[str, Any] = coordinates(run, site, leads) | {
        "query_set": list(QUERY_SETS),
        "key": np.arange(len(seen)),
    }
    if "sink_metric" in variables:
        coords["window_key"] = np.arange(rate.shape[-1])
    if "attn_word" in variables:
        coords |= {"same_word": [True, False], "word_distance": np.arange(1, WORD_REACH + 1)}
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    layers = [int(layer) for layer in coords["layer"]]
    whole = len(layers) == run.manifest.model["config"]["n_layer"]
    half = QUERY_SETS.index("second_half")
    for names, series in (
        (("l_in", "l_out"), by_layer["share"][half]),
        (("concentrates_in", "concentrates_out"), 1 - by_layer["entropy_non_sink"][half]),
    ):
        for name, value, found in zip(names, *_transition(series, layers, whole), strict=True):
            variables[name] = (), value, found
    return xarray.Dataset(variables, coords, attributes)


def _transition(
    series: np.ndarray, layers: list[int], whole: bool
) -> tuple[list[float], list[dict[str, Any]]]:
    """Return the layers after a rise and after a fall, NaN for none, and the attributes that say what was found."""
    if not whole:
        found = Transition("not all layers are there")
    elif not np.isfinite(series).all():
        found = Transition("no rows in some layers")
    else:
        found = find_transition(series)
    places = [np.nan if at is None else float(layers[at]) for at in (found.into, found.out)]
    said = {"transition": found.kind}
    measured = {name: getattr(found, name) for name in MEASURED}
    said |= {name: value for name, value in measured.items() if np.isfinite(value)}
    return places, [said, said]
