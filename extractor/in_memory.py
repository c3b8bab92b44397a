"""Capture in memory: the sites of a few texts as an xarray dataset, with no run on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.extractor.capture import CaptureTap
from headwater.extractor.edits.apply import Editor
from headwater.extractor.edits.grammar import Edit, read_edits
from headwater.extractor.edits.places import encode_edits
from headwater.extractor.model.batch import make_batch
from headwater.extractor.model.device_tap import DeviceTap
from headwater.extractor.model.forward import COMPUTE, Model
from headwater.extractor.model.forward_device import KernelModel
from headwater.extractor.model.torch_module import checkpoint_of
from headwater.extractor.model.transfer import Transfer, ring_capacity
from headwater.extractor.model.weights import Checkpoint, load_checkpoint
from headwater.extractor.plan import Plan, geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.sites import RequestError
from headwater.extractor.text.rows import iter_token_rows
from headwater.extractor.text.token_files import read_input
from headwater.extractor.tokenizer import Tokenizer, load_tokenizer
from headwater.store.layout import ArraySpec, sequence_bytes, tile_edge
from headwater.store.writer import Part


class MemorySink:
    """Whole arrays in memory, filled as a BlockWriter's are."""

    def __init__(self, specs: Sequence[ArraySpec]) -> None:
        self.arrays = {s.name: np.full(s.shape, s.fill, s.dtype) for s in specs}
        self._specs = {s.name: s for s in specs}
        self._row: dict[str, tuple[tuple[int, int, int], np.ndarray]] = {}

    def parts(self, name: str, lead: int, first: int, n: int) -> Iterator[Part]:
        """Yield the one place for sequences [first, first + n)."""
        array = self.arrays[name]
        if self._specs[name].axis is not None:
            array = array[lead]
        sequences = array[first : first + n]
        yield Part(sequences, slice(0, n), slice(0, array.shape[1]))

    def tile_row(self, name: str, lead: int, sequence: int, row: int) -> np.ndarray:
        """Return tiles to fill; they are copied to the array by `send_tiles`."""
        key = (lead, sequence, row)
        if name not in self._row or self._row[name][0] != key:
            spec = self._specs[name]
            tiles = np.full((row + 1, spec.grid[2], *spec.chunk[2:]), spec.fill, spec.dtype)
            self._row[name] = (key, tiles)
        return self._row[name][1]

    def send_tiles(self, name: str) -> None:
        """Copy the row of tiles into the square."""
        (lead, sequence, row), tiles = self._row.pop(name)
        # Tiles hold heads in groups and whole edges; the square has neither padding.
        square = self.arrays[name][lead, sequence]
        edge = tiles.shape[-1]
        strip = square[:, row * edge : (row + 1) * edge]
        for j, tile in enumerate(tiles):
            target = strip[:, :, j * edge : (j + 1) * edge]
            target[:] = tile.reshape(-1, edge, edge)[:, : target.shape[1], : target.shape[2]]

    def close_layer(self, axis: str, index: int) -> None:
        """Do nothing: all stays in memory."""


def capture(
    model: Any,
    text: Any,
    sites: Sequence[str] = ("resid",),
    *,
    layers: Any = None,
    depths: Any = None,
    heads: Any = None,
    positions: Any = None,
    bos: bool = False,
    compute: str = "fp32",
    dtype: str = "float32",
    top_k: int = 10,
    tokenizer: str | None = None,
    activation: str | None = None,
    edits: Sequence[Edit | str | Mapping[str, Any]] = (),
) -> Any:
    """Run texts through a model and return what happens inside as an xarray.Dataset with named dimensions.

    `model` is what `headwater extract` takes, a Model, whose compute type then counts, or a GPT-2 in memory: that of
    transformers, or a nanoGPT. `text` is one text, several (one sequence each, padded at the right), token ids as an
    array, a tensor or lists, [sequence, position] or [position], with −1 for padding, or what a Hugging Face tokenizer
    returns, whose attention_mask says what is padding. The other arguments are those of `headwater extract`; `edits`
    change what flows through the model. Texts longer than the model's n_ctx are cut there. Raises RequestError for what
    does not fit the model.
    """
    import xarray

    loaded, checkpoint = _ready(model, compute, activation)
    home = tokenizer or (checkpoint.tokenizer if checkpoint else None)
    coder = None if home is None else load_tokenizer(home)
    ids = read_input(text)
    if not isinstance(ids, np.ndarray):
        ids = _encode(ids, loaded, coder, bos)
    rows = list(iter_token_rows(ids, loaded.config.d_vocab))
    tokens = np.concatenate([row.tokens for row in rows])
    row_start = np.concatenate([row.row_start for row in rows])
    config = RunConfig(
        out=".",
        sites=sites,
        layers=layers,
        depths=depths,
        heads=heads,
        positions=positions,
        dtype=dtype,
        top_k=top_k,
        edits=encode_edits(read_edits(edits), coder),
    )
    n, length = tokens.shape
    shape = replace(geometry(config, loaded.config, length), block=n, micro=n)
    plan = make_plan(config, loaded.config, shape, n)
    sink = run_in_memory(loaded, plan, tokens, row_start)
    data = {spec.name: (spec.dims, sink.arrays[spec.name], spec.attributes) for spec in plan.arrays}
    coords: dict[str, Any] = {"token": (("sequence", "position"), tokens)}
    if coder is not None:
        coords["token_string"] = ("sequence", "position"), _strings(coder, tokens)
    coords |= _coordinates(plan)
    used_compute = next(name for name, dtype in COMPUTE.items() if dtype == loaded.compute)
    name = "" if checkpoint is None else checkpoint.name
    return xarray.Dataset(data, coords, {"model": name, "compute": used_compute})


