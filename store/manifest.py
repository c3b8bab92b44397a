"""What a run is: its manifest, its Zarr metadata and the arrays that are known before anything is computed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from headwater.store.files import (
    json_sum,
    make_directories,
    sync_directory,
    to_json,
    unique_name,
    write_durably,
    write_synced,
)
from headwater.store.layout import ArraySpec, array_metadata
from headwater.store.local import LocalPath
from headwater.store.objects import ObjectPath, StoreError
from headwater.store.place import Place, PlaceLike, place_of
from headwater.store.raw import PART, check_files, from_raw
from headwater.store.shard import CRC_BYTES, crc32c
from headwater.store.writer import INTERNAL

FORMAT_VERSION = 1
PLAIN_CHUNK_BYTES = 4 << 20
PROBE = "probe-"
MANIFEST = f"{INTERNAL}/manifest.json"


class RunError(ValueError):
    """A directory is not a run, or not one that can be used as asked; the message says what to do next."""


class RunDamaged(RuntimeError):
    """A run's own description cannot be trusted; the message names the file and says what to do."""


@dataclass(frozen=True)
class Manifest:
    """The run's constant description, `headwater/manifest.json`; its presence commits stage 0.

    `config` is the canonical configuration that `fingerprint` covers, together with the weights' and tokens' digests;
    `model`, `text` and `made_by` describe origin and processor; `statics` maps every file that is written once to
    [bytes, sum].
    """

    fingerprint: str
    config: dict[str, Any]
    model: dict[str, Any]
    text: dict[str, Any]
    made_by: dict[str, Any]
    n_sequences: int
    n_positions: int
    block: int
    micro: int
    arrays: tuple[ArraySpec, ...]
    statics: dict[str, list[int]] = field(default_factory=dict)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_sequences // self.block)

    def block_range(self, block: int) -> tuple[int, int]:
        """Return the sequences [first, last) of a block."""
        return block * self.block, min((block + 1) * self.block, self.n_sequences)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values, with their checksum."""
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__}
        raw["arrays"] = [spec.to_json() for spec in self.arrays]
        raw |= {"format": "headwater-run", "format_version": FORMAT_VERSION}
        return raw | {"crc32c": json_sum(raw)}


def manifest_path(run: PlaceLike) -> Place:
    """Return the place of a run's manifest."""
    return place_of(run) / MANIFEST


def read_manifest(run: PlaceLike) -> Manifest:
    """Read a run's manifest; raise RunError where there is none, or one of another version,
    RunDamaged where it does not match its checksum."""
    run = place_of(run)
    path = run / MANIFEST
    if not run.is_dir():
        raise RunError(
            f"there is no run at {run}: no such {run.folder_kind}. Check the "
            "path, or make one with `headwater extract --out`."
        )
    try:
        raw = json.loads(path.read_bytes())
        check = raw.pop("crc32c")
        version = raw["format_version"]
        if version == FORMAT_VERSION and check != json_sum(raw):
            raise ValueError("it does not match its checksum")
        del raw["format"], raw["format_version"]
    except FileNotFoundError:
        raise RunError(
            f"{run} is not a Headwater run, or its text was never committed: {path} does not exist. Check "
            "the path, or run `headwater extract` again with the same arguments."
        ) from None
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunDamaged(
            f"{path} cannot be read ({error}). The run's description is damaged; restore this file from a "
            "copy, or extract the run anew."
        ) from error
    if version != FORMAT_VERSION:
        made_by = raw.get("made_by")
        if isinstance(made_by, dict):
            maker = made_by.get("headwater")
        else:
            maker = None
        raise RunError(
            f"{run} has format version {version}; this Headwater reads version {FORMAT_VERSION}. Use the "
            f"Headwater that made it ({maker or 'unknown'})."
        )
    try:
        return _manifest_of(raw)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise RunError(
            f"{path} does not describe a run: {error}. Its checksum is right, so it was written so: by another "
            "program, or by a later Headwater."
        ) from error


