"""False sinks: positions that look like the first one to a model because one token, or one cluster, is repeated.

Yona et al. 2025 (arXiv 2503.08908). No stored site is needed: the rows are made here and run in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Figures, ModelAnalysis, Plot, rounded, rounded_one
from headwater.analysis.engine.options import FRACTION, SEED, SOME, numbers_from, setting
from headwater.analysis.engine.results import provenance
from headwater.analysis.measures.origin import MODEL_HELP, load_run_model
from headwater.extractor.settings import MODEL, TEXT
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

EPSILON = 0.3
RATIO = 0.5
LENGTHS = (16, 64, 256)
ROWS_AT_ONCE = 16
N_CONTROLS = 16
STANDS_OUT = 0.5  # below this ratio of norms a first position differs from the others of its row
SITES = ("attn_received", "attn_sink", "resid_norm")
CONVENTIONS = (
    "Rows of one token n times, or of n draws from a cluster of tokens, alone or behind the beginning-of-text token. "
    "False positions are all but the row's first. norm, first_norm: mean residual norm of the false positions, and the "
    "first position's, by depth; norm_ratio: the mean of norm over first_norm, which rises too where the first one "
    "shrinks; false_norm: share of false positions whose norm is at least `ratio` × the first's. false_attention: "
    "share of (head, false key) with α_k > ε, α_k = mean mass on key k per row that sees it, keys that fewer than 16 "
    "rows see left out. first_token_share: mean over all queries but the first. control_*: the same over n_controls "
    "rows of different tokens, drawn at random; control_norm_ratio_spread: their standard deviation. relative_ratio: "
    "norm_ratio over control_norm_ratio, where the latter is below .5, for elsewhere the first position does not stand "
    "out in ordinary rows either and nothing can pass for it (NaN); near 1: repetition changes nothing."
)


def false_sinks(
    model: Any,
    tokens: Sequence[int | Sequence[int]],
    lengths: Sequence[int] = LENGTHS,
    bos: int | None = None,
    epsilon: float = EPSILON,
    ratio: float = RATIO,
    seed: int = 0,
) -> xarray.Dataset:
    """Measure false sinks of repeated tokens, and of mixtures where an entry of `tokens` is itself a list.

    `model` is what `capture` takes: a directory, a hub id, "demo", or a loaded Model. With `bos`, an id, every row is
    tried with that token in front as well. Returns a dataset by start, repeated, length and depth or layer.
    """
    import xarray

    from headwater.extractor.in_memory import capture

    n_ctx, d_vocab = _sizes(model)
    longest = max(lengths, default=0) + (bos is not None)
    if not tokens or not lengths or min(lengths) < 2 or longest > n_ctx:
        raise ValueError(
            f"lengths are {tuple(lengths)} for {len(tokens)} tokens; expected at least one token, and lengths from 2 "
            f"to {n_ctx - (bos is not None)}, the model's context without the token in front."
        )
    rng = np.random.default_rng(seed)
    clusters = [np.atleast_1d(entry) for entry in tokens]
    starts = ["token"] + (["bos"] if bos is not None else [])
    found: dict[str, list[list[np.ndarray]]] = {}
    for start in starts:
        by_length: dict[str, list[np.ndarray]] = {}
        for length in lengths:
            rows = [rng.choice(cluster, length) for cluster in clusters]
            rows += [
                rng.choice(d_vocab, length, replace=length > d_vocab) for _ in range(N_CONTROLS)
            ]
            ids = np.stack(rows).astype(np.int32)
            if start == "bos":
                ids = np.concatenate([np.full((len(ids), 1), bos, np.int32), ids], 1)
            parts = [ids[at : at + ROWS_AT_ONCE] for at in range(0, len(ids), ROWS_AT_ONCE)]
            figures = [_figures(capture(model, part, SITES), epsilon, ratio) for part in parts]
            for name in figures[0]:
                by_length.setdefault(name, []).append(np.concatenate([f[name] for f in figures]))
        for name, arrays in by_length.items():
            found.setdefault(name, []).append(arrays)
    variables: dict[str, Any] = {}
    for name, nested in found.items():
        values = np.stack([np.stack(arrays) for arrays in nested])
        axis = "depth" if "norm" in name else "layer"
        variables[name] = ("start", "length", "repeated", axis), values[:, :, :-N_CONTROLS]
        controls = values[:, :, -N_CONTROLS:]
        variables[f"control_{name}"] = ("start", "length", axis), controls.mean(2)
        if name == "norm_ratio":
            spread = controls.std(2, ddof=1)
            variables["control_norm_ratio_spread"] = ("start", "length", axis), spread
            control = controls.mean(2)[:, :, None]
            relative = np.where(control < STANDS_OUT, values[:, :, :-N_CONTROLS] / control, np.nan)
            variables["relative_ratio"] = ("start", "length", "repeated", axis), relative
    coords = {
        "start": starts,
        "length": list(lengths),
        "repeated": ["+".join(map(str, c)) for c in clusters],
    }
    attributes = {
        "analysis": "false_sinks",
        "conventions": CONVENTIONS,
        "epsilon": epsilon,
        "ratio": ratio,
        "n_controls": N_CONTROLS,
    }
    name = model if isinstance(model, str) else ""
    return xarray.Dataset(variables, coords, attributes | {"seed": seed, "model": name})


@dataclass(frozen=True)
class FalseSinksAnalysis(ModelAnalysis):
    """Measure false sinks of the most frequent tokens of a run, its bos, and mixtures with their neighbours in W_E.

    `model` is the run's model by default; ValueError if its weights are not those of the run. A mixture is a token and
    the `n_tokens` − 1 tokens whose embeddings have the largest cosine with its own, for the two most frequent tokens.
    """

    name = "false_sinks"
    title = "repeated tokens that look like a first one (runs the model)"
    section = "Repeated tokens"
    plots = (
        Plot(
            "false_sinks",
            "One token repeated: norms of the others over that of the first, and attention on the first; "
            "beside rows of different tokens.",
            "headwater.analysis.plots.attention:false_sinks",
            together=False,
        ),
    )

    model: str | None = setting(None, TEXT, MODEL_HELP, "MODEL", leads=MODEL)
    lengths: Sequence[int] | None = setting(
        None,
        numbers_from(2),
        "lengths of repeated tokens; by default 16,64,256, as far as the model's context goes",
        "LENGTHS",
    )
    n_tokens: int = setting(
        8, SOME, "most frequent tokens that are repeated", "N", flag="--repeated"
    )
    epsilon: float = setting(EPSILON, FRACTION, "ε of Sink_k^ε", "EPSILON")
    ratio: float = setting(
        RATIO, FRACTION, "share of the first norm from which a later one looks like it", "RATIO"
    )
    seed: int = setting(0, SEED, "seed of what is drawn at random", "SEED")

    def compute(self, run: Run, result: xarray.Dataset | None = None) -> xarray.Dataset:
        """Make the rows, and run them in memory."""
        from headwater.extractor.model.forward import Model

        checkpoint = load_run_model(run, self.model)
        ids, counts = np.unique(run.tokens[run.tokens >= 0], return_counts=True)
        frequent = ids[np.argsort(-counts, kind="stable")][: self.n_tokens]
        embedding = checkpoint.tensors["wte.weight"].double().numpy()
        embedding = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-300)
        clusters = [
            np.argsort(-(embedding @ embedding[i]), kind="stable")[: self.n_tokens].tolist()
            for i in frequent[:2]
        ]
        bos = checkpoint.config.bos_token_id
        room = checkpoint.config.n_ctx - (bos is not None)
        chosen = self.lengths or [n for n in LENGTHS if n < room] or [room]
        singles = [int(i) for i in frequent]
        if bos is not None and bos not in singles:
            singles.append(bos)
        tokens = singles + clusters
        found = false_sinks(
            Model(checkpoint, "fp32"), tokens, chosen, bos, self.epsilon, self.ratio, self.seed
        )
        from headwater.extractor.tokenizer import load_run_tokenizer

        coder = load_run_tokenizer(run)
        if coder is not None:
            words = [
                " ".join(map(repr, coder.token_strings(np.atleast_1d(entry)))) for entry in tokens
            ]
            found = found.assign_coords(token_text=("repeated", np.array(words, dtype=object)))
        arguments = {
            "lengths": list(chosen),
            "tokens": tokens,
            "epsilon": self.epsilon,
            "ratio": self.ratio,
            "seed": self.seed,
        }
        return found.assign_attrs(provenance(run, "false_sinks", arguments, 0, CONVENTIONS))

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return where repetition makes the others most like the first, relative to different tokens."""
        attention = {"largest_false_attention": rounded_one(result.false_attention.max())}
        ratio = result.relative_ratio
        if not np.isfinite(ratio).any():
            said = "the first position stands out at no depth of rows of different tokens"
            return {"largest_ratio_relative_to_different_tokens": said} | attention
        place = np.unravel_index(np.nanargmax(ratio.values), ratio.shape)
        at = dict(zip(ratio.dims, place, strict=True))
        one = result.isel(at)
        token = one.token_text.item() if "token_text" in result else one.repeated.item()
        return {
            "largest_ratio_relative_to_different_tokens": rounded_one(one.relative_ratio),
            "its_token": str(token),
            "its_depth": int(at["depth"]),
            "its_norm_and_that_of_the_first": rounded([one.norm, one.first_norm]),
            "of_different_tokens": rounded([one.control_norm, one.control_first_norm]),
        } | attention


