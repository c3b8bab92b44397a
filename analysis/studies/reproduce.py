"""Measure the published figures of GPT-2 on given weights: one row each, published beside measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.measures.massive import massive, massive_dimensions
from headwater.analysis.measures.origin import Event, massive_origin
from headwater.analysis.measures.sink_rows import STATISTIC_SITES
from headwater.analysis.measures.sinks import sinks
from headwater.analysis.studies.published import (
    COORDINATES,
    EXACT,
    LONG,
    POSITIONS,
    PUBLISHED,
    SHORT,
    TITLES,
    Figure,
    title_of,
)
from headwater.analysis.weights.circuits import narrow_svd
from headwater.extractor.model.weights import Checkpoint, load_checkpoint
from headwater.extractor.request import RunConfig
from headwater.extractor.run import extract
from headwater.store.reader import Run

SITES = ("resid", *STATISTIC_SITES)
TOLERANCE = 0.1
SHARE_TOLERANCE = 0.01
MASSIVE_DIMENSION = 447
MADE_IN = 2
Measured = dict[str, dict[tuple[int, ...], Any]]


@dataclass(frozen=True)
class Row:
    """One figure: what, where (layer, or layer and head), published (None: nothing is), measured, and agreement.

    `title` says what was measured, with the positions that the model allowed.
    """

    quantity: str
    title: str
    place: tuple[int, ...]
    published: Any
    measured: Any
    agrees: bool | None


def reproduce(
    model: str, text: tuple[str, ...], out: Path, n_sequences: int = 8, revision: str | None = None
) -> list[Row]:
    """Extract two runs below `out`, of sequences of 512 and of 40 tokens, and return the rows for this size of model.

    Figures are taken as they were published: raw weights, float32, no beginning-of-text token. They agree within 10 %
    (shares .01 more); dimensions, positions and neurons exactly; massive coordinates where the published ones are among
    those found. A model of another size than GPT-2 small, medium or large is measured with nothing published.
    """
    checkpoint = load_checkpoint(model, revision)
    long, short = (
        _extract(checkpoint, model, revision, text, out, n, n_sequences) for n in (LONG, SHORT)
    )
    found = _measure(checkpoint, long, short)
    size = (checkpoint.config.n_layer, checkpoint.config.d_model)
    n_ctx = checkpoint.config.n_ctx
    figures = PUBLISHED.get(size)
    if figures is None:
        return [
            Row(name, title_of(name, n_ctx), place, None, value, None)
            for name in found
            for place, value in found[name].items()
        ]
    rows = [_row(figure, found, n_ctx) for figure in figures]
    have = found["massive_dimensions"][()]
    expected = list(COORDINATES[size])
    title = title_of("massive_dimensions", n_ctx)
    agrees = set(expected) <= set(have)
    return [*rows, Row("massive_dimensions", title, (), expected, have, agrees)]


def _extract(
    checkpoint: Checkpoint,
    model: str,
    revision: str | None,
    text: tuple[str, ...],
    out: Path,
    n: int,
    n_sequences: int,
) -> Run:
    n = min(n, checkpoint.config.n_ctx)
    return extract(
        RunConfig(
            model=model,
            revision=revision,
            text=text,
            out=str(out / f"reproduce-{n}"),
            sites=SITES,
            seq_len=n,
            max_sequences=n_sequences,
            dtype="float32",
        )
    )


def _measure(checkpoint: Checkpoint, long: Run, short: Run) -> Measured:
    """Measure every quantity of TITLES that the model's size allows."""
    c = checkpoint.config
    found: Measured = {name: {} for name in TITLES}
    for depth in range(1, c.n_layer + 1):
        size = np.abs(long["resid"][depth])
        sequence, position, dimension = np.unravel_index(size.argmax(), size.shape)
        here = (depth - 1,)
        found["max_size"][here] = float(size[sequence, position, dimension])
        found["max_dimension"][here], found["max_position"][here] = int(dimension), int(position)
        found["median_size"][here] = float(np.median(size))
    for run, suffix in ((long, ""), (short, "_40")):
        got = sinks(run)
        inner = got.share_by_layer.sel(query_set="second_half")[3 : max(c.n_layer - 1, 4)]
        if inner.size:
            found[f"share_second_half{suffix}"][()] = float(inner.mean())
        if run is long:
            share = got.first_token_share.sel(query_set="second_half").values
            found["head_share"] = {place: float(share[place]) for place in np.ndindex(*share.shape)}
            last = got.share_by_layer.sel(query_set="last_64").values
            found["share_last_64"] = {(layer,): float(value) for layer, value in enumerate(last)}
    found["massive_dimensions"][()] = massive_dimensions(massive(long))
    for layer in range(c.n_layer):
        sigma = narrow_svd(checkpoint.tensors[f"h.{layer}.mlp.c_proj.weight"].double())[1]
        found["w_out_sigma_1"][layer,] = float(sigma[0])
        found["w_out_sigma_ratio"][layer,] = float(sigma[0] / sigma[1])
    if c.d_model > MASSIVE_DIMENSION and c.n_layer > MADE_IN:
        origin = massive_origin(
            long, model=checkpoint.name, events=[Event(MASSIVE_DIMENSION, 0, 0)], n_neurons=1
        )
        found["mlp_out_447"][MADE_IN,] = abs(float(origin.mlp_out[0, MADE_IN]))
        found["neuron_447"][MADE_IN,] = int(origin.neuron[0, MADE_IN, 0])
    return found


def _row(figure: Figure, found: Measured, n_ctx: int) -> Row:
    measured = found[figure.quantity].get(figure.place)
    published: Any = figure.value
    agrees: bool | None = None
    if n_ctx < POSITIONS.get(figure.quantity, 0):
        published = None
    elif measured is not None and figure.quantity in EXACT:
        published = int(figure.value)
        agrees = measured == figure.value
    elif measured is not None:
        room = TOLERANCE * abs(figure.value) + SHARE_TOLERANCE * ("share" in figure.quantity)
        agrees = abs(measured - figure.value) <= room
    title = title_of(figure.quantity, n_ctx)
    return Row(figure.quantity, title, figure.place, published, measured, agrees)
