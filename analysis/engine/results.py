"""Results: xarray datasets with their provenance, kept as Zarr groups beside the run.

The results of a run at RUN lie in the directory `RUN.analysis`, one Zarr v3 group per analysis: never inside the run,
whose files are all accounted for.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.store.entry import digest_of
from headwater.store.local import LocalPath
from headwater.store.place import Place, PlaceLike, groups_in, place_of
from headwater.store.reader import Run, open_run
from headwater.store.sealed import broken_files, results_folder, seal
from headwater.store.version import __version__

REQUEST = re.compile(r"\w{1,64}")

# The variables of a dataset before it is made, by name: dimensions and values (and attributes).
Dims = str | tuple[str, ...]
Variable = tuple[Dims, np.ndarray] | tuple[Dims, np.ndarray, dict[str, str]]
Variables = dict[str, Variable]


@dataclass(frozen=True)
class RunResults:
    """The results of one run (or model) by analysis, under a label that tells it from others."""

    label: str
    results: dict[str, Any]
    path: Place | None = None


def kept_results(run: Run | str | Path, label: str | None = None) -> RunResults:
    """Open all results that are kept beside a run, by the name of their analysis, `svd_mlp_out` and so on as such.

    Results of another run that lay at the same path before are left out, and those of other weights; those of blocks
    that were computed again since too, with a warning. Raises ValueError for a damaged one.
    """
    run = run if isinstance(run, Run) else open_run(run)
    found: dict[str, Any] = {}
    for name in groups_in(analysis_folder(run)):
        try:
            found[name] = load(run, name)
        except ForeignResult:
            continue
        except StaleResult as error:
            warnings.warn(str(error), stacklevel=2)
    m = run.manifest
    marks = {"fingerprint": m.fingerprint, "model_digest": m.model["digest"]}
    own = {name: one for name, one in found.items() if _mark(one) in marks.items()}
    return RunResults(label or run.path.resolve().name, own, run.path)


def _mark(result: Any) -> tuple[str, Any]:
    """Return what says whose result it is: the fingerprint of a run, or, of one that took none, the model's digest."""
    name = "fingerprint" if "fingerprint" in result.attrs else "model_digest"
    return name, result.attrs.get(name)


def analysis_path(run: Run | PlaceLike, name: str) -> Place:
    """Return where an analysis of a run is kept: `RUN.analysis/<name>`."""
    return analysis_folder(run) / name


def analysis_folder(run: Run | PlaceLike) -> Place:
    """Return the folder of a run's results, `RUN.analysis`."""
    return results_folder(run.path if isinstance(run, Run) else place_of(run))


