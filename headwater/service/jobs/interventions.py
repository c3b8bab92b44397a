"""Jobs that intervene, plateau, patch and ablate: checked requests, whose results are kept beside a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

from headwater.analysis.interventions.requests import REQUESTS, Ablate, make_request
from headwater.extractor.edits.grammar import Edit
from headwater.extractor.settings import EDITS, FILE, MODEL
from headwater.service.documents import Json, JsonObject

TORCH_BYTES = 640 << 20


def resolve_intervention(
    kind: str,
    document: Mapping[str, Json],
    run: str,
    made_from: Mapping[str, Json],
    place: Callable[[str, str, str], str],
    edit: Callable[[Edit], Edit],
) -> JsonObject:
    """Return a job as its worker takes it: the run that results are kept beside, and the request as JSON.

    `run` is that run's place, and `made_from` its model in the settings of a request. `place` checks what a setting
    names (its value, its name, and FILE or MODEL) and returns where it lies; `edit` does so for edits.
    """
    settings = dict(document)
    settings.pop("run", None)
    # A request with rows of its own only keeps its results beside the run.
    own_rows = "text" in settings or "tokens" in settings
    known = {item.name: item.metadata["leads"] for item in fields(REQUESTS[kind])}
    if "run" in known and not own_rows:
        settings["run"] = run
    if settings.get("model") is None:
        settings = {**made_from, **settings, "model": made_from["model"]}
    request = make_request(kind, settings)
    found: JsonObject = {}
    for name, names in known.items():
        value = getattr(request, name)
        if not value or names not in (FILE, MODEL, EDITS):
            continue
        items = value if isinstance(value, tuple) else (value,)
        checked: list[object] = []
        for item in items:
            checked.append(edit(item) if names == EDITS else place(item, name, names))
        found[name] = tuple(checked) if isinstance(value, tuple) else checked[0]
    return {"run": run, "request": replace(request, **found).to_json()}


def plan_intervention(kind: str, document: Mapping[str, Json]) -> JsonObject:
    """Price a request: the memory of its model, with room for activations and gradients. Its time is not known."""
    from math import prod

    from headwater.extractor.edits.places import place_edits
    from headwater.extractor.model.weights import read_config

    request = make_request(kind, document["request"])
    config = read_config(*request.made_from())
    if isinstance(request, Ablate) and request.target is not None:
        place_edits([request.target], config, config.n_ctx)
    # Float32 weights take 4 bytes each; three times as much again is left for their gradients and for activations.
    n_weights = sum(prod(shape) for shape in config.shapes().values())
    return {"host_bytes": TORCH_BYTES + 4 * 4 * n_weights}


def run_intervention(kind: str, document: Mapping[str, Json]) -> JsonObject:
    """Run a request and keep its results beside the run; return their figures by analysis."""
    from headwater.analysis.interventions.figures import headline
    from headwater.store.place import place_of

    request = make_request(kind, document["request"])
    found, _ = request.results()
    request.keep(place_of(document["run"]), found)
    return {"results": {dataset.attrs["analysis"]: headline(dataset) for dataset in found}}
