"""The sites: what can be captured, under which names and with which dimensions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

VECTOR = "vector"
SQUARE = "square"
STATISTIC = "statistic"
LEADING = ("depth", "layer")


@dataclass(frozen=True)
class Site:
    """One kind of activation.

    `dims` are the stored dimensions in order; `group` says how it is stored: "vector" (default float16), "square"
    (causal tiles, default float16) or "statistic" (float32, or int32 where `integer`). `alias` is TransformerLens's
    hook name with `{}` for the layer, `title` one line for people. A site that is `extra` is in no preset and cannot be
    edited: it follows from the others, but not without the weights.
    """

    name: str
    dims: tuple[str, ...]
    group: str
    title: str
    alias: str = ""
    integer: bool = False
    extra: bool = False

    @property
    def axis(self) -> str | None:
        """The leading dimension: "depth", "layer" or None."""
        return self.dims[0] if self.dims[0] in LEADING else None

    @property
    def dtype(self) -> str:
        """The stored dtype unless another is asked for; float16 has steps of .06 where the logits of a GPT-2 lie."""
        if self.integer:
            return "int32"
        return "float32" if self.group == STATISTIC or self.name == "logits" else "float16"

    @property
    def fill(self) -> float | int:
        """What reads where nothing was captured: NaN, −1 for integers, 0 for the pattern's empty tiles."""
        return -1 if self.integer else 0.0 if self.name == "pattern" else float("nan")


def _stream(name: str, title: str, alias: str, axis: str = "layer") -> Site:
    return Site(name, (axis, "sequence", "position", "d_model"), VECTOR, title, alias)


def _head(name: str, title: str) -> Site:
    dims = ("layer", "sequence", "position", "head", "d_head")
    return Site(name, dims, VECTOR, title, f"blocks.{{}}.attn.hook_{name}")


def _row(name: str, title: str, integer: bool = False) -> Site:
    return Site(name, ("layer", "sequence", "head", "query"), STATISTIC, title, integer=integer)


def _normed(name: str, title: str, alias: str, dims: tuple[str, ...] = ()) -> Site:
    dims = (*dims, "sequence", "position", "d_model")
    return Site(name, dims, VECTOR, title, f"{alias}.hook_normalized", extra=True)


def _scalar(name: str, axis: str, title: str, alias: str = "", integer: bool = False) -> Site:
    return Site(name, (axis, "sequence", "position"), STATISTIC, title, alias, integer)


