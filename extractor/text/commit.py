"""Stage 0: commit the text into the run, as token ids, before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater.extractor.budget import check_resources
from headwater.extractor.maker import made_by
from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.plan import Plan
from headwater.extractor.progress import Observer, Progress, silent
from headwater.extractor.request import RunConfig, fingerprint
from headwater.extractor.text.source import Source, check_rows
from headwater.extractor.text.table import LOWEST, DocumentWriter, sequence_labels
from headwater.store.files import to_json
from headwater.store.layout import array_metadata
from headwater.store.manifest import (
    Manifest,
    PlainArray,
    clear_unfinished,
    manifest_path,
    mark_unfinished,
    write_coordinate,
    write_manifest,
    write_metadata,
    write_static,
)
from headwater.store.place import Place
from headwater.store.publish import publish
from headwater.store.scratch import scratch_folder

FILES = ("zarr.json", "documents.parquet", "documents.parquet.loose", "tokenizer.json")
COORDINATES = (
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
TEXT_ARRAYS = ("tokens", "length", "row_start", "document", "offset")


def commit_text(
    run: Place,
    source: Source,
    plan: Plan,
    checkpoint: Checkpoint,
    observe: Observer = silent,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Tokenise the whole text into the run and write its metadata and manifest; the caller holds the lock.

    `plan` need not be sized. For a run in an object store all is made in a scratch directory first. `check` raises
    LockedError once the lock is lost: after hours of tokenising, what was begun there is another's. `observe` is told
    the number of rows so far.
    """
    if run.remote is None:
        assert run.local is not None
        return _commit_here(run.local, source, plan, checkpoint, observe)
    with scratch_folder("hw-text-") as folder:
        (folder / "run").mkdir()
        manifest = _commit_here(folder / "run", source, plan, checkpoint, observe)
        check()
        publish(folder / "run", run.remote, manifest)
    return manifest


def _commit_here(
    run: Path, source: Source, plan: Plan, checkpoint: Checkpoint, observe: Observer
) -> Manifest:
    """Write stage 0 into a directory, after a note of all that it may make: a later process takes it back by that."""
    clear_unfinished(run)
    labels = [f"label_{name}" for name in plan.request.labels]
    sites = [spec.name for spec in plan.arrays]
    mark_unfinished(run, [*FILES, *TEXT_ARRAYS, *COORDINATES, *labels, "complete", *sites])
    try:
        return _commit(run, source, plan, checkpoint, observe)
    except Exception:
        if not manifest_path(run).exists():
            clear_unfinished(run)
        raise


def _commit(
    run: Path, source: Source, plan: Plan, checkpoint: Checkpoint, observe: Observer
) -> Manifest:
    request = plan.request
    statics: dict[str, list[int]] = {}
    arrays = _text_arrays(run, plan.geometry.seq_len)
    table = DocumentWriter(run / "documents.parquet", request.labels) if source.packing else None
    _spool(source, table, arrays, observe)
    plan = plan.sized(check_rows(arrays["tokens"].n, source))
    check_resources(plan, request.out)

    metadata = {name: array.close() for name, array in arrays.items()}
    if table is not None:
        _note(run, "documents.parquet", statics)
        metadata |= _labels(run, arrays, statics)
    if source.tokenizer is not None:
        write_static(run, "tokenizer.json", source.tokenizer.json.encode(), statics)
    for array in arrays.values():
        statics |= array.statics
    digest = tokens_digest(arrays)
    mark = fingerprint(plan.canonical, checkpoint.digest, digest)
    metadata |= {spec.name: spec.metadata() for spec in plan.arrays}
    metadata["complete"] = array_metadata(
        (plan.n_sequences,), "bool", (plan.geometry.block,), None, 0, ("sequence",), {}
    )
    metadata |= _coordinates(run, plan, statics)
    write_metadata(run, metadata, _attributes(checkpoint, mark, request), statics)

    # The manifest comes last, whole or not at all: with it the text is committed.
    manifest = Manifest(
        fingerprint=mark,
        config=plan.canonical,
        model=describe_model(checkpoint, request),
        text=source.describe() | {"digest": digest},
        made_by=made_by(request.device),
        n_sequences=plan.n_sequences,
        n_positions=plan.geometry.seq_len,
        block=plan.geometry.block,
        micro=plan.geometry.micro,
        arrays=plan.arrays,
        statics=dict(sorted(statics.items())),
    )
    write_manifest(run, manifest)
    return manifest