def _coordinates(plan: Plan) -> dict[str, Any]:
    """Return the coordinates of those dimensions that the arrays have, depth and layer as fractions too."""
    s = plan.selection
    n_layer = plan.model.n_layer
    used = {dim for spec in plan.arrays for dim in spec.dims}
    chosen = {
        "layer": s.layers,
        "depth": s.depths,
        "head": s.heads,
        "selected_position": s.positions or (),
    }
    coords: dict[str, Any] = {dim: list(chosen[dim]) for dim in chosen if dim in used}
    if "depth" in used:
        coords["depth_fraction"] = "depth", [depth / n_layer for depth in s.depths]
    if "layer" in used:  # a layer works between two depths
        coords["layer_fraction"] = "layer", [(layer + 0.5) / n_layer for layer in s.layers]
    return coords


def run_in_memory(
    model: Model, plan: Plan, tokens: np.ndarray, row_start: np.ndarray
) -> MemorySink:
    """Run rows of tokens as one batch and return the arrays of a plan."""
    editor = Editor(plan.edits, model, tokens.shape[1])
    batch = editor.hook(make_batch(tokens, row_start, tile_edge(tokens.shape[1])).to(model.device))
    sink = MemorySink(plan.arrays)
    with ExitStack() as stack, torch.inference_mode():
        tap = CaptureTap(plan, plan.arrays, sink, keep_overflow=True)
        if isinstance(model, KernelModel):
            ring = ring_capacity(sequence_bytes(spec) for spec in plan.arrays)
            transfer = Transfer(model.device, ring)
            stack.callback(transfer.close)
            tap = DeviceTap(plan, plan.arrays, sink, transfer, model.device, keep_overflow=True)
        model.run(batch, tap)
        tap.finish()
    return sink


@lru_cache(maxsize=1)
def _load(
    name: str, compute: str, activation: str | None, seen: tuple[Any, ...]
) -> tuple[Model, Checkpoint]:
    """Load a model once for as long as `seen`, what `_look` saw of its files, stays the same."""
    checkpoint = load_checkpoint(name, None, activation)
    return Model(checkpoint, compute), checkpoint


def _look(name: str) -> tuple[Any, ...]:
    """Return the place of a model on this disk and the size and time of its files; nothing for a hub id or the demo."""
    path = Path(name).expanduser()
    if name == "demo" or not path.exists():
        return ()
    files = [path] if path.is_file() else sorted(path.iterdir())
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    seen = [(file, stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats]
    return (str(path.resolve()), *seen)


def _ready(
    model: Any, compute: str, activation: str | None = None
) -> tuple[Model, Checkpoint | None]:
    """Return a model ready to run, and its checkpoint where it was made here."""
    if isinstance(model, Model):
        return model, None
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        return _load(name, compute, activation, _look(name))
    checkpoint = checkpoint_of(model, activation)
    return Model(checkpoint, compute), checkpoint


def _encode(texts: Sequence[str], model: Model, coder: Tokenizer | None, bos: bool) -> np.ndarray:
    """Return the ids of texts, [sequence, position], −1 for padding."""
    if coder is None:
        raise RequestError(
            "the model comes without a tokenizer; give tokenizer=, or token ids instead of text."
        )
    start = coder.beginning(model.config.bos_token_id, model.config.eos_token_id)
    if bos and start is None:
        raise RequestError(
            "bos: neither the model nor the tokenizer names a beginning-of-text token. Leave it out."
        )
    first = [start] if bos and start is not None else []
    encoded = [(first + ids)[: model.config.n_ctx] for ids in coder.encode_batch(texts)]
    if not encoded or not all(encoded):
        raise RequestError("a text holds no tokens; give texts that are not empty.")
    ids = np.full((len(encoded), max(map(len, encoded))), -1, np.int32)
    for row, values in zip(ids, encoded, strict=True):
        row[: len(values)] = values
    return ids


def _strings(coder: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    return np.array([coder.text_strings(row) for row in tokens], dtype=object).reshape(tokens.shape)