_ALL = (
    _stream(
        "resid",
        "residual stream; depth 0 = embeddings, depth n_layer = input of the final LayerNorm",
        "blocks.{}.hook_resid_pre",
        "depth",
    ),
    _stream("resid_mid", "residual stream between attention and MLP", "blocks.{}.hook_resid_mid"),
    _stream("attn_out", "what attention adds to the residual stream", "blocks.{}.hook_attn_out"),
    _stream("mlp_out", "what the MLP adds to the residual stream", "blocks.{}.hook_mlp_out"),
    _head("q", "queries"),
    _head("k", "keys"),
    _head("v", "values"),
    _head("z", "output of each head before W_O"),
    Site(
        "mlp_pre",
        ("layer", "sequence", "position", "d_mlp"),
        VECTOR,
        "neurons before the activation function",
        "blocks.{}.mlp.hook_pre",
    ),
    Site(
        "mlp_post",
        ("layer", "sequence", "position", "d_mlp"),
        VECTOR,
        "neurons after the activation function",
        "blocks.{}.mlp.hook_post",
    ),
    _scalar(
        "ln1_scale", "layer", "standard deviation by which ln_1 divides", "blocks.{}.ln1.hook_scale"
    ),
    _scalar(
        "ln2_scale", "layer", "standard deviation by which ln_2 divides", "blocks.{}.ln2.hook_scale"
    ),
    Site(
        "ln_final_scale",
        ("sequence", "position"),
        STATISTIC,
        "standard deviation by which ln_f divides",
        "ln_final.hook_scale",
    ),
    Site(
        "pattern",
        ("layer", "sequence", "head", "query", "key"),
        SQUARE,
        "attention probabilities",
        "blocks.{}.attn.hook_pattern",
    ),
    Site(
        "attn_scores",
        ("layer", "sequence", "head", "query", "key"),
        SQUARE,
        "attention scores before the softmax, NaN where a key is hidden",
        "blocks.{}.attn.hook_attn_scores",
    ),
    _row("attn_entropy", "entropy of each row of the pattern, nats"),
    _row("attn_max", "largest probability of each row"),
    _row("attn_argmax", "key of the largest probability", integer=True),
    _row("attn_sink", "probability on the row's first visible key"),
    _row("attn_distance", "mean distance from query to key, positions"),
    _row("attn_self", "probability on the query's own position"),
    _row("attn_prev", "probability on the previous position, 0 where it is not visible"),
    Site(
        "attn_received",
        ("layer", "sequence", "head", "key"),
        STATISTIC,
        "sum over queries of the mass on a key",
    ),
    _scalar("resid_norm", "depth", "Euclidean norm of the residual stream"),
    _scalar(
        "resid_cosine", "depth", "cosine with the residual stream one depth before (NaN at depth 0)"
    ),
    _scalar("resid_max", "depth", "largest |x| of the residual stream"),
    _scalar("resid_argmax", "depth", "dimension of the largest |x|", integer=True),
    Site(
        "loss",
        ("sequence", "position"),
        STATISTIC,
        "next-token negative log-likelihood, nats; NaN without a next one",
    ),
    Site("top_logits", ("sequence", "position", "rank"), STATISTIC, "the largest logits"),
    Site(
        "top_tokens",
        ("sequence", "position", "rank"),
        STATISTIC,
        "tokens of the largest logits",
        integer=True,
    ),
    _normed(
        "ln1_out",
        "what attention reads: ln_1's output, gain and bias included",
        "blocks.{}.ln1",
        ("layer",),
    ),
    _normed(
        "ln2_out",
        "what the MLP reads: ln_2's output, gain and bias included",
        "blocks.{}.ln2",
        ("layer",),
    ),
    _normed(
        "ln_final_out",
        "what the unembedding reads: ln_f's output, gain and bias included",
        "ln_final",
    ),
    Site(
        "attn_result",
        ("layer", "sequence", "position", "head", "d_model"),
        VECTOR,
        "what each head adds to the residual stream, z W_O; with b_O their sum is attn_out",
        "blocks.{}.attn.hook_result",
        extra=True,
    ),
    Site(
        "logits",
        ("sequence", "position", "d_vocab"),
        VECTOR,
        "all logits, float32 unless --dtype names them; large: 4 d_vocab bytes a token",
        extra=True,
    ),
)
SITES = {site.name: site for site in _ALL}
RESID_STATISTICS = ("resid_norm", "resid_cosine", "resid_max", "resid_argmax")
_STATISTICS = tuple(s.name for s in _ALL if s.group == STATISTIC and not s.name.startswith("top_"))
PRESETS = {
    "residual": ("resid",),
    "patterns": ("resid", "pattern"),
    "statistics": _STATISTICS,
    "all": tuple(site.name for site in _ALL if not site.extra),
}
_SHORT = {
    "pre": "mlp_pre",
    "post": "mlp_post",
    "mid": "resid_mid",
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "scale": "ln_final_scale",
}
_MODULES = {
    "": "resid_post",
    "ln_1": "ln1_out",
    "attn": "attn_out",
    "attn.c_proj": "attn_out",
    "attn.resid_dropout": "attn_out",
    "ln_2": "ln2_out",
    "mlp": "mlp_out",
    "mlp.c_fc": "mlp_pre",
    "mlp.act": "mlp_post",
    "mlp.gelu": "mlp_post",
    "mlp.c_proj": "mlp_out",
    "mlp.dropout": "mlp_out",
}
_OUTER_MODULES = {"drop": "resid.0", "ln_f": "ln_final_out", "lm_head": "logits"}
_EMBEDDINGS = (
    "it is a row of the weights: W_E[token] or W_pos[position]. Their sum is resid at depth 0 (`--sites resid --depths "
    "0`); the run's arrays tokens and row_start say which rows"
)
_BEFORE_NORM = (
    "TransformerLens's input of a block before its LayerNorm, a copy for each head, is the residual stream: ask for "
    "{0}. What {1} reads is {2}"
)
_ELSEWHERE = (
    (r"hook_(pos_)?embed|(transformer\.)?w[tp]e", _EMBEDDINGS),
    (
        r"(blocks\.\d+\.)?hook_(q_input|k_input|v_input|attn_in)",
        _BEFORE_NORM.format("resid at the depth of the layer", "attention", "ln1_out"),
    ),
    (r"(blocks\.\d+\.)?hook_mlp_in", _BEFORE_NORM.format("resid_mid", "the MLP", "ln2_out")),
    (r"(transformer\.)?h\.\d+\.attn\.c_attn", "its output holds three sites: ask for q, k and v"),
    (
        r"(blocks\.\d+\.)?attn\.hook_rot_[qk]",
        "a GPT-2 has no rotary embeddings: ask for q and k",
    ),
    (r"hook_tokens", "every run has the array tokens beside its sites"),
)
_INDEXED = re.compile(r"(.+?)(?:\.(\d+)|\[(\d+)\])")


