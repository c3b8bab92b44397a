"""The options that jobs may give to analyses: those that the analyses' own fields offer, checked as a flag is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from headwater.analysis.suite.registry import all_options, analyses
from headwater.extractor.sites import RequestError
from headwater.service.places import shown


def read_options(options: object, names: Iterable[str] = ()) -> dict[str, object]:
    """Return checked options of the named analyses, or of all.

    Raises RequestError that names the option which is not known, or not as it must be.
    """
    if not isinstance(options, Mapping):
        raise RequestError(
            f"options is {shown(options)}; expected a table of the analyses' options."
        )
    known = all_options()
    wanted = set(names)
    found: dict[str, object] = {}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise RequestError(
                f"{shown(name)} is no option of analyses{hint} Options are {', '.join(known)}."
            )
        if value is None:
            continue
        takers = [option for kind, option in known[name] if kind.name in wanted]
        option = (takers or [option for _, option in known[name]])[0]
        found[name] = option.kind.read(f"the option {name}", value)
    return found


def analyze_schema() -> dict[str, object]:
    """Return the JSON schema of the document of an `analyze` job, made of the fields of the analyses."""
    options = {name: takers[0][1].schema() for name, takers in all_options().items()}
    return {
        "type": "object",
        "description": "Analyse a run, and keep the results beside it.",
        "properties": {
            "run": {"type": "string", "description": "one of the server's runs"},
            "analyses": {
                "type": "array",
                "items": {"type": "string", "enum": list(analyses())},
                "description": "analyses by name; by default all that the run's sites allow",
            },
            "partial": {
                "type": "boolean",
                "description": "analyse the finished blocks of an unfinished run",
            },
            "again": {
                "type": "boolean",
                "description": "compute results anew that are there already",
            },
            "options": {
                "type": "object",
                "properties": options,
                "additionalProperties": False,
            },
        },
        "required": ["run"],
        "additionalProperties": False,
    }
