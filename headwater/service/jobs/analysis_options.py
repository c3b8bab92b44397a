"""The options that jobs may give to analyses: which there are, and what each may be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headwater.extractor.sites import SITES, SQUARE, VECTOR, RequestError
from headwater.service.places import shown

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]
Indices = Annotated[
    list[Annotated[int, Field(ge=0, le=1_000_000)]], Field(min_length=1, max_length=10_000)
]

# As on the command line: 0,4:8, :2, -1.
Selection = Annotated[str, Field(pattern=r"^[-0-9:, ]+$", max_length=1000)]


class Options(BaseModel):
    """Options of analyses by name, each in its own type; what Python takes besides is not for jobs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    at: Indices | Selection | None = None
    centrings: list[Literal["raw", "centred"]] | None = None
    directions: bool | None = None
    epsilon: Share | None = None
    fold_ln_f: bool | None = None
    k: Annotated[int, Field(ge=1, le=10_000)] | None = None
    keep: Count | None = None
    layers: Indices | Selection | None = None
    lengths: Annotated[list[Annotated[int, Field(ge=2, le=10_000)]], Field(min_length=1)] | None = (
        None
    )
    level: Literal["large", "strict", "largest"] | None = None
    min_rows: Count | None = None
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10_000)] | None = None
    n_keys: Count | None = None
    n_neurons: Count | None = None
    n_positions: Count | None = None
    n_queries: Count | None = None
    n_sequences: Count | None = None
    n_tokens: Annotated[int, Field(ge=1, le=10_000)] | None = None
    outliers: Literal["large"] | Indices | Selection | None = None
    pairs: Literal["consecutive", "all"] | None = None
    positions: list[Literal["all", "without_first"]] | None = None
    queries: Indices | None = None
    ratio: Share | None = None
    reach: Annotated[int, Field(ge=0, le=1000)] | None = None
    seed: Seed | None = None
    sign: Literal[1, -1] | None = None
    site: str | None = None
    source: Literal["auto", "pattern", "statistics"] | None = None
    tokens: Indices | None = None
    units: Indices | Selection | None = None
    window: Count | None = None
    words: bool | None = None


def read_options(options: Any) -> dict[str, Any]:
    """Return checked options; raise RequestError that names the option which is not known, or not as it must be."""
    if not isinstance(options, Mapping):
        raise RequestError(
            f"options is {shown(options)}; expected a table of the analyses' options."
        )
    known = list(Options.model_fields)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise RequestError(
                f"{shown(name)} is no option of analyses{hint} Options are {', '.join(known)}."
            )
    try:
        found = Options.model_validate(dict(options)).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise RequestError(
            f"the option {name} is {shown(options[name])}: {first['msg'].lower()}."
        ) from None
    vectors = [site.name for site in SITES.values() if site.group in (VECTOR, SQUARE)]
    if found.get("site", "resid") not in vectors:
        raise RequestError(
            f"the option site is {shown(found['site'])}; expected one of {', '.join(vectors)}."
        )
    return found