def _hooks() -> dict[str, tuple[str, int]]:
    """Map TransformerLens's hook names, without `blocks.N.`, to a site and what is added to N."""
    hooks = {site.alias.removeprefix("blocks.{}."): (site.name, 0) for site in _ALL if site.alias}
    return hooks | {"hook_resid_post": ("resid", 1)}


def _names() -> dict[str, tuple[str, int]]:
    """Map every name that stands without `blocks.N.` to a site and what is added to an index behind it."""
    names = {
        name.rpartition("hook_")[2]: place for name, place in _HOOKS.items() if "ln" not in name
    }
    names |= {f"hook_{name}": place for name, place in names.items()} | _HOOKS
    return (
        names
        | {short: (site, 0) for short, site in _SHORT.items()}
        | {site: (site, 0) for site in SITES}
    )


_HOOKS = _hooks()
_NAMES = _names()


class RequestError(ValueError):
    """A request that cannot be met as it stands; the message says what to change.

    `flag` names the setting that is at fault, as a field of the request, where it is one.
    """

    def __init__(self, message: str, flag: str | None = None) -> None:
        super().__init__(message)
        self.flag = flag


def parse_site(text: str) -> tuple[str, int | None]:
    """Read one site name or TransformerLens alias.

    Returns the site and the depth or layer that the name carries, or None: `blocks.3.hook_resid_post`,
    `resid_post.3`, `resid.4` and the module `transformer.h.3`, whose output it is, all give ("resid", 4). Raises
    RequestError for a name that is not known, with how to have what it means where that is known.
    """
    name = _site_of_module(text.strip())
    index = None
    known = _NAMES
    if hook := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        index = int(hook[1])
        name = hook[2]
        known = _HOOKS
    elif indexed := _INDEXED.fullmatch(name):
        index = int(indexed[2] or indexed[3])
        name = indexed[1]
    if name not in known:
        for pattern, instead in _ELSEWHERE:
            if re.fullmatch(pattern, text.strip()):
                raise RequestError(f"{text!r} is no site: {instead}.")
        near = difflib.get_close_matches(name, known, 1)
        raise RequestError(
            f"there is no site {text!r}{f'; did you mean {near[0]!r}?' if near else '.'} Sites are {', '.join(SITES)}; "
            "TransformerLens names such as 'blocks.3.hook_resid_post' or 'pattern.5' work too. See `headwater sites`."
        )
    site, shift = known[name]
    if shift and index is None:
        raise RequestError(
            f"{text!r} needs its layer, as in {text}.3; for all depths ask for 'resid'."
        )
    if index is not None and SITES[site].axis is None:
        raise RequestError(f"{text!r} names a layer, but {site} has none. Ask for {site!r}.")
    return site, None if index is None else index + shift


def _site_of_module(name: str) -> str:
    """Return the site that is the output of one of transformers' modules, or the name as it is."""
    inner = name.removeprefix("transformer.")
    if inner in _OUTER_MODULES:
        return _OUTER_MODULES[inner]
    block = re.fullmatch(r"h\.(\d+)(?:\.(.+))?", inner)
    site = None if block is None else _MODULES.get(block[2] or "")
    return name if block is None or site is None else f"{site}.{block[1]}"


def split_names(text: str | Iterable[str]) -> tuple[str, ...]:
    """Split a comma-separated list of site names."""
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(part.strip() for part in parts if part.strip())