def _manifest_of(raw: dict[str, Any]) -> Manifest:
    """Make a manifest of its JSON; raise ValueError for what no run can be."""
    specs = raw.get("arrays")
    if not isinstance(specs, list):
        raise ValueError("its member 'arrays' is no list")
    arrays = tuple(ArraySpec.from_json(spec) for spec in specs)
    manifest = from_raw(Manifest, raw | {"arrays": []})
    manifest = replace(manifest, arrays=arrays)
    for name in ("n_sequences", "n_positions", "block", "micro"):
        if not 1 <= getattr(manifest, name) < 1 << 48:
            raise ValueError(f"its {name} is {getattr(manifest, name)}")
    check_files(manifest.statics)
    if any(len(pair) != 2 for pair in manifest.statics.values()):
        raise ValueError("a member of its 'statics' is no pair of length and sum")
    from_raw(_Model, manifest.model)
    from_raw(_ModelSizes, manifest.model["config"])
    from_raw(_Text, manifest.text)
    for source in manifest.text["sources"]:
        from_raw(_Source, source)
    for spec in arrays:
        if spec.shape[spec.sequence_dim] != manifest.n_sequences:
            raise ValueError(f"its array {spec.name} has the shape {list(spec.shape)}")
        if manifest.block % spec.sequences_per_shard and manifest.n_sequences > manifest.block:
            raise ValueError(f"its array {spec.name} has shards that lie in more than one block")
    return manifest


@dataclass(frozen=True)
class _Model:
    """What every manifest says of the model."""

    name: str
    digest: str
    config: dict[str, Any]


@dataclass(frozen=True)
class _ModelSizes:
    n_layer: int
    n_head: int
    d_model: int
    d_vocab: int


@dataclass(frozen=True)
class _Text:
    """What every manifest says of the text."""

    sources: list[dict[str, Any]]
    packing: dict[str, Any] | None
    request: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class _Source:
    path: str


def write_manifest(run: Path, manifest: Manifest) -> None:
    """Commit stage 0."""
    # Everything that it names is fsynced already: its presence commits the text. The note of unfinished work is
    # deleted afterwards; a crash between the two leaves a note beside a manifest, which `settle` deletes.
    temporary = run / INTERNAL / "tmp" / unique_name("manifest.json")
    write_durably(run / INTERNAL / "manifest.json", to_json(manifest.to_json()), temporary)
    (run / INTERNAL / "unfinished").unlink(missing_ok=True)


