"""Do the directions of a model's weights mean something, and does that change where attention does?

A direction is coherent where the tokens at one of its ends stand near each other in a reference corpus more than those
of random directions do. Fractions by layer are set beside the first-token share of attention and its transition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.analysis.coherence_layers import HEAD_KINDS, KINDS, class_mixes, fractions, head_shares, transition
from headwater.analysis.corpora import MAX_TOKENS, open_corpus
from headwater.analysis.npmi import WINDOW, Corpus, count_windows, pair_keys
from headwater.analysis.token_classes import CLASSES
from headwater.analysis.token_classes import CONVENTIONS as CLASS_CONVENTIONS
from headwater.analysis.weights import model_provenance, read_tokens, token_strings, unembedding, weights_of
from headwater.extractor.weights import Checkpoint, load_checkpoint
from headwater.store.reader import Run

N_RANDOM, QUANTILE, N_BOOTSTRAP = 1000, 0.99, 1000
CONVENTIONS = (
    "npmi: mean over all pairs of the top tokens of one end of a direction, NPMI over Boolean sliding windows of the "
    "reference corpus; a pair that shares no window counts −1. score: the better of both ends. coherent: score above "
    "the threshold, the given quantile of the scores of random Gaussian directions read through the same matrix. "
    "coherent_fraction [kind, layer] over the first directions (of all heads); low and high: Wilson's 95 % interval, "
    "which takes directions for independent; band_low and band_high: 95 % bootstrap over heads, or over directions of "
    "the MLP. before, after: mean of coherent_fraction over the layers before l_in and from it on; difference: after − "
    "before; difference_p: share of circular shifts of the layers with a difference as large, two-sided, at least "
    "1/n_layer. rise: middle third of the layers minus the first third; dip: middle minus the last third; low and "
    "high of both: 95 % bootstrap. share_coherence: Spearman's correlation over the heads of a layer between "
    "second-half first-token share and the head's coherent fraction (measure fraction) or mean score (measure score); "
    "share_coherence_p: of its mean over layers, heads permuted within layers. qk_query, qk_key: the two sides of QK "
    f"circuits, which compare tokens and write none. {CLASS_CONVENTIONS} class_change: half the summed difference of "
    "the mixes from l_in on and before, class_change_p as for difference."
)


@dataclass(frozen=True)
class Settings:
    """How directions are scored: how many of them, top tokens, window, random directions, quantile, resamples, seed."""

    n_directions: int = 30
    n_top: int = 20
    window: int = WINDOW
    n_random: int = N_RANDOM
    quantile: float = QUANTILE
    n_bootstrap: int = N_BOOTSTRAP
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"n_directions": 1, "n_top": 2, "window": 2, "n_random": 20, "n_bootstrap": 20}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}.")
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile is {self.quantile}; expected a number between 0 and 1.")


STANDARD = Settings()


def coherence(
    model: str,
    corpus: Run | str | Path | Sequence[str | Path],
    sinks: Any = None,
    settings: Settings = STANDARD,
    max_tokens: int = MAX_TOKENS,
    revision: str | None = None,
) -> Any:
    """Score the SVD directions of every OV, QK, W_in and W_out of a model on a reference corpus.

    `corpus` is a run of the model, or text: a file, directory, glob or several. `sinks` is a result of `sinks` of the
    same model; with it the scores are set beside the transition l_in and the heads' first-token shares.

    Returns a dataset of the quantities of CONVENTIONS by kind (KINDS) and layer, and for every direction <kind>_npmi
    [sign, layer(, head), rank or mlp_rank], <kind>_coherent, and the tokens <kind>_token [sign, ..., top].
    """
    checkpoint = load_checkpoint(model, revision)
    return coherence_of(checkpoint, open_corpus(corpus, checkpoint, max_tokens), sinks, settings)


def coherence_of(
    checkpoint: Checkpoint, corpus: Corpus, sinks: Any = None, settings: Settings = STANDARD, decomposed: Any = None
) -> Any:
    """Score the directions of a loaded checkpoint; see `coherence`.

    `decomposed` is a result of `weights` of the same model with as many directions and top tokens, if there is one.
    """
    share, l_in = _shares(checkpoint, sinks)
    n_top = min(settings.n_top, checkpoint.config.d_vocab)
    if decomposed is None:
        decomposed = weights_of(checkpoint, settings.n_directions, n_top)
    tokens = _tokens(decomposed, settings.n_directions, n_top)
    random = {name: _random_tokens(checkpoint, name, n_top, settings) for name in ("W_E", "W_U")}
    d_vocab = checkpoint.config.d_vocab
    keys = np.concatenate([pair_keys(ids, d_vocab).ravel() for ids in (*tokens.values(), *random.values())])
    counts = count_windows(corpus, keys, d_vocab, settings.window)

    def npmi(ids: np.ndarray) -> np.ndarray:
        return np.asarray(counts.npmi(pair_keys(ids, d_vocab)).mean(-1))

    null = {name: npmi(ids).max(0) for name, ids in random.items()}
    scores = {kind: npmi(ids) for kind, ids in tokens.items()}
    limit = {name: float(np.quantile(values, settings.quantile)) for name, values in null.items()}
    coherent = {kind: values.max(0) > limit[_through(kind)] for kind, values in scores.items()}
    data: dict[str, Any] = {}
    for kind in KINDS:
        dims = ("layer", "head", "rank") if kind in HEAD_KINDS else ("layer", "mlp_rank")
        data[f"{kind}_npmi"] = ("sign", *dims), scores[kind]
        data[f"{kind}_coherent"] = dims, coherent[kind]
        data[f"{kind}_token"] = ("sign", *dims, "top"), tokens[kind]
    data |= _null_variables(null, limit, random, counts.single)
    data |= fractions(coherent, scores, settings.n_bootstrap, settings.seed)
    data |= transition(coherent, l_in)
    data |= head_shares(coherent, scores, share, settings.seed)
    if (strings := token_strings(checkpoint)) is not None:
        data |= class_mixes(tokens, scores, strings, l_in)
    return _dataset(checkpoint, corpus, data, counts.n_windows, settings, sinks)


def _shares(checkpoint: Checkpoint, sinks: Any) -> tuple[np.ndarray | None, int]:
    """Return second-half first-token shares [L, N] and l_in, −1 for none, of a `sinks` result."""
    if sinks is None:
        return None, -1
    c = checkpoint.config
    share = sinks["first_token_share"].sel(query_set="second_half").values
    if sinks.attrs["model_digest"] != checkpoint.digest or share.shape != (c.n_layer, c.n_head):
        raise ValueError(
            f"the sinks are those of {sinks.attrs['model']} with [layer, head] {list(share.shape)}; expected those of "
            f"{checkpoint.name} with [{c.n_layer}, {c.n_head}]. Compute `sinks` of a run of this model with all layers "
            "and heads."
        )
    return share, int(sinks["l_in"])


def _tokens(decomposed: Any, n: int, n_top: int) -> dict[str, np.ndarray]:
    """Return the top tokens of every kind: [sign, layer(, head), rank, top]."""
    found = {}
    for kind in KINDS:
        family, _, fold = kind.rpartition("_") if kind.startswith("w_in") else (kind, "", "")
        values = decomposed[f"{family}_token"]
        values = values.sel(fold=fold) if fold else values
        found[kind] = values.values[..., :n, :n_top]
    return found


def _through(kind: str) -> str:
    return "W_U" if kind in ("ov_write", "w_out") else "W_E"


def _random_tokens(checkpoint: Checkpoint, name: str, n_top: int, settings: Settings) -> np.ndarray:
    """Return the top tokens of random directions through W_E or W_U: [sign, random, top]."""
    make = torch.Generator().manual_seed(settings.seed)
    shape = (settings.n_random, checkpoint.config.d_model)
    directions = torch.randn(shape, generator=make, dtype=torch.float64)
    return read_tokens(directions, unembedding(checkpoint, name), n_top)[0]


def _null_variables(
    null: dict[str, np.ndarray], limit: dict[str, float], random: dict[str, np.ndarray], single: np.ndarray
) -> dict[str, Any]:
    seen = [float((single[ids] > 0).mean()) for ids in random.values()]
    return {
        "null_score": (("through", "random"), np.stack([np.sort(values) for values in null.values()])),
        "threshold": (("through",), np.array(list(limit.values()))),
        "null_tokens_seen": (("through",), np.array(seen), {"note": "share of top tokens that the corpus holds"}),
    }


def _dataset(
    checkpoint: Checkpoint, corpus: Corpus, data: dict[str, Any], n_windows: int, settings: Settings, sinks: Any
) -> Any:
    import xarray

    c = checkpoint.config
    layers = np.arange(c.n_layer)
    coords = {
        "kind": list(KINDS), "head_kind": list(HEAD_KINDS), "layer": layers, "head": np.arange(c.n_head),
        "layer_fraction": ("layer", (layers + 0.5) / c.n_layer), "sign": [1, -1], "through": ["W_E", "W_U"],
    }  # fmt: skip
    if "share_coherence" in data:
        coords["measure"] = ["fraction", "score"]
    if "class_share" in data:
        coords["token_class"] = list(CLASSES)
    arguments = vars(settings) | {
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
        "corpus_tokens": len(corpus.tokens),
        "sinks_of": None if sinks is None else sinks.attrs["run"],
    }
    attributes = model_provenance(checkpoint, "coherence", arguments, CONVENTIONS) | {"n_windows": n_windows}
    return xarray.Dataset(data, coords, attributes)