def coordinates(run: Run, site: str, leads: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the coordinates of a site's leading dimension and, where it has one, its heads, for a dataset.

    `leads` are indices along the stored dimension; the coordinate holds the model's own numbers.
    """
    spec = run.spec(site)
    chosen = list(range(len(run.leads(site)))) if leads is None else list(leads)
    found: dict[str, Any] = {}
    if spec.axis is not None:
        found[spec.axis] = np.asarray(run.leads(site))[chosen]
        fraction = f"{spec.axis}_fraction"
        found[fraction] = spec.axis, run.plain(fraction)[chosen]
    if "head" in spec.dims:
        found["head"] = run.plain("head")
    return found


def provenance(
    run: Run, name: str, arguments: Mapping[str, Any], passes: int, conventions: str
) -> dict[str, Any]:
    """Return the attributes of a result: what was read, how, with which arguments and versions."""
    import xarray
    import zarr

    m = run.manifest
    complete = np.zeros(m.n_sequences, bool)
    for _, first, last in run.blocks():
        complete[first:last] = True
    marks = run.ledger.marks()
    versions = {
        "headwater": __version__,
        "numpy": np.__version__,
        "xarray": xarray.__version__,
    }
    text = {
        "sources": [source.get("path") for source in m.text["sources"]],
        "digest": m.text["digest"],
        "packing": m.text["packing"],
    }
    return {
        "analysis": name,
        "arguments": json.dumps(arguments, sort_keys=True, default=str),
        "conventions": conventions,
        "passes": passes,
        "run": run.path.name,
        "fingerprint": m.fingerprint,
        "model": m.model["name"],
        "model_digest": m.model["digest"],
        "text": json.dumps(text, sort_keys=True),
        "n_positions": m.n_positions,
        "n_sequences": int(complete.sum()),
        "n_tokens": int(run.plain("length")[complete].sum()),
        "partial": int(not complete.all()),
        "blocks": _as_ranges(sorted(marks)),
        "sums": digest_of(marks, marks),
        "versions": json.dumps(versions | {"zarr": zarr.__version__}, sort_keys=True),
    }


def save(run: Run | str | Place, dataset: Any) -> Place:
    """Write a result to `analysis_path(run, dataset.attrs["analysis"])`, in place of an older one; return the path."""
    return save_at(analysis_path(run, dataset.attrs["analysis"]), dataset)


def save_at(target: PlaceLike, dataset: Any) -> Place:
    """Write a result as a Zarr group at a path with its checksums, in place of an older one; return the path."""
    target = place_of(target)
    if target.local is None:
        _write(dataset, target.for_zarr(read_only=False))
        seal(target)
    else:
        _save_here(LocalPath(target.local), dataset)
    return target


def _save_here(target: LocalPath, dataset: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    with _alone_in(target.parent) as alone_here:
        if alone_here:  # what is there was left by writers that died
            for left in (*target.parent.glob(".*.new.*"), *target.parent.glob(".*.old.*")):
                shutil.rmtree(left, ignore_errors=True)
        try:
            _write(dataset, new)
            seal(new)
            if target.exists():
                target.rename(old)
            new.rename(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def set_aside(run: Run | str | Place, names: Sequence[str], request: str) -> list[Path]:
    """Rename kept results of some names whose `request` is another, so that none is overwritten or mixed with new ones.

    `plateau` becomes `plateau@` and its own request. Returns the new paths. In an object store nothing can be renamed:
    there this raises ValueError.
    """
    import xarray

    moved: list[Path] = []
    for path in (analysis_path(run, name) for name in names):
        if not (path / "zarr.json").is_file():
            continue
        attributes = xarray.open_zarr(path.for_zarr(), chunks=None, zarr_format=3).attrs
        kept = str(attributes.get("request", ""))
        kept = kept if REQUEST.fullmatch(kept) else "earlier"
        if kept == request:
            continue
        if path.local is None:
            raise ValueError(
                f"{path} holds results of other settings. Name another place with --out, or delete it."
            )
        target = path.local.with_name(f"{path.name}@{kept}")
        if target.exists():
            shutil.rmtree(target)
        moved.append(path.local.rename(target))
    return moved


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Wait until no other process writes a result into a folder; yield whether the file system can tell."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _write(dataset: Any, store: Any) -> None:
    for name, variable in dataset.variables.items():
        if variable.dtype.kind in "UO":
            dataset = dataset.assign({name: variable.astype(object)})
            dataset[name].encoding.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        dataset.to_zarr(store, mode="w", zarr_format=3, consolidated=True)


def load(run: Run | PlaceLike, name: str) -> Any:
    """Open a saved result; raise FileNotFoundError with how to make it, ValueError for one that cannot be trusted.

    Its files are compared with their checksums, and the blocks that it was computed from with those that the run holds.
    """
    import xarray

    path = analysis_path(run, name)
    where = run.path if isinstance(run, Run) else run
    if not (path / "zarr.json").is_file():  # Zarr of version 2 has filters that unpickle
        raise FileNotFoundError(
            f"there is no {path}. Make it with `headwater analyze {where} {name}`."
        )
    for file, what in broken_files(path):
        raise ValueError(
            f"{path / file} {what}. Make the result anew with `headwater analyze {where} {name} --again`."
        )
    found = xarray.open_zarr(path.for_zarr(), chunks=None, zarr_format=3)
    if found.attrs.get("analysis") != name.partition("@")[0]:
        raise ValueError(
            f"{path} holds the result of {str(found.attrs.get('analysis'))[:60]!r}. Make it anew with `headwater "
            f"analyze {where} {name} --again`."
        )
    if "fingerprint" not in found.attrs:
        return found
    opened = run if isinstance(run, Run) else open_run(run)
    if found.attrs["fingerprint"] != opened.manifest.fingerprint:
        raise ForeignResult(
            f"{path} holds the result of another run, which lay here. Make it anew with `headwater analyze {where} "
            f"{name}`."
        )
    if "sums" in found.attrs and _is_stale(opened, found):
        raise StaleResult(
            f"{path} was computed from blocks of {where} that were computed again or taken out since. Make it anew "
            f"with `headwater analyze {where} {name}`."
        )
    return found


class ForeignResult(ValueError):
    """A result is that of another run, of which nothing is true here."""


class StaleResult(ValueError):
    """A result was computed from blocks that are not those which the run holds now."""


def _is_stale(run: Run, result: Any) -> bool:
    """Say whether a block that a result was computed from is another now."""
    blocks: list[int] = []
    for part in filter(None, str(result.attrs.get("blocks", "")).split(",")):
        first, _, last = part.partition(":")
        if int(last) > run.manifest.n_blocks:
            return True
        blocks += range(int(first), int(last))
    return bool(digest_of(run.ledger.marks(), blocks) != result.attrs["sums"])


def _as_ranges(blocks: Sequence[int]) -> str:
    """Write sorted numbers as ranges, such as "0:12,14:15"."""
    found: list[list[int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return ",".join(f"{first}:{last}" for first, last in found)
