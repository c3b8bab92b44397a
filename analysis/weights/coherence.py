"""Do the directions of a model's weights mean something, and does that change where attention does?

A direction is coherent where the tokens at one of its ends stand near each other in a reference corpus more than other
tokens that are as frequent do. Fractions by layer are set beside the first-token share of attention and its transition.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from headwater.analysis.weights.coherence_layers import (
    HEAD_KINDS,
    KINDS,
    Values,
    class_mixes,
    fractions,
    head_shares,
    transition,
)
from headwater.analysis.weights.corpora import MAX_TOKENS, open_corpus
from headwater.analysis.weights.directions import (
    model_provenance,
    read_tokens,
    token_strings,
    unembedding,
    weights_of,
)
from headwater.analysis.weights.npmi import WINDOW, Corpus, Table, count_pairs
from headwater.analysis.weights.token_classes import CLASSES
from headwater.analysis.weights.token_classes import CONVENTIONS as CLASS_CONVENTIONS
from headwater.extractor.model.weights import Checkpoint, load_checkpoint
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

    from headwater.analysis.engine.results import Variables

N_SETS = 500
N_BOOTSTRAP = 1000
N_RANDOM = 200
FIRST_SETS = 100
LEVEL = 0.01
THROUGH = ("W_E", "W_U")

# Directions whose sets of the null are scored together. 64 directions × 2 ends × 400 sets × 190 pairs of 20 tokens
# are 9.7 million pairs: 78 MB of their places in the table, 39 MB of NPMI.
DIRECTIONS_AT_ONCE = 64
CONVENTIONS = (
    "npmi [sign]: mean NPMI over the pairs of the top tokens at one end of a direction, over Boolean sliding windows "
    "of the reference corpus; only pairs that chance would put together in 5 windows or more count (a pair that shares "
    "none: −1), and with less than a quarter of the pairs left there is no score (NaN: the corpus or the vocabulary is "
    "too small for these tokens). The null of a direction: sets of tokens as frequent as its own, each moved by up to "
    "± 60 ranks of frequency, both ends. z: (npmi − the null's mean) / its standard deviation, of the end where that "
    "is larger; percentile: of that z among those of the sets, their better ends too; coherent: above the 99th. "
    "coherent_fraction [kind, layer]: of the n_scored directions with a score (of all heads); low and high: Wilson's "
    "95 % interval, which takes directions for independent; band_low and band_high: 95 % bootstrap over heads, or over "
    "directions of the MLP. random_fraction [through]: of random directions read through W_E or W_U, what clustered "
    "embeddings alone give. mean_z over these directions; mean_log_count: mean ln(1 + windows that hold the token) of "
    "their top tokens, by which fractions at other frequencies are to be read. before, after: mean of "
    "coherent_fraction over the layers before l_in and from it on; difference: after − before; difference_by_line: "
    "what a straight line over the layers gives of it; difference_beyond_line: the step beside a line fitted with it, "
    "difference_p its p from permuted residuals of the line, never below least_p; NaN without l_in, below 6 layers, "
    "and where a layer has no score. rise: middle third of the layers minus the first third; dip: middle minus the "
    "last third; low and high of both: 95 % bootstrap. share_coherence: Spearman's correlation over the heads of a "
    "layer between second-half first-token share and the head's coherent fraction (measure fraction) or mean z "
    "(measure z); share_coherence_p: of its mean over layers, heads permuted within layers. qk_query, qk_key: the two "
    "sides of QK circuits, which compare tokens and write none. "
    f"{CLASS_CONVENTIONS} "
    "class_change: half the summed difference of the mixes from l_in on and before, class_change_beyond_line and "
    "class_change_p as for difference."
)


@dataclass(frozen=True)
class Settings:
    """How directions are scored: how many, top tokens, window, sets of the null, resamples, random directions, seed."""

    n_directions: int = 30
    n_top: int = 20
    window: int = WINDOW
    n_sets: int = N_SETS
    n_bootstrap: int = N_BOOTSTRAP
    n_random: int = N_RANDOM
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "n_directions": 1,
            "n_top": 2,
            "window": 2,
            "n_sets": 200,
            "n_bootstrap": 20,
            "n_random": 20,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}.")


@dataclass(frozen=True)
class Scores:
    """How coherent directions are [...]: NPMI by end [2, ...], z, percentile, better end, whether coherent.

    NaN where there is no score; `end` is 0 or 1 all the same.
    """

    npmi: np.ndarray
    z: np.ndarray
    percentile: np.ndarray
    end: np.ndarray
    coherent: np.ndarray


STANDARD = Settings()


def coherence(
    model: str,
    corpus: Run | str | Path | Sequence[str | Path],
    sinks: xarray.Dataset | None = None,
    settings: Settings = STANDARD,
    max_tokens: int = MAX_TOKENS,
    revision: str | None = None,
) -> xarray.Dataset:
    """Score the SVD directions of every OV, QK, W_in and W_out of a model on a reference corpus.

    `corpus` is a run of the model, or text: a file, directory, glob or several. `sinks` is a result of `sinks` of the
    same model; with it the scores are set beside the transition l_in and the heads' first-token shares.

    Returns a dataset of the quantities of CONVENTIONS by kind (KINDS) and layer, and for every direction <kind>_npmi
    [sign, layer(, head), rank or mlp_rank], <kind>_z, <kind>_percentile, <kind>_coherent (1, 0, or NaN where the corpus
    cannot tell), <kind>_end (the better sign), and the tokens <kind>_token [sign, ..., top]. `shown` lists them.
    """
    checkpoint = load_checkpoint(model, revision)
    return coherence_of(checkpoint, open_corpus(corpus, checkpoint, max_tokens), sinks, settings)


def coherence_of(
    checkpoint: Checkpoint,
    corpus: Corpus,
    sinks: xarray.Dataset | None = None,
    settings: Settings = STANDARD,
    decomposed: xarray.Dataset | None = None,
) -> xarray.Dataset:
    """Score the directions of a loaded checkpoint; see `coherence`.

    `decomposed` is a result of `weights` of the same model with as many directions and top tokens, if there is one.
    """
    share, l_in = _shares(checkpoint, sinks)
    n_top = min(settings.n_top, checkpoint.config.d_vocab)
    if decomposed is None:
        decomposed = weights_of(checkpoint, settings.n_directions, n_top)
    tokens = _tokens(decomposed, settings.n_directions, n_top)
    table = count_pairs(corpus, checkpoint.config.d_vocab, settings.window)
    log_of_token = np.log1p(table.single)
    data: Variables = {}
    coherent: Values = {}
    z: Values = {}
    better: Values = {}
    log_count: Values = {}
    for at, kind in enumerate(KINDS):
        ids = tokens[kind]
        one = score_sets(table, ids, settings.n_sets, [settings.seed, at])
        better[kind] = np.take_along_axis(ids, one.end[None, ..., None], 0)[0]
        coherent[kind] = one.coherent
        z[kind] = one.z
        mean_log = log_of_token[better[kind]].mean(-1)
        log_count[kind] = np.where(np.isnan(one.z), np.nan, mean_log)
        data |= _of_directions(kind, one, ids)
    random = _random_fraction(checkpoint, table, n_top, settings)
    data["random_fraction"] = ("through",), random
    layers = fractions(coherent, z, log_count, settings.n_bootstrap, settings.seed)
    data |= layers
    data |= transition(layers["coherent_fraction"][1], l_in)
    data |= head_shares(coherent, z, share, settings.seed)
    strings = token_strings(checkpoint)
    if strings is not None:
        data |= class_mixes(better, strings, l_in)
    return _dataset(checkpoint, corpus, data, table.n_windows, settings, sinks)


def _of_directions(kind: str, scores: Scores, tokens: np.ndarray) -> Variables:
    """Return the scores of the directions of a kind as variables."""
    dims: tuple[str, ...] = ("layer", "mlp_rank")
    if kind in HEAD_KINDS:
        dims = ("layer", "head", "rank")
    return {
        f"{kind}_npmi": (("sign", *dims), scores.npmi),
        f"{kind}_z": (dims, scores.z),
        f"{kind}_percentile": (dims, scores.percentile),
        f"{kind}_coherent": (dims, scores.coherent),
        f"{kind}_end": (dims, np.where(scores.end == 0, 1, -1)),
        f"{kind}_token": (("sign", *dims, "top"), tokens),
    }


def _random_fraction(
    checkpoint: Checkpoint, table: Table, n_top: int, settings: Settings
) -> np.ndarray:
    """Return the coherent fraction of random directions through W_E and W_U, what these matrices alone give."""
    make = torch.Generator().manual_seed(settings.seed)
    shape = (settings.n_random, checkpoint.config.d_model)
    directions = torch.randn(shape, generator=make, dtype=torch.float64)
    found = np.full(len(THROUGH), np.nan)
    for at, name in enumerate(THROUGH):
        tokens, _ = read_tokens(directions, unembedding(checkpoint, name), n_top)
        coherent = score_sets(table, tokens, settings.n_sets, [settings.seed, 100 + at]).coherent
        scored = np.isfinite(coherent)
        if scored.any():
            found[at] = coherent[scored].mean()
    return found


def score_sets(
    table: Table, tokens: np.ndarray, n_sets: int = N_SETS, seed: int | Sequence[int] = 0
) -> Scores:
    """Compare both ends' tokens [2, ..., top] of every direction with sets of tokens that are as frequent.

    Of the sets, 100 are drawn first. Where more of these beat a direction than may of all, it cannot be coherent any
    more, and its z and percentile are those among the 100.
    """
    grid = tokens.shape[1:-1]
    ranks_2Dk = table.rank[tokens].reshape(2, -1, tokens.shape[-1])
    n_directions = ranks_2Dk.shape[1]
    npmi_2D = table.coherence(ranks_2Dk)
    z = np.full(n_directions, np.nan)
    percentile = np.full(n_directions, np.nan)
    end = np.zeros(n_directions, int)
    rng = np.random.default_rng(seed)
    # With b sets as good, the percentile is 1 − (1 + b)/(1 + n); it is above 1 − LEVEL for b up to this.
    may_beat = int(LEVEL * (1 + n_sets)) - 1
    for low in range(0, n_directions, DIRECTIONS_AT_ONCE):
        here = np.arange(low, min(low + DIRECTIONS_AT_ONCE, n_directions))
        null_S2D = table.coherence(table.matched(ranks_2Dk[:, here], FIRST_SETS, rng))
        z[here], percentile[here], end[here], beaten = _compare(npmi_2D[:, here], null_S2D)
        undecided = beaten <= may_beat
        if not undecided.any():
            continue
        here = here[undecided]
        more_S2D = table.coherence(table.matched(ranks_2Dk[:, here], n_sets - FIRST_SETS, rng))
        null_S2D = np.concatenate([null_S2D[..., undecided], more_S2D])
        z[here], percentile[here], end[here], _ = _compare(npmi_2D[:, here], null_S2D)
    coherent = np.where(np.isnan(z), np.nan, percentile > 1 - LEVEL)
    return Scores(
        npmi=npmi_2D.reshape(2, *grid),
        z=z.reshape(grid),
        percentile=percentile.reshape(grid),
        end=end.reshape(grid),
        coherent=coherent.reshape(grid),
    )


def _compare(
    npmi_2D: np.ndarray, null_S2D: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return z, percentile and better end of directions, and how many sets of the null are as good.

    An end has a z where at least half of its sets have a score. The percentile counts the direction among its sets, so
    that the share of unrelated ones above 1 − p is p or less.
    """
    scored_2D = np.isfinite(null_S2D).mean(0) >= 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # ends without a score are NaN throughout
        middle_2D = np.nanmean(null_S2D, 0)
        spread_2D = np.nanstd(null_S2D, 0)
        scale_2D = np.where(scored_2D & (spread_2D > 0), spread_2D, np.nan)
        by_end_2D = (npmi_2D - middle_2D) / scale_2D
        best_D = np.nanmax(by_end_2D, 0)
        # A set is as lucky as a direction: it too counts by the better of its ends, of those that the direction has.
        null_z_S2D = (null_S2D - middle_2D) / scale_2D
        null_z_S2D = np.where(np.isnan(by_end_2D), np.nan, null_z_S2D)
        null_SD = np.nanmax(null_z_S2D, 1)
    beaten_D = (null_SD >= best_D).sum(0)
    n_D = np.isfinite(null_SD).sum(0)
    percentile_D = 1 - (1 + beaten_D) / (1 + n_D)
    percentile_D = np.where(np.isnan(best_D), np.nan, percentile_D)
    end_D = np.nan_to_num(by_end_2D, nan=-np.inf).argmax(0)
    return best_D, percentile_D, end_D, beaten_D