def _sizes(model: Any) -> tuple[int, int]:
    """Return n_ctx and d_vocab of a model or of a model's name."""
    from headwater.extractor.model.weights import read_config

    config = read_config(model) if isinstance(model, str) else model.config
    return int(config.n_ctx), int(config.d_vocab)


def _figures(captured: Any, epsilon: float, ratio: float) -> dict[str, np.ndarray]:
    """Reduce captured rows to [row, depth or layer]."""
    norm = captured["resid_norm"].values.astype(np.float64)
    relative = np.moveaxis(norm[..., 1:] / norm[..., :1], 0, 1)
    received = np.moveaxis(captured["attn_received"].values.astype(np.float64), 0, 1)
    n = received.shape[-1]
    alpha = received / (n - np.arange(n))
    keys = slice(1, max(n - 15, 2))
    share = np.moveaxis(captured["attn_sink"].values.astype(np.float64), 0, 1)[..., 1:]
    return {
        "norm": np.moveaxis(norm[..., 1:].mean(-1), 0, 1),
        "first_norm": np.moveaxis(norm[..., 0], 0, 1),
        "false_norm": (relative >= ratio).mean(-1),
        "norm_ratio": relative.mean(-1),
        "false_attention": (alpha[..., keys] > epsilon).mean((-1, -2)),
        "first_token_share": share.mean((-1, -2)),
    }
