"""Run chosen analyses of a run: those that scan it in one go, then those that need the model; keep every result.

A result that is kept beside the run and answers the same request is used again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwater.analysis.engine.analysis import STATE_BYTES, Analysis, ModelAnalysis
from headwater.analysis.engine.results import ForeignResult, analysis_path, load, save
from headwater.analysis.engine.scan import (
    ONE_BY_ONE,
    Prepared,
    Scan,
    analyse,
    as_run,
    committed_blocks,
)
from headwater.analysis.suite.registry import (
    analyses,
    analysis_of,
    flag_of,
    make_analysis,
    own_options,
    takes,
)
from headwater.store.entry import digest_of
from headwater.store.files import json_sum
from headwater.store.place import Place
from headwater.store.reader import Run
from headwater.store.version import __version__

KEEP_SECONDS = 30.0


@dataclass
class Outcome:
    """What `analyze` gives: datasets and their places by analysis, which were there already, and what was skipped.

    `replaced` took the place of results of other settings, data or versions.
    `skipped` has the reasons; `failed` the errors of those among them that were not refused, but failed.
    """

    results: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Place] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)


def analyze(
    run: Run | str | Path,
    names: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    scan: Scan = ONE_BY_ONE,
    again: bool = False,
) -> Outcome:
    """Run analyses by name, or all that the run's sites allow; keep the results beside the run.

    `options` go to every chosen analysis that has a parameter of that name. What was not named itself and cannot be
    done is skipped with its reason; a named one raises ValueError before anything is read. One that fails while it runs
    leaves the others to be done; then the error is raised where it was named, or where nothing could be done. `again`
    computes what is there already.
    """
    run = as_run(run)
    named = list(names)
    options = dict(options or {})
    chosen = choose(named, options)
    out = Outcome()
    waiting = describe(run, chosen, named, options, scan, out)
    if not again:
        for name, one in list(waiting.items()):
            if (kept := _kept(run, one.prepared.name, one.request)) is not None:
                _add(out, run, name, kept)
                out.reused.append(name)
                del waiting[name]
    if waiting:
        committed_blocks(run, scan.partial)  # refuses an unfinished run once, for all of them
        _scan(out, run, waiting, scan)
    for kind in chosen:
        if issubclass(kind, ModelAnalysis) and kind.name not in out.skipped:
            with _Skip(out, kind.name, forgiven=kind.name not in named):
                _compute(out, run, kind, options, again)
    for name, error in out.failed.items():
        if name in named or not out.results:
            raise error
    order = [kind.name for kind in chosen]
    out.results = {name: out.results[name] for name in order if name in out.results}
    return out


@dataclass(frozen=True)
class Described:
    """An analysis that scans the run, ready for the engine, and the hash of all that its result depends on."""

    prepared: Prepared
    request: str


def describe(
    run: Run,
    chosen: Iterable[type[Analysis]],
    named: Container[str],
    options: Mapping[str, object],
    scan: Scan,
    out: Outcome,
) -> dict[str, Described]:
    """Describe the chosen analyses that scan a run, by name; note in `out` what cannot be done and was not named."""
    found: dict[str, Described] = {}
    state_bytes = scan.state_bytes(run, STATE_BYTES)
    for kind in chosen:
        with _Skip(out, kind.name, forgiven=kind.name not in named):
            analysis = make_analysis(run, kind, options)
            if issubclass(kind, ModelAnalysis):
                continue
            prepared = analysis.prepare(run, state_bytes)
            own = own_options(run, kind, options)
            request = _request(run, prepared.name, prepared.arguments, own)
            found[kind.name] = Described(prepared, request)
        if kind.name in named and kind.name in out.failed:
            raise out.failed[kind.name]
    return found


def _scan(out: Outcome, run: Run, waiting: Mapping[str, Described], scan: Scan) -> None:
    """Run analyses side by side and keep their results; where one fails, each alone, so that the others are done."""
    try:
        found = analyse(run, [one.prepared for one in waiting.values()], scan)
    except Exception:
        for name, one in waiting.items():
            with _Skip(out, name, forgiven=False):
                (dataset,) = analyse(run, [one.prepared], scan)
                _keep(out, run, name, dataset, one.request)
        return
    for (name, one), dataset in zip(waiting.items(), found, strict=True):
        _keep(out, run, name, dataset, one.request)


def choose(names: list[str], options: Mapping[str, object]) -> list[type[Analysis]]:
    """Return the named analyses and what they bring (all, where none is named), in the order of the registry.

    Raises ValueError for a name or an option that is not known.
    """
    known = analyses()
    wanted: set[str] = set()
    for name in names:
        kind = analysis_of(name)
        wanted |= {kind.name, *kind.brings}
        if issubclass(kind, ModelAnalysis) and kind.after:
            wanted.add(kind.after)
    chosen = [kind for kind in known.values() if kind.name in wanted or not names]
    for option in options:
        if any(takes(kind, option) for kind in chosen):
            continue
        takers = ", ".join(kind.name for kind in known.values() if takes(kind, option))
        if not takers:
            raise ValueError(f"no analysis takes {option!r}. See `headwater analyze --help`.")
        verb = "take" if len(names) > 1 else "takes"
        raise ValueError(f"{' and '.join(names)} {verb} no {flag_of(option)}; it is for {takers}.")
    return chosen


class _Skip:
    """Note why an analysis cannot be done, and go on.

    A refusal (ValueError, OSError) is all there is to it where it is `forgiven`; any other error is a failure too.
    """

    def __init__(self, out: Outcome, name: str, forgiven: bool) -> None:
        self._out = out
        self._name = name
        self._forgiven = forgiven

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        refusal = isinstance(error, ValueError | OSError)
        if not (refusal and self._forgiven):
            self._out.failed[self._name] = error
        said = str(error) if refusal or isinstance(error, RuntimeError) else ""
        fault = f"unexpected {type(error).__name__}: {error}. This is a fault in Headwater."
        self._out.skipped[self._name] = said or fault
        return True


def _compute(
    out: Outcome,
    run: Run,
    kind: type[ModelAnalysis],
    options: Mapping[str, object],
    again: bool,
) -> None:
    """Use the kept result, or run the model; one that goes on from another result depends on that one's request."""
    own = own_options(run, kind, options)
    before = None
    if kind.after:
        if kind.after not in out.results:
            raise ValueError(f"{kind.name} needs the result of {kind.after}.")
        before = out.results[kind.after]
    request = _request(run, kind.name, None if before is None else before.attrs["request"], own)
    kept = None if again else _kept(run, kind.name, request)
    if kept is None:
        _keep(out, run, kind.name, kind(**own).compute(run, before), request)
        return
    _add(out, run, kind.name, kept)
    out.reused.append(kind.name)


def _request(run: Run, name: str, arguments: Any, options: Mapping[str, Any]) -> str:
    """Return a hash of all that a result depends on."""
    marks = run.ledger.marks()
    parts = [
        __version__,
        run.manifest.fingerprint,
        json_sum(run.manifest.statics),
        digest_of(marks, marks),
        name,
        arguments,
        dict(options),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _kept(run: Run, name: str, request: str) -> Any:
    """Return the kept result of a request, None where there is none that can be read."""
    try:
        found = load(run, name)
    except (OSError, ValueError, KeyError):
        return None
    return found if found.attrs.get("request") == request else None


def _keep(out: Outcome, run: Run, name: str, dataset: Any, request: str) -> None:
    try:
        if load(run, dataset.attrs["analysis"]).attrs.get("request") != request:
            out.replaced.append(name)
    except ForeignResult:
        out.replaced.append(name)
    except (OSError, ValueError, KeyError):  # there is none, or none that can be read
        pass
    dataset.attrs["request"] = request
    save(run, dataset)
    _add(out, run, name, dataset)


def _add(out: Outcome, run: Run, name: str, dataset: Any) -> None:
    out.results[name] = dataset
    out.paths[name] = analysis_path(run, dataset.attrs["analysis"])
