"""Jobs that are commands over a run: plateau, patch and ablate. A document's settings are the command's flags."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from headwater.extractor.edits import OPS, parse_edit
from headwater.extractor.sites import RequestError
from headwater.service.places import shown

COMMANDS = ("plateau", "patch", "ablate")
LISTS = ("text", "edits", "repeated")
REFUSED = ("plot", "out", "json")
TORCH_BYTES = 640 << 20


def resolve_command(
    document: Mapping[str, Any], run: Callable[[], str], read: Callable[[Any, str], str], model: Callable[[Any], str],
    edit: Callable[[Any], Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the settings of a command with their paths resolved; `run`, `read`, `model` and `edit` check their kinds.

    `run` names the run that the results are kept beside. Flags themselves are checked by the command, when it is
    planned.
    """
    resolved: dict[str, Any] = {}
    for name, value in document.items():
        if name in REFUSED or not name.isidentifier():
            raise RequestError(f"{shown(name)} is no setting here: results are kept beside the run.")
        if not isinstance(value, str | int | float | bool | list) or _nested(value):
            raise RequestError(f"{name} is {shown(value)}; expected text, a number, true or false, or a list of those.")
        resolved[name] = value
    for name in ("tokens", "pairs"):
        if name in resolved:
            resolved[name] = read(resolved[name], name)
    if "text" in resolved:
        texts = resolved["text"] if isinstance(resolved["text"], list) else [resolved["text"]]
        resolved["text"] = [read(text, "text") for text in texts]
    for name in ("model", "tokenizer"):
        if name in resolved:
            resolved[name] = model(resolved[name])
    if "edits" in resolved:
        edits = resolved["edits"] if isinstance(resolved["edits"], list) else [resolved["edits"]]
        resolved["edits"] = [str(edit(parse_edit(str(line)))) for line in edits]
    if "target" in resolved:
        line = str(resolved["target"])
        has_op = any(word.partition("=")[0] in OPS for word in line.split()[1:])
        resolved["target"] = str(edit(parse_edit(line if has_op else f"{line} scale=1")))
    return resolved | {"run": run()}


def _nested(value: Any) -> bool:
    return isinstance(value, list) and not all(isinstance(item, str | int | float) for item in value)


def read_command(kind: str, document: Mapping[str, Any]) -> Any:
    """Return the command's options; raise ValueError for a flag that it does not have."""
    from headwater.arguments import read_arguments

    own_rows = kind == "ablate" and ("text" in document or "tokens" in document)
    flags = [kind, "--json", "--out", document["run"]]
    if kind != "patch" and not own_rows:
        flags += ["--run", document["run"]]
    for name, value in document.items():
        flag = {"edits": "--edit"}.get(name, f"--{name.replace('_', '-')}")
        if name == "run" or value is False:
            continue
        if value is True:
            flags.append(flag)
        elif name == "text":
            flags += [flag, *map(str, value)]
        elif isinstance(value, list) and name in LISTS:
            flags += [f"{flag}={item}" for item in value]
        else:
            flags.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    if "model" not in document:
        flags.append(f"--model={_stored_model(document['run'])}")
    return read_arguments(flags)


def plan_command(kind: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Price a command: the memory of its model, with room for activations and gradients. Its time is not known."""
    from math import prod

    from headwater.extractor.weights import read_config

    options = read_command(kind, document)
    n_weights = sum(prod(shape) for shape in read_config(options.model).shapes().values())
    return {"host_bytes": TORCH_BYTES + 4 * 4 * n_weights}


def run_command(kind: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Run a command; return what it prints as JSON."""
    options = read_command(kind, document)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        options.command(options)
    return {"results": {result["analysis"]: result["figures"] for result in json.loads(printed.getvalue())}}


def _stored_model(run: str) -> str:
    from headwater.store.manifest import read_manifest
    from headwater.store.place import place_of

    return str(read_manifest(place_of(run)).model["name"])
