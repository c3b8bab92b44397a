"""Named slices of a run's arrays, as npy or Arrow: what is asked for is checked and priced before it is read."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from headwater.extractor.units import show_bytes
from headwater.service.catalog import complete_mask
from headwater.service.places import NotHereError
from headwater.service.settings import Limits
from headwater.store.reader import Run

DIMS = (
    "sequence",
    "layer",
    "depth",
    "head",
    "position",
    "selected_position",
    "query",
    "key",
    "rank",
    "d_model",
    "d_head",
    "d_mlp",
)
# A number or a range, at most nine digits, so that no text makes numbers that numpy cannot index with.
RANGE = r"^(-?\d{1,9}|(-?\d{1,9})?:(-?\d{1,9})?)$"
# Named by the model's own numbers: a run may hold layers 4 to 7, and layer 4 is then its first.
BY_LABEL = ("layer", "depth", "head")
PLAIN = (
    "tokens",
    "row_start",
    "length",
    "document",
    "offset",
    "complete",
    "layer",
    "depth",
    "head",
    "position",
    "query",
    "key",
    "selected_position",
    "depth_fraction",
    "layer_fraction",
)


class TooLargeError(ValueError):
    """A slice is larger than one answer may be."""


class IncompleteError(ValueError):
    """A slice holds sequences that are not computed yet."""


@dataclass(frozen=True)
class Slice:
    """A part of an array: the values' dimensions and their coordinates, in order."""

    run: Run
    name: str
    values: np.ndarray
    coordinates: dict[str, np.ndarray]
    incomplete: int

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(self.coordinates)


