"""A run whose one array is computed from another run: the same text, blocks, ledger and promises."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.engine.scan import ScanProgress, committed_blocks
from headwater.store.files import make_directories
from headwater.store.layout import LEADING, ArraySpec, array_metadata
from headwater.store.ledger import Entry, Ledger
from headwater.store.lock import hold
from headwater.store.manifest import (
    Manifest,
    RunError,
    check_target,
    clear_unfinished,
    manifest_path,
    mark_unfinished,
    read_manifest,
    settle,
    write_manifest,
    write_metadata,
    write_static,
)
from headwater.store.place import place_of
from headwater.store.reader import Run, open_run
from headwater.store.shard import crc32c
from headwater.store.verify import take_out
from headwater.store.writer import BlockWriter, file_sums

SQUARES = ("query", "key")
Compute = Callable[[int, slice, slice], np.ndarray]
Observe = Callable[[ScanProgress], None]


@dataclass(frozen=True)
class Derived:
    """What is derived: the array, small arrays beside it by name (dimensions, values), and all that fixes the bytes."""

    spec: ArraySpec
    small: Mapping[str, tuple[tuple[str, ...], np.ndarray]]
    identity: Mapping[str, Any]


def derive(
    run: Run,
    out: Path,
    derived: Derived,
    compute: Compute,
    partial: bool = False,
    observe: Observe | None = None,
) -> Run:
    """Make the derived run at `out`, or go on with it; return it for reading.

    `compute` gives the values of (index along the leading dimension, sequences of the run, stored positions). Raises
    RunError where `out` holds something else, or not enough room.
    """
    from headwater.extractor.request import fingerprint

    text = run.manifest.text["digest"]
    config = run.manifest.config | {
        "derived": {"from": run.manifest.fingerprint, **derived.identity}
    }
    mark = fingerprint(config, run.manifest.model["digest"], text)
    blocks = committed_blocks(run, partial)
    check_target(out)
    make_directories(out)
    with hold(out):
        settle(out)
        if not manifest_path(out).exists():
            _commit_text(run, out, derived, config, mark)
        elif (there := read_manifest(out).fingerprint) != mark:
            raise RunError(
                f"{out} holds another run, with fingerprint {there[:16]}; this one would have {mark[:16]}. Name "
                "another place, or ask for the same again to go on with that one."
            )
        _compute(run, out, derived.spec, mark, blocks, compute, observe or (lambda progress: None))
    return open_run(out)


def _commit_text(run: Run, out: Path, derived: Derived, config: dict[str, Any], mark: str) -> None:
    """Copy the run's text and coordinates, and write the metadata and, last, the manifest."""
    from headwater.extractor.maker import made_by

    m = run.manifest
    spec = derived.spec
    dropped = {"zarr.json", *run.sites, *derived.small, *SQUARES}
    dropped |= {
        f"{dim}{end}"
        for dim in (*LEADING, "head")
        if dim not in spec.dims
        for end in ("", "_fraction")
    }
    copied = [path for path in m.statics if path.split("/")[0] not in dropped]
    names = {path.split("/")[0] for path in copied}
    clear_unfinished(out)
    mark_unfinished(out, sorted(names | {"zarr.json", spec.name, "complete", *derived.small}))
    statics: dict[str, list[int]] = {}
    arrays = {name: _metadata(run, name) for name in names if f"{name}/zarr.json" in m.statics}
    for path in copied:
        if not path.endswith("/zarr.json"):
            write_static(out, path, run.read_static(path), statics)
    for name, (dims, values) in derived.small.items():
        raw = values.tobytes()
        write_static(out, "/".join([name, "c", *("0" for _ in dims)]), raw + crc32c(raw), statics)
        fill = float("nan") if values.dtype.kind == "f" else -1
        arrays[name] = array_metadata(
            values.shape, values.dtype.name, values.shape, None, fill, dims, {}
        )
    arrays |= {spec.name: spec.metadata(), "complete": _metadata(run, "complete")}
    root = json.loads(run.read_static("zarr.json"))["attributes"]
    write_metadata(
        out, arrays, root | {"fingerprint": mark, "derived_from": run.path.name}, statics
    )
    manifest = Manifest(
        mark,
        config,
        m.model,
        m.text,
        made_by(),
        m.n_sequences,
        m.n_positions,
        m.block,
        m.micro,
        (spec,),
        dict(sorted(statics.items())),
    )
    write_manifest(out, manifest)


def _metadata(run: Run, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.read_static(f"{name}/zarr.json"))
    return found


def _compute(
    run: Run,
    out: Path,
    spec: ArraySpec,
    mark: str,
    blocks: list[int],
    compute: Compute,
    observe: Observe,
) -> None:
    """Compute and commit the blocks that are missing."""
    m = run.manifest
    ledger = Ledger(out, mark)
    sources = run.ledger.marks()
    done = {entry.block: entry.source for entry in ledger.entries()}
    stale = [b for b, source in done.items() if source not in ("", sources.get(b, source))]
    take_out(out, ledger, stale)
    missing = [block for block in blocks if block not in done or block in stale]
    _check_room(out, spec.stored_bytes(len(missing) * m.block))
    place_of(out).clear_temporary()
    progress = ScanProgress(1, len(blocks), len(blocks) - len(missing))
    writer = BlockWriter(out, (spec,), m.block)
    try:
        for block in missing:
            first, last = m.block_range(block)
            attempt = ledger.next_attempt(block)
            start = time.perf_counter()
            writer.begin(first, last, f"{block:08d}.{attempt}")
            try:
                _fill(writer, spec, first, last, compute)
                seconds = {"compute": time.perf_counter() - start}
                files = file_sums(writer.finish())
            except BaseException:
                writer.abandon()
                raise
            n_tokens = int((run.rows("row_start", first, last) <= np.arange(m.n_positions)).sum())
            who = f"{socket.gethostname()}:{os.getpid()}"
            ledger.commit(
                Entry(
                    block,
                    attempt,
                    mark,
                    first,
                    last,
                    n_tokens,
                    files,
                    {},
                    seconds | writer.seconds,
                    who,
                    source=sources[block],
                )
            )
            progress.done += 1
            observe(progress)
    finally:
        writer.close()


def _fill(writer: BlockWriter, spec: ArraySpec, first: int, last: int, compute: Compute) -> None:
    for lead in range(spec.shape[0]):
        for part in writer.parts(spec.name, lead, first, last - first):
            here = slice(first + part.sequences.start, first + part.sequences.stop)
            part.view[...] = compute(lead, here, part.positions)
        writer.close_layer(str(spec.axis), lead)


def _check_room(out: Path, n_bytes: int) -> None:
    from headwater.extractor.budget import free_disk

    free = free_disk(out)
    if n_bytes > free:
        raise RunError(
            f"{out} needs {n_bytes:,} bytes, but {free:,} are free. Take fewer directions (--k) or depths, or free "
            "some space."
        )