def describe_model(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """Return what the manifest keeps of the model."""
    sizes = {
        name: getattr(checkpoint.config, name) for name in checkpoint.config.__dataclass_fields__
    }
    described = {
        "name": checkpoint.name,
        "revision": config.revision,
        "digest": checkpoint.digest,
        "config": sizes,
    }
    return described | ({"notes": list(checkpoint.notes)} if checkpoint.notes else {})


def tokens_digest(arrays: dict[str, PlainArray]) -> str:
    """Hash the ids and the rows' starts."""
    digest = hashlib.sha256()
    for name in ("tokens", "row_start"):
        array = arrays[name]
        digest.update(f"{name} {array.n} {list(array.tail)} {array.digest.hexdigest()}\n".encode())
    return digest.hexdigest()


def _text_arrays(run: Path, seq_len: int) -> dict[str, PlainArray]:
    square = (("sequence", "position"), (seq_len,))
    return {
        "tokens": PlainArray(run, "tokens", "int32", *square),
        "length": PlainArray(run, "length", "int32", ("sequence",)),
        "row_start": PlainArray(run, "row_start", "int32", *square),
        "document": PlainArray(run, "document", "int64", ("sequence",)),
        "offset": PlainArray(run, "offset", "int64", ("sequence",)),
    }


def _spool(
    source: Source,
    table: DocumentWriter | None,
    arrays: dict[str, PlainArray],
    observe: Observer,
) -> None:
    """Write all rows as they come; the table of documents is closed with them, or given up."""
    progress = Progress("text")
    try:
        for batch in source.rows(table):
            for name in TEXT_ARRAYS:
                arrays[name].append(getattr(batch, name))
            progress.rows = arrays["tokens"].n
            observe(progress)
    except BaseException:
        if table is not None:
            table.__exit__(RuntimeError, None, None)
        raise
    if table is not None:
        table.close()


def _labels(
    run: Path, arrays: dict[str, PlainArray], statics: dict[str, list[int]]
) -> dict[str, dict[str, Any]]:
    """Write the label columns of the rows; string labels are codes, with their names in `categories`."""
    import zarr

    if not any(name.startswith("label_") for name in _column_names(run)):
        return {}
    write_static(run, "document/zarr.json", to_json(_plain_metadata(arrays["document"])), statics)
    document = np.asarray(zarr.open_array(run / "document", mode="r", zarr_format=3)[...])
    metadata = {}
    for name, label in sequence_labels(run / "documents.parquet", document).items():
        values = label.values
        fill = label.missing
        array = PlainArray(run, f"label_{name}", values.dtype.name, ("sequence",), fill=fill)
        array.append(values)
        if label.categories is not None:
            array.attributes["categories"] = list(label.categories)
        if label.missing == LOWEST:
            array.attributes["missing"] = LOWEST
        metadata[f"label_{name}"] = array.close()
        statics |= array.statics
    return metadata


def _plain_metadata(array: PlainArray) -> dict[str, Any]:
    return array_metadata(
        (array.n, *array.tail),
        array.dtype,
        (array.chunk, *array.tail),
        None,
        array.fill,
        array.dims,
        {},
    )


def _column_names(run: Path) -> Sequence[str]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_schema(run / "documents.parquet").names)


def _note(run: Path, path: str, statics: dict[str, list[int]]) -> None:
    """Make a file that another library wrote durable and note its checksum."""
    data = (run / path).read_bytes()
    write_static(run, path, data, statics)


def _coordinates(run: Path, plan: Plan, statics: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Write the coordinate of every dimension that the run's arrays have."""
    s = plan.selection
    n_layer = plan.model.n_layer
    length = plan.geometry.seq_len
    indices: dict[str, Sequence[float]] = {
        "layer": s.layers,
        "depth": s.depths,
        "head": s.heads,
        "position": range(length),
        "query": range(length),
        "key": range(length),
        "selected_position": s.positions or (),
        "depth_fraction": [d / n_layer for d in s.depths],
        "layer_fraction": [(layer + 0.5) / n_layer for layer in s.layers],
    }
    values = {name: (name.removesuffix("_fraction"), indices[name]) for name in COORDINATES}
    used = {"position"} | {dim for spec in plan.arrays for dim in spec.dims}
    return {
        name: write_coordinate(run, name, dim, list(v), statics)
        for name, (dim, v) in values.items()
        if dim in used
    }


def _attributes(checkpoint: Checkpoint, mark: str, config: RunConfig) -> dict[str, Any]:
    sizes = {
        name: getattr(checkpoint.config, name)
        for name in ("n_layer", "n_head", "d_model", "d_head", "d_vocab")
    }
    return {
        "title": "Headwater run",
        "model": checkpoint.name,
        **sizes,
        "fingerprint": mark,
        "compute": config.compute,
        "coordinates": "depth_fraction layer_fraction",
    }