def read_slice(
    run: Run,
    name: str,
    wanted: Mapping[str, str],
    partial: bool,
    limits: Limits,
    take: Callable[[int], None] = lambda n_bytes: None,
) -> Slice:
    """Read the part of an array that `wanted` names, dimension by dimension; `take` is told its bytes before.

    Layers, depths and heads are named by the model's own numbers, everything else by its place; "3" takes one and
    drops the dimension, "2:5" takes 2, 3 and 4. Raises TooLargeError above the limits of what an answer may hold and
    of what may be read for it, IncompleteError for sequences that are not computed yet unless `partial`, ValueError
    for a selection that the array does not have.
    """
    dims, shape, itemsize = array_shape(run, name)
    if unknown := set(wanted) - set(dims):
        raise ValueError(
            f"{name} has no dimension {sorted(unknown)[0]!r}; it has {', '.join(dims)}."
        )
    chosen: dict[str, tuple[slice, bool, np.ndarray]] = {}
    for dim, size in zip(dims, shape, strict=True):
        labels = np.arange(size)
        if dim in BY_LABEL:
            numbers = run.coordinate(dim)
            if numbers is not None:
                labels = numbers
        chosen[dim] = (*choose(dim, wanted.get(dim, ":"), labels), labels)
    n_bytes = prod(s.stop - s.start for s, _, _ in chosen.values()) * itemsize
    if n_bytes > limits.slice_bytes:
        raise TooLargeError(
            f"this slice of {name} has {show_bytes(n_bytes)}, but an answer has at most "
            f"{show_bytes(limits.slice_bytes)}. Ask for fewer of {', '.join(dims)}, or open the run itself as Zarr."
        )
    if name in run.sites:
        spec = run.spec(name)
        # [start, stop) touches the chunks from start // c to ceil(stop / c): a thin slice through many chunks reads,
        # and where there is a codec unpacks, every one of them whole.
        chunks = []
        for (part, _, _), size in zip(chosen.values(), spec.chunk, strict=True):
            chunks.append(-(-part.stop // size) - part.start // size)
        if (n_read := prod(chunks) * spec.chunk_bytes) > limits.read_bytes:
            raise TooLargeError(
                f"this slice of {name} lies in chunks of {show_bytes(n_read)}, but at most "
                f"{show_bytes(limits.read_bytes)} are read for an answer. Ask for fewer sequences or layers."
            )
    incomplete = 0
    if "sequence" in chosen and name in run.sites:
        part = chosen["sequence"][0]
        incomplete = int((~complete_mask(run, part.start, part.stop)).sum())
        if incomplete and not partial:
            raise IncompleteError(
                f"{incomplete:,} of the sequences {part.start} to {part.stop - 1} are not computed yet. Ask for "
                "others, or for what there is with partial=true: missing values read as NaN, −1, or 0 in pattern."
            )
    # From here on memory is used, so the budget of all answers is asked before anything is read.
    take(n_bytes)
    key = tuple(s.start if dropped else s for s, dropped, _ in chosen.values())
    values = read_array(run, name, key)
    kept = {dim: labels[s] for dim, (s, dropped, labels) in chosen.items() if not dropped}
    return Slice(run, name, values, kept, incomplete)


def array_shape(run: Run, name: str) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """Return the dimensions, shape and item size of a captured or small array."""
    if name in run.sites:
        spec = run.spec(name)
        return spec.dims, spec.shape, np.dtype(spec.dtype).itemsize
    known = name in PLAIN or re.fullmatch(r"label_[\w.-]+", name)
    if known and f"{name}/zarr.json" in run.manifest.statics:
        array = run.small(name)
        return array.dims, array.shape, array.dtype.itemsize
    raise NotHereError(
        f"this run has no array {name!r}; it holds {', '.join(run.sites)}, tokens, length, complete."
    )


def read_array(run: Run, name: str, key: tuple[int | slice, ...]) -> np.ndarray:
    """Read a part of an array, chunk by chunk as far as it is needed."""
    if name in run.sites:
        return run[name][key]
    return run.small(name)[key]


def choose(dim: str, text: str, labels: np.ndarray) -> tuple[slice, bool]:
    """Return the places that "3" or "2:5" names along a dimension, and whether it is one that is dropped."""
    if not re.match(RANGE, text):
        raise ValueError(f"{dim} is {text!r}; expected a number, or a range such as 2:5.")
    n = len(labels)
    by_label = dim in BY_LABEL
    low, colon, high = text.partition(":")
    if not colon:
        value = int(low)
        held = f"0 to {n - 1}"
        if by_label:
            places = np.flatnonzero(labels == value)
            held = ", ".join(map(str, labels[:50]))
        else:
            # As a range of one, so that a number out of range takes nothing; -1 ends at None, not before 0.
            places = np.arange(n)[value : value + 1 or None]
        if len(places) != 1:
            raise ValueError(f"{dim} {value} is not in this array; it holds {held}.")
        return slice(int(places[0]), int(places[0]) + 1), True
    if by_label:
        inside = (labels >= int(low or 0)) & (labels < int(high or 1 << 30))
        places = np.flatnonzero(inside)
        # Stored layers may have gaps (0,4:8); one slice cannot leave out what lies between.
        if len(places) and len(places) != places[-1] - places[0] + 1:
            raise ValueError(
                f"{dim} {text} is no whole range; the array holds {', '.join(map(str, labels[:50]))}."
            )
    else:
        start = int(low) if low else None
        stop = int(high) if high else None
        places = np.arange(n)[start:stop]
    if not len(places):
        raise ValueError(
            f"{dim} {text} takes nothing; the array holds {labels[0]} to {labels[-1]}."
        )
    return slice(int(places[0]), int(places[-1]) + 1), False


def to_npy(values: np.ndarray) -> bytes:
    """Return an array as the bytes of a .npy file, version 1."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), (1, 0), allow_pickle=False)
    return buffer.getvalue()


def to_arrow(part: Slice) -> bytes:
    """Return a slice as an Arrow IPC stream: a row for each place but along the last dimension.

    The columns are the coordinates of the other dimensions and `values`, which holds a list of the last dimension's
    length (numbers where at most one dimension is left); the schema's metadata say what it is.
    """
    import pyarrow as pa

    rows = part.dims[:-1]
    shape = part.values.shape
    n = prod(shape[:-1])
    # "ij" gives row-major order, that of the values: the last of the other dimensions runs fastest.
    grid: Sequence[np.ndarray] = ()
    if rows:
        grid = np.meshgrid(*(part.coordinates[dim] for dim in rows), indexing="ij")
    columns = {d: pa.array(g.reshape(n)) for d, g in zip(rows, grid, strict=True)}
    flat = pa.array(np.ascontiguousarray(part.values).reshape(-1))
    if rows:
        columns["values"] = pa.FixedSizeListArray.from_arrays(flat, shape[-1])
    else:
        columns |= {d: pa.array(part.coordinates[d]) for d in part.dims} | {"values": flat}
    about = {
        "array": part.name,
        "dims": json.dumps(part.dims),
        "shape": json.dumps(shape),
        "fingerprint": part.run.manifest.fingerprint,
        "incomplete": str(part.incomplete),
    }
    table = pa.table(columns).replace_schema_metadata(about)
    # One record batch: the reader has the whole slice or none.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
