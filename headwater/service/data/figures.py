"""The figures of one sequence: what is drawn, the numbers behind it, and the line of Python that makes them.

Each figure reads only the chunks that it shows. Its Python uses `run`, the run opened with xarray, and leaves the main
array in `value`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from headwater.analysis.measures.sink_rows import segments
from headwater.service.catalog import complete_mask
from headwater.service.data.slices import IncompleteError, read_array
from headwater.service.places import NotHereError
from headwater.store.reader import Run

THUMBNAIL = 64
TRACKED = 6
TILE_BYTES = 64 << 20


Array = tuple[tuple[str, ...], Any]


@dataclass(frozen=True)
class Figure:
    """A title, arrays by name as (dimensions, values), coordinates, and the Python of the array called `value`."""

    title: str
    python: str
    arrays: Mapping[str, Array]
    coordinates: Mapping[str, Sequence[Any]]
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self, run: str, url: str) -> dict[str, Any]:
        """Return JSON values; NaN becomes null."""
        opened = f'import xarray\nrun = xarray.open_zarr("{url}", chunks=None)\n'
        return {
            "run": run,
            "title": self.title,
            "python": opened + self.python,
            "coordinates": self.coordinates,
            "arrays": {n: {"dims": d, "values": plain(v)} for n, (d, v) in self.arrays.items()},
            **self.notes,
        }


def make_figure(run: Run, kind: str, sequence: int, position: int | None) -> Figure:
    """Make one of FIGURES; raise NotHereError where the run lacks what it needs, IncompleteError before it is there."""
    if kind not in FIGURES:
        raise NotHereError(f"there is no figure {kind!r}; there are {', '.join(FIGURES)}.")
    n = run.manifest.n_sequences
    if not 0 <= sequence < n:
        raise ValueError(f"sequence is {sequence}; this run has 0 to {n - 1}.")
    if kind != "tokens" and not complete_mask(run, sequence, sequence + 1)[0]:
        raise IncompleteError(f"sequence {sequence} is not computed yet.")
    return FIGURES[kind](Look(run, sequence, position))


class Look:
    """One sequence of a run: its texts, its segments and what its figures read."""

    def __init__(self, run: Run, sequence: int, position: int | None) -> None:
        self.run = run
        self.s = sequence
        self.tokens = read_array(run, "tokens", (sequence, slice(None)))
        self.row_start = read_array(run, "row_start", (sequence, slice(None)))
        self.real = self.tokens >= 0
        if position is not None and not (0 <= position < len(self.tokens) and self.real[position]):
            raise ValueError(f"position is {position}; sequence {sequence} has no token there.")
        self.position = position

    def need(self, *sites: str) -> str:
        """Return the first of the sites that the run holds; raise NotHereError where it holds none."""
        for site in sites:
            if site in self.run.sites:
                return site
        raise NotHereError(
            f"this figure needs {' or '.join(sites)}; this run holds {', '.join(self.run.sites)}."
        )

    def leads(self, site: str) -> dict[str, Sequence[Any]]:
        """Return the coordinates of a site's layers or depths, its fractions, and its heads."""
        spec = self.run.spec(site)
        axis = str(self.run.spec(site).axis)
        fraction = self.run.plain(f"{axis}_fraction").tolist()
        found: dict[str, Sequence[Any]] = {axis: self.run.leads(site), "fraction": fraction}
        return found | ({"head": self.run.plain("head").tolist()} if "head" in spec.dims else {})

    def positions(self, site: str) -> tuple[str, list[int]]:
        """Return the name and coordinate of the positions that a vector site holds."""
        dim = self.run.spec(site).dims[2]
        return dim, self.run.plain(dim).tolist() if dim == "selected_position" else list(
            range(len(self.tokens))
        )

    def depths(self, site: str) -> Iterator[np.ndarray]:
        """Yield float32 [position, d] of each depth."""
        array = self.run[site]
        for depth in range(array.shape[0]):
            yield array[depth, self.s].astype(np.float32)


