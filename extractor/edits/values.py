"""Where edits take values from: arrays, means over runs, runs position by position, prompts run on the spot."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from headwater.extractor.edits.places import (
    Place,
    is_prompt,
    item_shape,
    load_array,
    open_source,
    prompt_ids,
)
from headwater.extractor.model.batch import Batch, make_batch
from headwater.extractor.model.forward import Model
from headwater.extractor.model.hook import RecordHook
from headwater.extractor.model.tap import NoTap
from headwater.extractor.sites import SITES, SQUARE
from headwater.store.reader import Run


class Source(Protocol):
    """Something that gives an edit its values."""

    def rows(self, layer: int, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Return values [n, …] for n places, or [1, …] where they are all the same."""

    def square(self, layer: int, sequence: int) -> torch.Tensor:
        """Return a pattern [N, T, T] of one sequence."""


class ArraySource:
    """An array that broadcasts to [layer, sequence, position, …] of the layers that the edit is at."""

    def __init__(self, values: np.ndarray, place: Place, n_dims: int, source: int | None) -> None:
        values = values.reshape((1,) * (n_dims - values.ndim) + values.shape)
        self._values = torch.from_numpy(values)
        self._source = source
        self._at = {layer: i for i, layer in enumerate(place.at)}

    def _layer(self, layer: int) -> torch.Tensor:
        return self._values[self._at[layer] if len(self._values) > 1 else 0]

    def rows(self, layer: int, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Pick places; a dimension of size 1 serves all."""
        values = self._layer(layer)
        position = position if self._source is None else torch.full_like(position, self._source)
        return values[
            sequence if len(values) > 1 else 0 * sequence,
            position if values.shape[1] > 1 else 0 * position,
        ]

    def square(self, layer: int, sequence: int) -> torch.Tensor:
        """Pick a sequence."""
        values = self._layer(layer)
        return values[sequence if len(values) > 1 else 0]


class RunSource:
    """A run, read one layer of a few sequences at a time."""

    def __init__(self, run: Run, site: str, one: int | None, source: int | None) -> None:
        self._array = run[site]
        self._leads = run.leads(site)
        self._one = one
        self._source = source
        self._n = run.manifest.n_sequences
        self._path = run.path
        self._axis = SITES[site].axis

    def _read(self, layer: int, sequence: int) -> torch.Tensor:
        at = sequence
        if self._one is not None:
            at = self._one
        if at >= self._n:
            raise RuntimeError(
                f"an edit takes sequence {at} of {self._path}, which has {self._n}. Give the edit one "
                "of them for all with sequence=."
            )
        where: tuple[int, ...] = (at,)
        if self._axis:
            where = (self._leads.index(layer), at)
        return torch.from_numpy(np.array(self._array[where], np.float32))

    def rows(self, layer: int, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Read the sequences that occur and pick places."""
        position = position if self._source is None else torch.full_like(position, self._source)
        if self._one is not None:
            return self._read(layer, 0)[position]
        parts = {b: self._read(layer, b) for b in set(sequence.tolist())}
        return torch.stack(
            [parts[b][t] for b, t in zip(sequence.tolist(), position.tolist(), strict=True)]
        )

    def square(self, layer: int, sequence: int) -> torch.Tensor:
        """Read one pattern."""
        return self._read(layer, sequence)


def make_source(place: Place, model: Model) -> Source | None:
    """Return what an edit takes its values from, None where it needs nothing."""
    edit = place.edit
    item = item_shape(place.edit.site, model.config)
    if edit.op in ("set", "add") and not isinstance(edit.value, int | float):
        values = load_array(edit)
        if values.ndim > len(item):  # [layer, …]: no sequences, no positions
            values = values.reshape(len(values), 1, 1, *values.shape[1:])
        return ArraySource(values, place, len(item) + 3, None)
    if edit.op not in ("mean", "patch", "linearise") or edit.value is None:
        return None
    site = "mlp_pre" if edit.op == "linearise" else edit.site
    if isinstance(edit.value, np.ndarray):
        values = edit.value
        square = SITES[site].group == SQUARE
        if edit.op == "mean" and values.ndim > len(item):
            values = values.reshape(len(values), 1, 1, *values.shape[1:])
        return ArraySource(values, place, 5 if square else len(item) + 3, edit.source)
    if is_prompt(edit):
        return ArraySource(
            _run_prompt(place, site, model),
            place,
            5 if SITES[site].group == SQUARE else len(item) + 3,
            edit.source,
        )
    run = open_source(edit)
    if edit.op == "mean":
        return ArraySource(
            np.stack([run_mean(run, site, layer) for layer in place.at])[:, None, None],
            place,
            len(item) + 3,
            None,
        )
    return RunSource(run, site, edit.sequence, edit.source)


def run_mean(run: Run, site: str, layer: int) -> np.ndarray:
    """Return the mean of a vector site (or a LayerNorm scale) over every real position of a run, in float64."""
    array = run[site]
    start = run.plain("row_start")
    total = np.zeros(())
    n = 0
    for b in range(run.manifest.n_sequences):
        real = start[b] <= np.arange(start.shape[1])
        value = array[run.leads(site).index(layer), b] if SITES[site].axis else array[b]
        total = total + value[real].astype(np.float64).sum(0)
        n += int(real.sum())
    return np.asarray(total / max(n, 1))


def plain_batch(ids: list[int]) -> Batch:
    """Make a batch of one row of tokens."""
    return make_batch(np.array([ids], np.int32), np.zeros((1, len(ids)), np.int32))


def _run_prompt(place: Place, site: str, model: Model) -> np.ndarray:
    """Run a prompt without edits; return a site's values [layer, 1, T, …] (patterns [layer, 1, N, T, T])."""
    ids = prompt_ids(place.edit, model.config.d_vocab)
    batch = plain_batch(ids)
    record = RecordHook({(site, layer) for layer in place.at})
    model.run(replace(batch, hook=record), NoTap())
    n = len(ids)
    square = SITES[site].group == SQUARE
    kept = [record.kept[site, layer] for layer in place.at]
    return np.stack(
        [(k[:, :, :n, :n] if square else k[:, :n]).double().cpu().numpy() for k in kept]
    )
