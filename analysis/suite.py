"""Run chosen analyses of a run: those that scan it in one go, then those that need the model; keep every result.

A result that is kept beside the run and answers the same request is used again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import headwater
from headwater.analysis.engine import ONE_BY_ONE, Analysis, Scan, analyse, as_run
from headwater.analysis.registry import ENTRIES, REGISTRY, Entry, entry_of
from headwater.analysis.results import analysis_path, load, save
from headwater.store.manifest import RunError
from headwater.store.place import Place
from headwater.store.reader import Run

KEEP_SECONDS = 30.0


@dataclass
class Outcome:
    """What `analyze` gives: datasets and their places by analysis, which were there already, and what was skipped."""

    results: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Place] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def analyze(
    run: Run | str | Path,
    names: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    scan: Scan = ONE_BY_ONE,
    again: bool = False,
) -> Outcome:
    """Run analyses by name, or all that the run's sites allow; keep the results beside the run.

    `options` go to every chosen analysis that has a parameter of that name. What was not named itself and cannot be
    done is skipped with its reason; a named one raises ValueError. `again` computes what is there already.
    """
    run, named, options = as_run(run), list(names), dict(options or {})
    chosen = choose(named, options)
    out, waiting = Outcome(), dict[str, tuple[Entry, Analysis, str]]()
    for entry in chosen:
        with _Skip(out, entry.name, entry.name in named):
            own = own_options(run, entry, options)
            if entry.scan:
                extra = {"state_bytes": scan.state_bytes(run, 256 << 20)} if entry.takes("state_bytes") else {}
                described = entry.function(run, **own, **extra)
                waiting[entry.name] = entry, described, _request(run, described.name, described.arguments, own)
    if not again:
        for name, (_, described, request) in list(waiting.items()):
            if (kept := _kept(run, described.name, request)) is not None:
                _add(out, run, name, kept)
                out.reused.append(name)
                del waiting[name]
    for name, dataset in zip(waiting, analyse(run, [w[1] for w in waiting.values()], scan), strict=True):
        _keep(out, run, name, dataset, waiting[name][2])
    for entry in chosen:
        if entry.compute and entry.name not in out.skipped:
            with _Skip(out, entry.name, entry.name in named):
                _compute(out, run, entry, options, again)
    order = [entry.name for entry in chosen]
    out.results = {name: out.results[name] for name in order if name in out.results}
    return out


def choose(names: list[str], options: Mapping[str, Any]) -> list[Entry]:
    """Return the named analyses and what they bring (all, where none is named), in the order of the registry.

    Raises ValueError for a name or an option that is not known.
    """
    wanted = {entry_of(name).name for name in names}
    wanted |= {other for name in wanted for other in (*REGISTRY[name].brings, REGISTRY[name].after) if other}
    chosen = [entry for entry in ENTRIES if entry.name in wanted or not names]
    for option in options:
        if not any(entry.takes(option) for entry in chosen):
            raise ValueError(f"{option} is an option of none of {', '.join(entry.name for entry in chosen)}.")
    return chosen


def own_options(run: Run, entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that an analysis takes, with a site that the run holds; raise RunError where it lacks one."""
    own = {name: value for name, value in options.items() if entry.takes(name)}
    if why := entry.lacking(run, own):
        raise RunError(why)
    if "site" in entry.options() and "site" not in own:
        own["site"] = next(sites[0] for sites in entry.needs if set(sites) <= set(run.sites))
    return own


class _Skip:
    """Note why an analysis that was not named itself cannot be done."""

    def __init__(self, out: Outcome, name: str, named: bool) -> None:
        self._out, self._name, self._named = out, name, named

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if self._named or not isinstance(error, (ValueError, OSError)):
            return False
        self._out.skipped[self._name] = str(error)
        return True


def _compute(out: Outcome, run: Run, entry: Entry, options: Mapping[str, Any], again: bool) -> None:
    own = own_options(run, entry, options)
    given: dict[str, Any] = {}
    if entry.after:
        if entry.after not in out.results:
            raise ValueError(f"{entry.name} needs the result of {entry.after}.")
        given["result"] = out.results[entry.after]
    request = _request(run, entry.name, given["result"].attrs["request"] if given else None, own)
    kept = None if again else _kept(run, entry.name, request)
    if kept is not None:
        _add(out, run, entry.name, kept)
        out.reused.append(entry.name)
    else:
        _keep(out, run, entry.name, entry.function(run, **given, **own), request)


def _request(run: Run, name: str, arguments: Any, options: Mapping[str, Any]) -> str:
    """Return a hash of all that a result depends on."""
    blocks = sorted(run.ledger.committed())
    parts = [headwater.__version__, run.manifest.fingerprint, blocks, name, arguments, dict(options)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _kept(run: Run, name: str, request: str) -> Any:
    """Return the kept result of a request, None where there is none that can be read."""
    try:
        found = load(run, name)
    except (OSError, ValueError, KeyError):
        return None
    return found if found.attrs.get("request") == request else None


def _keep(out: Outcome, run: Run, name: str, dataset: Any, request: str) -> None:
    dataset.attrs["request"] = request
    save(run, dataset)
    _add(out, run, name, dataset)


def _add(out: Outcome, run: Run, name: str, dataset: Any) -> None:
    out.results[name] = dataset
    out.paths[name] = analysis_path(run, dataset.attrs["analysis"])