def shown(result: xarray.Dataset, kind: str, most: int = 5, n_tokens: int = 8) -> list[str]:
    """List the most coherent directions of a kind by z, each with its place and first tokens, for people to judge."""
    z = result[f"{kind}_z"].values
    end = result[f"{kind}_end"].values
    tokens = result[f"{kind}_token"].values
    there = np.argwhere(result[f"{kind}_coherent"].values == 1)
    order = np.argsort([-z[tuple(at)] for at in there], kind="stable")[:most]
    lines = []
    for at in there[order]:
        place = tuple(at.tolist())
        row = int(end[place] < 0)
        words = " ".join(_word(result, token) for token in tokens[(row, *place)][:n_tokens])
        where = f"L{place[0]}"
        if kind in HEAD_KINDS:
            where += f"H{place[1]}"
        lines.append(f"{where} {place[-1]}: z {z[place]:.1f}, {words}")
    return lines


def _word(result: xarray.Dataset, token: int) -> str:
    """Return a token's string, or its id where the model has no tokenizer."""
    if "token_text" not in result:
        return str(token)
    return repr(str(result["token_text"].values[token]))


def _shares(
    checkpoint: Checkpoint, sinks: xarray.Dataset | None
) -> tuple[np.ndarray | None, int | None]:
    """Return second-half first-token shares [L, N] and l_in of a `sinks` result, None where there is none."""
    if sinks is None:
        return None, None
    c = checkpoint.config
    share = sinks["first_token_share"].sel(query_set="second_half").values
    if sinks.attrs["model_digest"] != checkpoint.digest or share.shape != (c.n_layer, c.n_head):
        raise ValueError(
            f"the sinks are those of {sinks.attrs['model']} with [layer, head] {list(share.shape)}; expected those of "
            f"{checkpoint.name} with [{c.n_layer}, {c.n_head}]. Compute `sinks` of a run of this model with all layers "
            "and heads."
        )
    l_in = float(sinks["l_in"])
    if not np.isfinite(l_in):
        return share, None
    return share, int(l_in)


