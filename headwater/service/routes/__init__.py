"""The application: what the server answers to, over the modules that know how."""

from __future__ import annotations

from fastapi import FastAPI

import headwater
from headwater.service.catalog import Catalog
from headwater.service.guard import Guard
from headwater.service.jobs.scheduler import Executor
from headwater.service.jobs.table import JobQueue
from headwater.service.routes.errors import add_errors
from headwater.service.routes.jobs import add_jobs
from headwater.service.routes.page import add_page
from headwater.service.routes.runs import add_runs
from headwater.service.schemas import ERRORS, Problem, job_documents
from headwater.service.settings import Settings

__all__ = ["make_app"]


def make_app(settings: Settings, jobs: JobQueue, catalog: Catalog, executor: Executor) -> Guard:
    """Build the application, with the guard around it."""
    app = FastAPI(
        title="Headwater",
        version=headwater.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=ERRORS,
        description="Runs of GPT-2-family models: their data, jobs that make them, and figures of what is in them.",
    )
    add_errors(app, settings)
    add_page(app, settings)
    # Files of runs match every path below /runs, so their route comes last of its kind.
    add_runs(app, settings, catalog)
    add_jobs(app, settings, jobs, executor)
    _describe(app)
    return Guard(app, settings)


def _describe(app: FastAPI) -> None:
    """Put the form of errors, and the documents of every kind of job, into the OpenAPI document."""
    make = app.openapi

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            schemas = make().setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = Problem.model_json_schema()
            schemas.update(job_documents())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
