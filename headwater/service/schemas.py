"""The forms of what requests carry, and of what they are answered where something is wrong."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from headwater.analysis.interventions.requests import REQUESTS
from headwater.extractor.request import RunConfig
from headwater.extractor.settings import Request, request_schema
from headwater.service.documents import JsonObject
from headwater.service.jobs.analysis_options import analyze_schema


class Problem(BaseModel):
    """What is wrong, in one paragraph."""

    detail: str


class Submission(BaseModel):
    """A job: `kind` is a command, `document` its arguments as an object, or as the text of a run.toml.

    The schemas ExtractDocument, PlateauDocument and so on say what the documents of each kind may hold.
    """

    model_config = ConfigDict(extra="forbid")
    kind: Annotated[str, Field(max_length=50)] = "extract"
    document: JsonObject | str


class Login(BaseModel):
    """The token of the server."""

    model_config = ConfigDict(extra="forbid")
    token: Annotated[str, Field(max_length=1000)]


# Every route can give every one of them: the guard and the error handlers stand around all.
ERRORS: dict[int | str, JsonObject] = {
    code: {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for code, text in {
        400: "a request that cannot be met",
        401: "a token is needed",
        403: "from another origin",
        404: "not here",
        405: "another method",
        408: "came too slowly",
        409: "not computed yet",
        413: "too large",
        421: "another Host",
        422: "cannot be read",
        503: "took too long, or busy",
    }.items()
}


def job_documents() -> dict[str, dict[str, object]]:
    """Return the JSON schemas of jobs' documents by name, made of the fields of their requests."""
    # The same classes that check the documents, so the description cannot say anything else.
    requests: dict[str, type[Request]] = {"extract": RunConfig, **REQUESTS}
    schemas = {f"{kind.title()}Document": request_schema(one) for kind, one in requests.items()}
    return schemas | {"AnalyzeDocument": analyze_schema()}
