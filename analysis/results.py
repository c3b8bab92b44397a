"""Results: xarray datasets with their provenance, kept as Zarr groups beside the run.

The results of a run at RUN lie in the directory `RUN.analysis`, one Zarr v3 group per analysis: never inside the run,
whose files are all accounted for.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.store.objects import ObjectPath
from headwater.store.place import Place, for_zarr, groups_in, place_of
from headwater.store.reader import Run, open_run


@dataclass(frozen=True)
class RunResults:
    """The results of one run (or model) by analysis, under a label that tells it from others."""

    label: str
    results: dict[str, Any]
    path: Place | None = None


def kept_results(run: Run | str | Path, label: str | None = None) -> RunResults:
    """Open all results that are kept beside a run, by the name of their analysis, `svd_mlp_out` and so on as such.

    Results of another run that lay at the same path before are left out, and those of other weights.
    """
    run = run if isinstance(run, Run) else open_run(run)
    found = {name: load(run, name) for name in groups_in(analysis_folder(run))}
    m = run.manifest
    marks = {"fingerprint": m.fingerprint, "model_digest": m.model["digest"]}
    own = {name: one for name, one in found.items() if _mark(one) in marks.items()}
    return RunResults(label or run.path.resolve().name, own, run.path)


def _mark(result: Any) -> tuple[str, Any]:
    """Return what says whose result it is: the fingerprint of a run, or, of one that took none, the model's digest."""
    name = "fingerprint" if "fingerprint" in result.attrs else "model_digest"
    return name, result.attrs.get(name)


def analysis_path(run: Run | str | Place, name: str) -> Place:
    """Return where an analysis of a run is kept: `RUN.analysis/<name>`."""
    return analysis_folder(run) / name


def analysis_folder(run: Run | str | Place) -> Place:
    """Return the folder of a run's results, `RUN.analysis`."""
    path = (run.path if isinstance(run, Run) else place_of(run)).resolve()
    return path.with_name(f"{path.name}.analysis")


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


def provenance(run: Run, name: str, arguments: Mapping[str, Any], passes: int, conventions: str) -> dict[str, Any]:
    """Return the attributes of a result: what was read, how, with which arguments and versions."""
    import xarray
    import zarr

    import headwater

    m = run.manifest
    complete = np.zeros(m.n_sequences, bool)
    for _, first, last in run.blocks():
        complete[first:last] = True
    versions = {"headwater": headwater.__version__, "numpy": np.__version__, "xarray": xarray.__version__}
    text = {"sources": [source.get("path") for source in m.text["sources"]], "digest": m.text["digest"],
            "packing": m.text["packing"]}  # fmt: skip
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
        "versions": json.dumps(versions | {"zarr": zarr.__version__}, sort_keys=True),
    }


def save(run: Run | str | Place, dataset: Any) -> Place:
    """Write a result to `analysis_path(run, dataset.attrs["analysis"])`, in place of an older one; return the path."""
    return save_at(analysis_path(run, dataset.attrs["analysis"]), dataset)


def save_at(target: Place, dataset: Any) -> Place:
    """Write a result as a Zarr group at a path, in place of an older one; return the path."""
    if isinstance(target, ObjectPath):
        alone = ObjectPath(str(target))  # zarr would make groups of the prefixes above, beside other runs
        _write(dataset, alone.zarr_store(read_only=False))
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    _write(dataset, new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _write(dataset: Any, store: Any) -> None:
    for name, variable in dataset.variables.items():
        if variable.dtype.kind in "UO":
            dataset = dataset.assign({name: variable.astype(object)})
            dataset[name].encoding.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        dataset.to_zarr(store, mode="w", zarr_format=3, consolidated=True)


def load(run: Run | str | Path, name: str) -> Any:
    """Open a saved result; raise FileNotFoundError with how to make it."""
    import xarray

    path = analysis_path(run, name)
    if not path.is_dir():
        where = run.path if isinstance(run, Run) else run
        raise FileNotFoundError(f"there is no {path}. Make it with `headwater analyze {where} {name}`.")
    return xarray.open_zarr(for_zarr(path), chunks=None)