class PlainArray:
    """An array over sequences that is written once, chunk by chunk, before the run's length is known."""

    def __init__(
        self,
        run: Path,
        name: str,
        dtype: str,
        dims: tuple[str, ...],
        tail: tuple[int, ...] = (),
        fill: float = -1,
        chunk: int | None = None,
    ) -> None:
        row = int(np.prod(tail, dtype=np.int64)) * np.dtype(dtype).itemsize
        self.run = run
        self.name = name
        self.dtype = dtype
        self.dims = dims
        self.tail = tail
        self.fill = fill
        self.chunk = chunk or max(PLAIN_CHUNK_BYTES // row, 1)
        self.n, self.digest = 0, hashlib.sha256()
        self.statics: dict[str, list[int]] = {}
        self.attributes: dict[str, Any] = {}
        self._parts: list[np.ndarray] = []
        self._held = 0

    def append(self, values: np.ndarray) -> None:
        """Add rows [n, *tail]; whole chunks go to disk."""
        values = np.ascontiguousarray(values, self.dtype)
        self.digest.update(values.tobytes())
        self.n += len(values)
        self._parts.append(values)
        self._held += len(values)
        # Texts are longer than memory: at most one chunk and one call's rows are held.
        while self._held >= self.chunk:
            rows = np.concatenate(self._parts)
            self._write((self.n - self._held) // self.chunk, rows[: self.chunk])
            self._parts, self._held = [rows[self.chunk :]], self._held - self.chunk

    def close(self) -> dict[str, Any]:
        """Write the last chunk, padded with the fill value (an only chunk is not); return the array's zarr.json."""
        # An array of one chunk is as long as that: no padding in small runs.
        self.chunk = max(min(self.chunk, self.n), 1)
        if self._held:
            rows = np.full((self.chunk, *self.tail), self.fill, self.dtype)
            rows[: self._held] = np.concatenate(self._parts)
            self._write((self.n - self._held) // self.chunk, rows)
        shape = (self.n, *self.tail)
        return array_metadata(
            shape, self.dtype, (self.chunk, *self.tail), None, self.fill, self.dims, self.attributes
        )

    def _write(self, index: int, rows: np.ndarray) -> None:
        path = "/".join(map(str, [self.name, "c", index, *(0 for _ in self.tail)]))
        raw = rows.tobytes()
        write_static(self.run, path, raw + crc32c(raw), self.statics)


def write_static(run: Path, path: str, data: bytes, statics: dict[str, list[int]]) -> None:
    """Write one of the files that never change and note its length and checksum (of a chunk its own) in `statics`."""
    # Written in place, not renamed: until the manifest is there these files do not count, and an interrupted
    # stage 0 is cleared and made again. Each is durable before the manifest is.
    final = run / path
    parents = make_directories(final.parent)
    write_synced(final, data)
    for directory in {final.parent, *parents}:
        sync_directory(directory)
    content = data
    if "/c/" in path:
        content = data[:-CRC_BYTES]
    statics[path] = [len(data), int(google_crc32c.value(content))]


def write_metadata(
    run: Path,
    arrays: Mapping[str, dict[str, Any]],
    attributes: Mapping[str, Any],
    statics: dict[str, list[int]],
) -> None:
    """Write every zarr.json: the arrays' own, then the root group's with all of them consolidated."""
    # The root lists all of them, so that a reader of an object store needs one request; it goes last.
    for name, metadata in arrays.items():
        write_static(run, f"{name}/zarr.json", to_json(metadata), statics)
    consolidated = {
        "kind": "inline",
        "must_understand": False,
        "metadata": dict(sorted(arrays.items())),
    }
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": consolidated,
    }
    write_static(run, "zarr.json", to_json(root), statics)


def write_coordinate(
    run: Path, name: str, dim: str, values: Iterable[float], statics: dict[str, list[int]]
) -> dict[str, Any]:
    """Write a one-dimensional coordinate in one chunk; return its zarr.json."""
    data = np.asarray(list(values))
    data = data.astype("int64" if data.dtype.kind == "i" else "float64")
    raw = data.tobytes()
    write_static(run, f"{name}/c/0", raw + crc32c(raw), statics)
    fill: float = -1
    if data.dtype.kind == "f":
        fill = math.nan
    return array_metadata(data.shape, data.dtype.name, data.shape, None, fill, (dim,), {})


def check_target(run: PlaceLike) -> None:
    """Refuse a directory that is neither new, nor empty, nor ours, or lies in another run; nothing is touched."""
    run = place_of(run)
    if run.remote is not None:
        _check_prefix(run.remote)
        return
    assert run.local is not None
    _check_directory(run.local)


def _check_directory(run: Path) -> None:
    if not (run / MANIFEST).exists():
        _check_above(LocalPath(run))
    if not run.exists():
        return
    if not run.is_dir():
        raise RunError(
            f"--out {run} is a file; name a directory that does not exist yet, or a run to resume."
        )
    if (run / MANIFEST).exists() or (run / INTERNAL / "unfinished").exists():
        return
    ours = {
        INTERNAL,
        f"{INTERNAL}/lock",
        f"{INTERNAL}/tmp",
        f"{INTERNAL}/ledger",
    }
    ours_in_tmp = (f"{INTERNAL}/tmp/{PROBE}", f"{INTERNAL}/tmp/unfinished")
    for item in (
        path for folder in (run, run / INTERNAL, run / INTERNAL / "tmp") for path in _listed(folder)
    ):
        name = item.relative_to(run).as_posix()
        if name not in ours and not name.startswith(ours_in_tmp):
            raise RunError(
                f"--out {run} is not empty and not a Headwater run (it holds {name!r}). Name a new directory; "
                "Headwater writes only into its own."
            )


def _check_above(run: Place) -> None:
    """Refuse a place in a run, or in the results of one.

    A folder there can mean something to that run: one named `00000001.9.gone` in its ledger takes a block out.
    """
    for above in run.above():
        name = above.name.removesuffix(".analysis")
        of = above
        if name != above.name:
            of = above.with_name(name)
        with suppress(OSError):  # who may write here need not be allowed to look there
            if _has_begun(of):
                raise RunError(f"--out {run} lies in the run {of}. Name a place outside of it.")


def _has_begun(run: Place) -> bool:
    return manifest_path(run).is_file() or (run / INTERNAL / "unfinished").is_file()


def _check_prefix(run: ObjectPath) -> None:
    if _has_begun(run):
        return
    _check_above(run)
    for item in run.iterdir():
        name = item.relative_to(run).as_posix()
        if name != f"{INTERNAL}/lock" and not name.startswith(f"{INTERNAL}/tmp/"):
            raise RunError(
                f"--out {run} is not empty and not a Headwater run (it holds {name!r}). Name a new prefix; Headwater "
                "writes only into its own."
            )


def _listed(folder: Path) -> list[Path]:
    if folder.is_dir():
        return sorted(folder.iterdir())
    return []


def settle(run: PlaceLike) -> None:
    """Make durable what an earlier process may have left visible but not synced; the caller holds the lock."""
    run = place_of(run)
    if run.local is None:
        if manifest_path(run).is_file():
            (run / INTERNAL / "unfinished").unlink()
        return
    # A process that died may have renamed a file that it never came to fsync: it is visible now, and would be
    # gone after a power loss. Syncing the directories once makes what is seen durable before it is built upon.
    internal = run.local / INTERNAL
    make_directories(internal / "tmp")
    make_directories(internal / "ledger")
    for directory in (internal / "ledger", internal, run.local, run.local.absolute().parent):
        with suppress(PermissionError):
            sync_directory(directory)
    if manifest_path(run).exists():
        (internal / "unfinished").unlink(missing_ok=True)


def mark_unfinished(run: Path, names: Iterable[str]) -> None:
    """Note that stage 0 is under way and which files and directories of the run it may make."""
    # Durable before the first file of stage 0: after a crash it says what may be deleted, and that the folder
    # is ours.
    data = "".join(f"{name}\n" for name in names).encode()
    write_durably(
        run / INTERNAL / "unfinished", data, run / INTERNAL / "tmp" / unique_name("unfinished")
    )


def clear_unfinished(run: Path) -> None:
    """Remove what an interrupted stage 0 made, and nothing else.

    The note of what it may make is only a file, which anybody may have written: of each name that could be an array's,
    only what an array has is removed, and links are never followed. Raises RunError for anything else.
    """
    marker = run / INTERNAL / "unfinished"
    for name in marker.read_text().split("\n")[:-1] if marker.exists() else ():
        if not PART.fullmatch(name) or not name.strip(".") or name == INTERNAL:
            raise RunError(
                f"{marker} names {name!r}, which Headwater does not make. Nothing of it was deleted; look at what lies "
                f"in {run}, and name another --out."
            )
        item = run / name
        if item.is_symlink() or item.is_file():
            item.unlink()
        elif item.is_dir():
            _remove_array(item)
    sync_directory(run)


def _remove_array(folder: Path) -> None:
    """Remove a Zarr array's description and chunks; raise RunError where its folder holds anything else."""
    for place, folders, files in os.walk(folder, topdown=False):
        inside = Path(place).relative_to(folder).parts
        for name in (*folders, *files):
            item = Path(place, name)
            chunk = inside[:1] == ("c",) and name.isdecimal()
            if not (chunk or (not inside and name in ("c", "zarr.json"))) or item.is_symlink():
                raise RunError(
                    f"{item} is not part of an array, so {folder} was not made by Headwater. Move it away, or name "
                    "another --out."
                )
    shutil.rmtree(folder)
