"""What a job is: a kind, and the document of the command of that name. Paths in it are checked before anything runs."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from headwater.analysis.interventions.requests import REQUESTS
from headwater.analysis.suite.registry import analysis_of
from headwater.extractor.edits.grammar import Edit, read_edits, stored_edits
from headwater.extractor.edits.places import is_prompt
from headwater.extractor.request import RunConfig
from headwater.extractor.settings import EDITS, FILE, MODEL, PLACE, PLAIN, Option, options_of
from headwater.extractor.sites import RequestError
from headwater.service.documents import Json, JsonObject
from headwater.service.jobs.analysis_options import read_options
from headwater.service.jobs.interventions import resolve_intervention
from headwater.service.places import DeniedError, NotHereError, inside, out_path, read_path, shown
from headwater.service.settings import Settings
from headwater.store.manifest import RunError, manifest_path, read_manifest
from headwater.store.place import Place, place_of

# OWNER/NAME or NAME, as the hub allows; nothing that could be read as a path.
HUB_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
# Each is a process with the model in memory, or an actor on the cluster.
MOST_WORKERS = 64


def read_document(document: Mapping[str, Json] | str) -> JsonObject:
    """Return the settings of a document, which may be the text of a TOML file; `seq-len` is the same as `seq_len`."""
    if isinstance(document, str):
        try:
            document = tomllib.loads(document)
        except tomllib.TOMLDecodeError as error:
            raise RequestError(
                f"the document is not TOML: {error}. Its keys are the command's flags."
            ) from error
    if not isinstance(document, Mapping):
        raise RequestError(f"the document is {shown(document)}; expected a table of settings.")
    return {name.replace("-", "_"): value for name, value in document.items()}


def resolve(settings: Settings, kind: str, document: Mapping[str, Json]) -> JsonObject:
    """Return a document with its paths resolved, as a worker runs it; raise ValueError for what may not be."""
    if kind not in KINDS:
        raise RequestError(f"there is no job {kind!r}; expected one of {', '.join(KINDS)}.")
    return KINDS[kind](settings, dict(document))


def run_name(settings: Settings, kind: str, resolved: Mapping[str, Json]) -> str:
    """Return the name of the run that a job writes or reads."""
    place: str = resolved["run"] if kind != "extract" else resolved["out"]
    return place.removeprefix(f"{settings.root}/")


def _extract(settings: Settings, document: JsonObject) -> JsonObject:
    resolved = {name: value for name, value in document.items() if value is not None}
    options = options_of(RunConfig)
    # What is refused says why, before other errors hide it.
    for one in options:
        if one.name in resolved and one.refused:
            raise DeniedError(one.refused)
    _only(document, [one.name for one in options], "extract")
    resolved["out"] = out_path(settings, resolved.get("out"))
    if isinstance(workers := resolved.get("workers"), int) and workers > MOST_WORKERS:
        raise DeniedError(
            f"workers is {workers}; this server runs at most {MOST_WORKERS} for a job."
        )
    for one in options:
        if one.name in resolved:
            resolved[one.name] = allowed(settings, one, resolved[one.name])
    # The values are checked here too, so that a wrong one is refused before a worker takes it. A request that names
    # only a run takes model and edits from its manifest, which must be allowed as if they were named.
    if RunConfig(**resolved).names_only_out:
        _check_stored(settings, place_of(resolved["out"]))
    if settings.ray is not None:
        resolved["ray"] = settings.ray
    return resolved


def allowed(settings: Settings, option: Option, value: Json) -> Json:
    """Return a value with what it names in its place; raise DeniedError where a job may not name that."""
    if option.leads == MODEL:
        return _model(settings, value, option.name)
    if option.leads == EDITS:
        return [_edit(settings, edit).to_json() for edit in read_edits(value)]
    if option.leads == FILE and option.kind.many:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names:
            raise RequestError(
                f"{option.name} is {shown(names)}; expected a list of files or directories."
            )
        return [_file(settings, name, option.name) for name in names]
    if option.leads == FILE:
        return _file(settings, value, option.name)
    if option.leads in (PLAIN, PLACE):
        return value
    # A setting that does not say what its values lead to could name a place that jobs may not reach.
    raise DeniedError(f"{option.name} is not for jobs; leave it out.")


def _file(settings: Settings, name: object, setting: str) -> str:
    """Return a file or directory that a job may read."""
    return _inside_only(read_path(settings, name, setting, settings.texts), settings)


def _analyze(settings: Settings, document: JsonObject) -> JsonObject:
    _only(document, ["run", "analyses", "partial", "again", "options"], "analyze")
    names = document.get("analyses") or []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError(f"analyses is {shown(names)}; expected a list of names.")
    options = read_options(document.get("options", {}), names)
    if "model" in options:
        options = options | {"model": _model(settings, options["model"], "model")}
    return {
        "run": _run(settings, document),
        "analyses": [analysis_of(name).name for name in names],
        "options": options,
        "partial": _switch(document, "partial"),
        "again": _switch(document, "again"),
    }


def _verify(settings: Settings, document: JsonObject) -> JsonObject:
    _only(document, ["run", "quick", "repair"], "verify")
    return {
        "run": _run(settings, document),
        "quick": _switch(document, "quick"),
        "repair": _switch(document, "repair"),
    }


def _intervention(kind: str, settings: Settings, document: JsonObject) -> JsonObject:
    def place(name: str, setting: str, what: str) -> str:
        if what == MODEL:
            return _model(settings, name, setting)
        return _file(settings, name, setting)

    run = _run(settings, document)
    m = read_manifest(place_of(run)).model
    return resolve_intervention(
        kind,
        document,
        run,
        {"model": m["name"], "revision": m["revision"], "activation": m["config"]["activation"]},
        place,
        lambda edit: _edit(settings, edit),
    )


KINDS: dict[str, Callable[[Settings, JsonObject], JsonObject]] = {
    "extract": _extract,
    "analyze": _analyze,
    "verify": _verify,
    **{kind: partial(_intervention, kind) for kind in REQUESTS},
}


def _run(settings: Settings, document: Mapping[str, Json]) -> str:
    # A run outside, a hidden one and none at all are answered alike: nothing is learned of what lies elsewhere.
    name = document.get("run")
    if not isinstance(name, str) or not name:
        raise RequestError("run is missing; name one of the server's runs.")
    try:
        path = inside(settings.root, name)
        if manifest_path(path).is_file():
            return str(path)
    except NotHereError:
        pass
    raise NotHereError(f"there is no run {shown(name)} here.")


def _model(settings: Settings, name: object, what: str) -> str:
    """Return a model that may be loaded: the packaged one, one in an allowed folder, or a hub id."""
    if name == "demo":
        return "demo"
    try:
        return _inside_only(
            read_path(settings, name, what, settings.models), settings, settings.models
        )
    # A name that is no file here may be a hub id; a path that leads elsewhere is never one.
    except DeniedError:
        if isinstance(name, str) and HUB_ID.fullmatch(name) and ".." not in name:
            return name
        raise


def _edit(settings: Settings, edit: Edit) -> Edit:
    """Return an edit whose values come from where jobs may read; a function is code, and is refused."""
    if edit.op == "call" or callable(edit.value):
        raise DeniedError(
            f"edit {shown(str(edit))} calls a function; this server runs no code that a request names."
        )
    if not isinstance(edit.value, str) or is_prompt(edit):
        return edit
    return replace(
        edit, value=_inside_only(read_path(settings, edit.value, "edit", settings.texts), settings)
    )


def _switch(document: Mapping[str, Json], name: str) -> bool:
    value = document.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}; expected true or false.")
    return value


def _check_stored(settings: Settings, run: Place) -> None:
    """Apply to a run that goes on what holds for a new one: its model and its edits must be allowed."""
    try:
        manifest = read_manifest(run)
    except RunError:
        return
    _model(settings, manifest.model["name"], "model")
    for edit in stored_edits(manifest.config):
        _edit(settings, edit)


def _inside_only(path: str, settings: Settings, folders: tuple[Path, ...] | None = None) -> str:
    """Refuse a directory in which a link leads out of what may be read."""
    if folders is None:
        folders = settings.texts
    roots = (settings.local, *folders)
    # The path itself was checked; what a directory of texts or weights holds can still be links.
    for folder, names, files in os.walk(path):
        for name in (*names, *files):
            item = Path(folder, name)
            if item.is_symlink() and not any(item.resolve().is_relative_to(root) for root in roots):
                raise DeniedError(
                    f"{shown(name)} in {Path(path).name} is a link that leads out of what may be read."
                )
    return path


def _only(document: Mapping[str, Json], known: list[str], kind: str) -> None:
    for name in document:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise RequestError(
                f"{shown(name)} is no setting of {kind}{f'; did you mean {near[0]!r}?' if near else '.'} Settings are "
                f"{', '.join(known)}."
            )
