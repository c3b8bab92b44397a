"""The sites: what can be captured, under which names, with which dimensions, and how a request selects them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headwater.extractor.weights import ModelConfig

VECTOR, SQUARE, STATISTIC = "vector", "square", "statistic"
LEADING = ("depth", "layer")


@dataclass(frozen=True)
class Site:
    """One kind of activation.

    `dims` are the stored dimensions in order; `group` says how it is stored: "vector" (default float16), "square"
    (causal tiles, default float16) or "statistic" (float32, or int32 where `integer`). `alias` is TransformerLens's
    hook name with `{}` for the layer, `title` one line for people.
    """

    name: str
    dims: tuple[str, ...]
    group: str
    title: str
    alias: str = ""
    integer: bool = False

    @property
    def axis(self) -> str | None:
        """The leading dimension: "depth", "layer" or None."""
        return self.dims[0] if self.dims[0] in LEADING else None

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
    _scalar("ln1_scale", "layer", "standard deviation by which ln_1 divides", "blocks.{}.ln1.hook_scale"),
    _scalar("ln2_scale", "layer", "standard deviation by which ln_2 divides", "blocks.{}.ln2.hook_scale"),
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
    Site("attn_received", ("layer", "sequence", "head", "key"), STATISTIC, "sum over queries of the mass on a key"),
    _scalar("resid_norm", "depth", "Euclidean norm of the residual stream"),
    _scalar("resid_cosine", "depth", "cosine with the residual stream one depth before (NaN at depth 0)"),
    _scalar("resid_max", "depth", "largest |x| of the residual stream"),
    _scalar("resid_argmax", "depth", "dimension of the largest |x|", integer=True),
    Site(
        "loss",
        ("sequence", "position"),
        STATISTIC,
        "next-token negative log-likelihood, nats; NaN without a next one",
    ),
    Site("top_logits", ("sequence", "position", "rank"), STATISTIC, "the largest logits"),
    Site("top_tokens", ("sequence", "position", "rank"), STATISTIC, "tokens of the largest logits", integer=True),
)
SITES = {site.name: site for site in _ALL}
RESID_STATISTICS = ("resid_norm", "resid_cosine", "resid_max", "resid_argmax")
_STATISTICS = tuple(s.name for s in _ALL if s.group == STATISTIC and not s.name.startswith("top_"))
PRESETS = {
    "residual": ("resid",),
    "patterns": ("resid", "pattern"),
    "statistics": _STATISTICS,
    "all": tuple(SITES),
}
_ALIASES = {
    "resid_pre": ("resid", 0), "hook_resid_pre": ("resid", 0), "resid_post": ("resid", 1),
    "hook_resid_post": ("resid", 1), "scale": ("ln_final_scale", 0), "ln_final.hook_scale": ("ln_final_scale", 0),
    "hook_embed_sum": ("resid", 0), "ln1.hook_scale": ("ln1_scale", 0), "ln2.hook_scale": ("ln2_scale", 0),
    "mlp.hook_pre": ("mlp_pre", 0), "mlp.hook_post": ("mlp_post", 0), "attn.hook_attn_scores": ("attn_scores", 0),
}  # fmt: skip
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_INDEXED = re.compile(r"(\w+)(?:\.(\d+)|\[(\d+)\])")


class RequestError(ValueError):
    """A request that cannot be met as it stands; the message says what to change."""


def parse_site(text: str) -> tuple[str, int | None]:
    """Read one site name or TransformerLens alias.

    Returns the site and the depth or layer that the name carries, or None: `blocks.3.hook_resid_post`,
    `resid_post.3` and `resid.4` all give ("resid", 4). Raises RequestError for a name that is not known.
    """
    name, index = text.strip(), None
    if hook := _HOOK.fullmatch(name):
        index, name = int(hook[1]), hook[2]
    elif indexed := _INDEXED.fullmatch(name):
        index, name = int(indexed[2] or indexed[3]), indexed[1]
    site, shift = _ALIASES.get(name, ("", 0))
    if not site:
        site = name.removeprefix("attn.").removeprefix("mlp.").removeprefix("hook_")
    if site not in SITES:
        raise RequestError(
            f"there is no site {text!r}. Sites are {', '.join(SITES)}; TransformerLens names such as "
            "'blocks.3.hook_resid_post' or 'pattern.5' work too. See `headwater sites`."
        )
    if shift and index is None:
        raise RequestError(f"{text!r} needs its layer, as in {text}.3; for all depths ask for 'resid'.")
    if index is not None and SITES[site].axis is None:
        raise RequestError(f"{text!r} names a layer, but {site} has none. Ask for {site!r}.")
    return site, None if index is None else index + shift


def parse_indices(text: str, size: int, what: str) -> tuple[int, ...]:
    """Read a selection such as `0,4:8,-1` over `size` items; ranges are half-open, as in Python.

    Returns increasing indices. Raises RequestError for anything out of range, empty or malformed.
    """
    chosen: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(-?\d+)?\s*(?:(:)\s*(-?\d+)?\s*(?::\s*(\d+))?)?\s*", part)
        if match is None or not part.strip() or match[4] == "0":
            raise RequestError(f"--{what} {text!r}: {part!r} is not an index or a range; expected for example 0,4:8.")
        if match[2]:
            start, stop = (int(g) if g else None for g in (match[1], match[3]))
            for bound in (start, stop):
                if bound is not None and not -size <= bound <= size:
                    raise RequestError(
                        f"--{what} {text!r}: {bound} is out of range; there are {size} {what}, 0 to {size - 1}."
                    )
            chosen.update(range(size)[start : stop : int(match[4] or 1)])
        else:
            index = int(match[1])
            if not -size <= index < size:
                raise RequestError(
                    f"--{what} {text!r}: {index} is out of range; there are {size} {what}, 0 to {size - 1}."
                )
            chosen.add(index % size)
    if not chosen:
        raise RequestError(f"--{what} {text!r} selects nothing of {size} {what}; name at least one.")
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class Selection:
    """Which sites, and which of their layers, depths, heads and positions; `last` is the position −1."""

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    positions: tuple[int, ...] | None

    def along(self, axis: str | None) -> tuple[int, ...]:
        """Return the selected indices of a leading dimension; (0,) for sites without one."""
        return {"layer": self.layers, "depth": self.depths, None: (0,)}[axis]


def select(
    config: ModelConfig,
    n_positions: int,
    sites: Sequence[str],
    layers: str | None = None,
    depths: str | None = None,
    heads: str | None = None,
    positions: str | None = None,
) -> Selection:
    """Resolve a request against a model and a sequence length; raise RequestError where they do not fit.

    A site named with its layer or depth (`pattern.5`) selects that layer for every site of the request, and cannot be
    combined with `layers` or `depths`.
    """
    if not sites:
        raise RequestError("no site was asked for; name some with --sites or take a --preset.")
    parsed = [parse_site(text) for text in sites]
    names = tuple(name for name in SITES if name in {name for name, _ in parsed})
    chosen = {"layer": layers, "depth": depths}
    for axis in LEADING:
        carried = {index for name, index in parsed if SITES[name].axis == axis and index is not None}
        bare = [name for name, index in parsed if SITES[name].axis == axis and index is None]
        if carried and (bare or chosen[axis] is not None):
            other = f"--{axis}s" if chosen[axis] is not None else repr(bare[0])
            raise RequestError(
                f"a site named with its {axis} cannot be combined with {other}, because all sites share "
                f"one selection of {axis}s. Use --{axis}s for all of them."
            )
        if carried:
            chosen[axis] = ",".join(map(str, sorted(carried)))
    return Selection(
        names,
        parse_indices(chosen["layer"] or ":", config.n_layer, "layers"),
        parse_indices(chosen["depth"] or ":", config.n_layer + 1, "depths"),
        parse_indices(heads or ":", config.n_head, "heads"),
        _positions(positions, n_positions),
    )


def _positions(text: str | None, n_positions: int) -> tuple[int, ...] | None:
    if text is None or text.strip() == ":":
        return None
    if text.strip() == "last":
        return (-1,)
    return parse_indices(text, n_positions, "positions")


def split_names(text: str | Iterable[str]) -> tuple[str, ...]:
    """Split a comma-separated list of site names."""
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(part.strip() for part in parts if part.strip())