def thumbnails(run: Run, sequence: int, layer: int) -> np.ndarray:
    """Return small pictures of a layer's patterns [head, row, column]: the largest probability in each cell."""
    if "pattern" not in run.sites:
        raise NotHereError("this run holds no pattern.")
    layers = run.leads("pattern")
    if layer not in layers or not 0 <= sequence < run.manifest.n_sequences:
        raise ValueError(
            f"there is no layer {layer} of sequence {sequence} here; layers are {layers}."
        )
    if not complete_mask(run, sequence, sequence + 1)[0]:
        raise IncompleteError(f"sequence {sequence} is not computed yet.")
    array = run["pattern"]
    n_head = array.shape[2]
    edge = -(-array.shape[3] // THUMBNAIL)
    starts = np.arange(0, array.shape[3], edge)
    small = np.zeros((n_head, len(starts), len(starts)), array.dtype)
    bits = np.dtype(
        f"u{array.dtype.itemsize}"
    )  # of numbers that are not negative, in the same order
    for head in range(n_head):
        square = np.ascontiguousarray(array[layers.index(layer), sequence, head]).view(bits)
        cells = np.maximum.reduceat(np.maximum.reduceat(square, starts, 0), starts, 1)
        small[head] = cells.view(array.dtype)
    return small


def _tokens(look: Look) -> Figure:
    tokens = look.tokens
    run = look.run
    strings = [f"{i}" if i >= 0 else "" for i in tokens]
    text = " ".join(strings).strip()
    tokenizer = run.read_text("tokenizer.json")
    if tokenizer is not None:
        coder = _tokenizer(tokenizer)
        strings = coder.text_strings(tokens)
        text = coder.decode(tokens)
    loss: dict[str, Array] = {}
    if "loss" in run.sites and complete_mask(run, look.s, look.s + 1)[0]:
        loss = {"loss": (("position",), run["loss"][look.s])}
    return Figure(
        f"tokens of sequence {look.s}",
        f"value = run.tokens[{look.s}]",
        {"value": (("position",), tokens), "row_start": (("position",), look.row_start)} | loss,
        {"position": list(range(len(tokens)))},
        {
            "strings": strings,
            "complete": bool(complete_mask(run, look.s, look.s + 1)[0]),
            "text": text,
        },
    )


@lru_cache(16)
def _tokenizer(text: str) -> Any:
    """Make the tokenizer of a run, once for all runs that have the same."""
    from headwater.extractor.tokenizer import parse_tokenizer

    return parse_tokenizer(text)


def _sinks(look: Look) -> Figure:
    site = look.need("attn_sink", "pattern")
    s = look.s
    if site == "attn_sink":
        value = np.nanmean(look.run[site][:, s], -1, dtype=np.float64)
        python = f'value = run.attn_sink[:, {s}].mean("query")'
    else:
        rows = segments(look.row_start)
        array = look.run[site]
        value = np.zeros((array.shape[0], array.shape[2]))
        for a, b in rows:
            value += array[:, s, :, a:b, a].astype(np.float32).sum(-1, dtype=np.float64)
        value /= sum(b - a for a, b in rows)
        python = (
            f'rows = {rows}\nvalue = sum(run.pattern[:, {s}, :, a:b, a].astype(float).sum("query") for a, b in rows) '
            "/ sum(b - a for a, b in rows)"
        )
    return Figure(
        "first-token share, mean over queries",
        python,
        {"value": (("layer", "head"), value)},
        look.leads(site),
    )


def _norm(look: Look) -> Figure:
    site = look.need("resid_norm", "resid")
    s = look.s
    if site == "resid_norm":
        value = look.run[site][:, s]
        python = f"value = run.resid_norm[:, {s}]"
    else:
        value = np.stack([np.linalg.norm(x, axis=-1) for x in look.depths(site)])
        python = f'value = (run.resid[:, {s}].astype("float32") ** 2).sum("d_model", skipna=False) ** 0.5'
    dim, places = (
        look.positions(site) if site == "resid" else ("position", list(range(len(look.tokens))))
    )
    return Figure(
        "norm of the residual stream",
        python,
        {"value": (("depth", dim), value)},
        look.leads(site) | {dim: places},
    )


def _massive(look: Look) -> Figure:
    site = look.need("resid", "resid_max")
    s = look.s
    if site == "resid_max":
        largest = np.nanmax(look.run[site][:, s], -1)
        return Figure(
            "largest |x| of the residual stream",
            f'value = run.resid_max[:, {s}].max("position")',
            {"value": (("depth",), largest)},
            look.leads(site),
        )
    dim, _ = look.positions(site)
    peaks = []
    middle = []
    for x in look.depths(site):
        there = np.abs(x[~np.isnan(x).any(-1)])
        peaks.append(there.max(0))
        middle.append(np.median(there))
    size = np.stack(peaks)
    tracked = sorted(np.argsort(-size.max(0), kind="stable")[:TRACKED].tolist())
    return Figure(
        "largest dimensions of the residual stream",
        f'value = abs(run.resid[:, {s}, :, {tracked}]).max("{dim}")',
        {
            "value": (("depth", "dimension"), size[:, tracked]),
            "median": (("depth",), np.array(middle)),
        },
        look.leads(site) | {"dimension": tracked},
    )


def _cosine(look: Look) -> Figure:
    site = look.need("resid", "resid_cosine")
    s = look.s
    if site == "resid_cosine":
        value = look.run[site][1:, s]
        leads = {name: values[1:] for name, values in look.leads(site).items()}
        return Figure(
            "cosine with the depth before, mean over tokens",
            f'value = run.resid_cosine[1:, {s}].mean("position")',
            {"value": (("depth",), np.nanmean(value, -1, dtype=np.float64))},
            leads,
        )
    dim, _ = look.positions(site)
    array = look.run[site]
    n = array.shape[0]
    n_positions = array.shape[2]
    width = array.shape[3]
    step = max(TILE_BYTES // (4 * n * width), 1)
    total = np.zeros((n, n))
    first = None
    n_real = 0
    for low in range(0, n_positions, step):
        x = array[:, s, low : low + step].astype(np.float32)
        x = x[:, ~np.isnan(x).any((0, 2))]
        x /= np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
        x = x.swapaxes(0, 1)
        if first is None and len(x):
            first = x[0] @ x[0].T
        total += (x @ x.swapaxes(1, 2)).sum(0, dtype=np.float64)
        n_real += len(x)
    rest = (total - (0 if first is None else first)) / max(n_real - 1, 1)
    python = (
        f'x = run.resid[:, {s}].astype("float32")\nx = (x / (x**2).sum("d_model") ** 0.5).dropna("{dim}")\n'
        f'value = xarray.dot(x, x.rename(depth="depth_2"), dim="d_model").mean("{dim}")'
    )
    axes = ("depth", "depth_2")
    leads = look.leads(site)
    return Figure(
        "cosine between depths, mean over tokens",
        python,
        {"value": (axes, total / max(n_real, 1)), "without_first": (axes, rest)},
        leads | {"depth_2": leads["depth"]},
    )


def _token(look: Look) -> Figure:
    site = look.need("attn_received", "pattern")
    s = look.s
    t = look.position
    if t is None:
        raise ValueError("position is missing; name the token whose attention is wanted.")
    leads = look.leads(site)
    by_query: dict[str, Array] = {}
    if site == "attn_received":
        value = look.run[site][:, s, :, t]
        python = f"value = run.attn_received[:, {s}, :, {t}]"
    if "pattern" in look.run.sites:
        column = look.run["pattern"][:, s, :, t:, t].astype(np.float32)
        by_query = {"by_query": (("query",), column.mean((0, 1)))}
        if site == "pattern":
            value = column.sum(-1)
            python = f'value = run.pattern[:, {s}, :, {t}:, {t}].astype("float32").sum("query")'
    return Figure(
        f"attention that position {t} receives, sum over queries",
        python,
        {"value": (("layer", "head"), value)} | by_query,
        leads | {"query": list(range(t, len(look.tokens)))},
    )


FIGURES: dict[str, Callable[[Look], Figure]] = {
    "tokens": _tokens,
    "sinks": _sinks,
    "norm": _norm,
    "massive": _massive,
    "cosine": _cosine,
    "token": _token,
}


def plain(values: np.ndarray) -> Any:
    """Return nested lists in which NaN and infinities are None."""
    if not values.ndim:
        return plain(values[None])[0]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return nest(
            [v if math.isfinite(v) else None for v in values.reshape(-1).tolist()], values.shape
        )
    return values.tolist()


def nest(flat: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Return the values of an array of a shape, given in order, as nested lists."""
    for n in reversed(shape[1:]):
        flat = [flat[i : i + n] for i in range(0, len(flat), n)]
    return flat