def _tokens(decomposed: xarray.Dataset, n: int, n_top: int) -> Values:
    """Return the top tokens of every kind: [sign, layer(, head), rank, top]."""
    found = {}
    for kind in KINDS:
        if kind.startswith("w_in"):
            family, _, fold = kind.rpartition("_")
            values = decomposed[f"{family}_token"].sel(fold=fold)
        else:
            values = decomposed[f"{kind}_token"]
        found[kind] = values.values[..., :n, :n_top]
    return found


def _dataset(
    checkpoint: Checkpoint,
    corpus: Corpus,
    data: Variables,
    n_windows: int,
    settings: Settings,
    sinks: xarray.Dataset | None,
) -> xarray.Dataset:
    import xarray

    c = checkpoint.config
    layers = np.arange(c.n_layer)
    coords = {
        "kind": list(KINDS),
        "head_kind": list(HEAD_KINDS),
        "layer": layers,
        "head": np.arange(c.n_head),
        "layer_fraction": ("layer", (layers + 0.5) / c.n_layer),
        "sign": [1, -1],
        "through": list(THROUGH),
    }
    if "share_coherence" in data:
        coords["measure"] = ["fraction", "z"]
    if "class_share" in data:
        coords["token_class"] = list(CLASSES)
    arguments = vars(settings) | {
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
        "corpus_tokens": len(corpus.tokens),
        "sinks_of": None,
    }
    if sinks is not None:
        arguments["sinks_of"] = sinks.attrs["run"]
    attributes = model_provenance(checkpoint, "coherence", arguments, CONVENTIONS)
    attributes["n_windows"] = n_windows
    return xarray.Dataset(data, coords, attributes)
