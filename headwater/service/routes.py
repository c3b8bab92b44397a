"""The routes: what the server answers to, over the modules that know how."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import fastapi
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

import headwater
from headwater.service.catalog import Catalog
from headwater.service.connections import Budget, BusyError
from headwater.service.data import figures, slices
from headwater.service.data.results import read_result
from headwater.service.data.texts import Upload
from headwater.service.data.zarr_files import file_response, zarr_file
from headwater.service.guard import COOKIE, Guard, cookie_value, same
from headwater.service.jobs.requests import read_document
from headwater.service.jobs.scheduler import Executor
from headwater.service.jobs.table import JobQueue
from headwater.service.places import NotHereError, public, shown
from headwater.service.schemas import ERRORS, Login, Problem, Submission
from headwater.service.settings import Settings
from headwater.store.entry import LedgerError
from headwater.store.manifest import RunDamaged
from headwater.store.objects import StoreError

PAGE = files("headwater.service") / "page"
EVENT_SECONDS = 0.2
BEAT_SECONDS = 15.0
PLANS = 8
Name = Annotated[
    str, fastapi.Path(max_length=1000, description="a run, by its path under the server's root")
]
Place = Annotated[int, Query(ge=0, le=2**31 - 1)]
Selected = Annotated[
    str | None, Query(pattern=slices.RANGE, description='a number, or a range such as "2:5"')
]


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
    _add_errors(app, settings)
    _add_page(app, settings)
    _add_runs(app, settings, catalog)
    _add_jobs(app, settings, jobs, executor)
    _describe_problem(app)
    return Guard(app, settings)


class _Held:
    """The part of the memory for slices that one answer has."""

    def __init__(self, flight: Budget) -> None:
        self._flight = flight
        self._n_bytes = 0

    def take(self, n_bytes: int) -> None:
        """Take what making a slice needs: its values, their copy in the order of the format, and the answer."""
        self._flight.take(3 * n_bytes)
        self._n_bytes = 3 * n_bytes

    def keep(self, n_bytes: int) -> None:
        """Keep the bytes of the answer alone, or nothing once it was sent."""
        rest = min(n_bytes, self._n_bytes)
        self._flight.give_back(self._n_bytes - rest)
        self._n_bytes = rest


class _HeldResponse(Response):
    """An answer that is in memory until it was sent; `done` is called then."""

    def __init__(self, *args: Any, done: Callable[[], None], **named: Any) -> None:
        super().__init__(*args, **named)
        self._done = done

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._done()


def _add_runs(app: FastAPI, settings: Settings, catalog: Catalog) -> None:
    flight = Budget(settings.limits.flight_bytes, "other slices wait for their readers.")

    @app.get("/runs")
    def list_runs() -> dict[str, Any]:
        """List the runs under the root, with progress and what is known of damage."""
        return {"runs": catalog.summaries()}

    @app.get("/runs/{name:path}/about")
    def describe_run(name: Name) -> dict[str, Any]:
        """Describe a run: arrays, coordinates, provenance, results."""
        return catalog.describe(name)

    @app.get(
        "/runs/{name:path}/arrays/{site}",
        response_class=Response,
        responses={
            200: {"content": {"application/x-npy": {}, "application/vnd.apache.arrow.stream": {}}}
        },
    )
    def read_array(
        request: Request,
        name: Name,
        site: Annotated[str, fastapi.Path(max_length=200)],
        sequence: Selected = None,
        layer: Selected = None,
        depth: Selected = None,
        head: Selected = None,
        position: Selected = None,
        selected_position: Selected = None,
        query: Selected = None,
        key: Selected = None,
        rank: Selected = None,
        d_model: Selected = None,
        d_head: Selected = None,
        d_mlp: Selected = None,
        format: Literal["npy", "arrow"] = "npy",
        partial: bool = False,
    ) -> Response:
        """Return a named slice of an array as npy or as an Arrow stream.

        Layers, depths and heads are the model's numbers. The header x-headwater-dims names the dimensions that are
        left. A slice with sequences that are not computed yet is refused unless `partial` is true.
        """
        known = {*slices.DIMS, "format", "partial"}
        for parameter in request.query_params:
            if parameter not in known:
                raise ValueError(
                    f"{shown(parameter)} is no parameter; expected {', '.join((*slices.DIMS, 'format'))}."
                )
        wanted = {d: v for d in slices.DIMS if (v := request.query_params.get(d)) is not None}
        run = catalog.open(name)
        held = _Held(flight)
        try:
            part = slices.read_slice(run, site, wanted, partial, settings.limits, held.take)
            if format == "npy":
                data = slices.to_npy(part.values)
                kind = "application/x-npy"
            else:
                data = slices.to_arrow(part)
                kind = "application/vnd.apache.arrow.stream"
        except BaseException:
            held.keep(0)
            raise
        held.keep(len(data))
        ends = {
            d: [int(c[0]), int(c[-1])] for d, c in part.coordinates.items() if c.dtype.kind in "iu"
        }
        return _HeldResponse(
            data,
            media_type=kind,
            headers={
                "x-headwater-dims": ",".join(part.dims),
                "x-headwater-range": json.dumps(ends),
                "x-headwater-incomplete": str(part.incomplete),
            },
            done=lambda: held.keep(0),
        )

    @app.get(
        "/runs/{name:path}/thumbnails",
        response_class=Response,
        responses={200: {"content": {"application/x-npy": {}}}},
    )
    def read_thumbnails(name: Name, sequence: Place, layer: Place) -> Response:
        """Return small pictures of a layer's patterns as npy [head, row, column]."""
        small = figures.thumbnails(catalog.open(name), sequence, layer)
        return Response(slices.to_npy(small), media_type="application/x-npy")

    @app.get("/runs/{name:path}/figures/{kind}")
    def read_figure(
        request: Request,
        name: Name,
        kind: Literal["tokens", "sinks", "norm", "massive", "cosine", "token"],
        sequence: Place,
        position: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
    ) -> JSONResponse:
        """Return the numbers of a figure of one sequence, and the Python that makes them."""
        figure = figures.make_figure(catalog.open(name), kind, sequence, position)
        return JSONResponse(figure.to_json(name, f"{request.base_url}runs/{name}"))

    @app.get("/runs/{name:path}/results/{analysis}")
    def read_analysis(
        name: Name, analysis: Annotated[str, fastapi.Path(max_length=200)]
    ) -> JSONResponse:
        """Return a saved result: attributes, and variables that are not too large."""
        return JSONResponse(read_result(catalog.open(name), catalog.analyses(name), analysis))

    @app.head("/runs/{key:path}", include_in_schema=False)
    @app.get("/runs/{key:path}", response_class=FileResponse)
    def read_file(request: Request, key: Annotated[str, fastapi.Path(max_length=2000)]) -> Response:
        """Return a file of a run as Zarr readers ask for it, whole or in ranges."""
        return file_response(zarr_file(settings.root, key), request)


def _add_jobs(app: FastAPI, settings: Settings, jobs: JobQueue, executor: Executor) -> None:
    uploads = Budget(settings.limits.uploads, "too many texts are being sent.")
    waiting = CapacityLimiter(PLANS)  # apart from the threads that read, since planning takes long

    def read(submission: Submission) -> dict[str, Any]:
        document = read_document(submission.document)
        n_bytes = len(json.dumps(document))
        if n_bytes > settings.limits.document_bytes:
            raise slices.TooLargeError(
                f"the document of this job has {n_bytes:,} bytes; at most "
                f"{settings.limits.document_bytes:,} are kept. Name folders of texts, not every file."
            )
        return document

    async def price_of(kind: str, document: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return await run_sync(executor.plan, kind, document, limiter=waiting)

    @app.post("/plan")
    async def plan_job(submission: Submission) -> dict[str, Any]:
        """Say what a job would cost; nothing is queued."""
        run, price = await price_of(submission.kind, await run_sync(read, submission))
        return {"kind": submission.kind, "run": run, "price": price}

    @app.post(
        "/jobs",
        status_code=201,
        responses={200: {"description": "the same job waits or runs already"}},
    )
    async def submit_job(submission: Submission, response: Response) -> dict[str, Any]:
        """Plan a job, and queue it; the same one that waits or runs already is returned instead of a second."""
        document = await run_sync(read, submission)
        run, price = await price_of(submission.kind, document)
        job, new = await run_sync(executor.submit, submission.kind, document, run, price)
        response.status_code = 201 if new else 200
        return job.to_json()

    @app.get("/jobs")
    def list_jobs(
        state: Literal["queued", "running", "done", "failed", "cancelled"] | None = None,
        before: Annotated[int | None, Query(ge=1, le=2**62)] = None,
        most: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> dict[str, Any]:
        """List jobs, the newest first."""
        states = () if state is None else (state,)
        return {
            "jobs": [job.to_json() for job in jobs.newest(states, before, most)],
            "clock": jobs.clock,
        }

    @app.get("/jobs/{number}")
    def read_job(number: Annotated[int, fastapi.Path(ge=1, le=2**62)]) -> dict[str, Any]:
        """Return a job."""
        return jobs.get(number).to_json()

    @app.post("/jobs/{number}/cancel")
    def cancel_job(number: Annotated[int, fastapi.Path(ge=1, le=2**62)]) -> dict[str, Any]:
        """End a job; the run that it was making can be resumed by submitting the same job again."""
        return executor.cancel(number).to_json()

    @app.put(
        "/texts/{name}",
        status_code=201,
        openapi_extra={
            "requestBody": {
                "content": {
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
                },
                "required": True,
            }
        },
    )
    async def upload_text(
        name: Annotated[str, fastapi.Path(max_length=101)], request: Request
    ) -> dict[str, Any]:
        """Keep a text for jobs, as texts/NAME; a file of that name must not be there."""
        with uploads.hold(1):
            upload = await asyncio.to_thread(Upload, settings.local, name)
            try:
                async for piece in request.stream():
                    await asyncio.to_thread(upload.write, piece)
                return {"text": await asyncio.to_thread(upload.keep), "n_bytes": upload.n_bytes}
            finally:
                upload.close()

    @app.get(
        "/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def follow_jobs(
        request: Request, since: Annotated[int | None, Query(ge=0, le=2**62)] = None
    ) -> StreamingResponse:
        """Follow the jobs: one server-sent event for each change, with the job as its data."""
        last = request.headers.get("last-event-id", "")
        start = (
            int(last)
            if last.isdecimal() and len(last) < 19
            else jobs.clock
            if since is None
            else since
        )
        return StreamingResponse(
            _events(request, jobs, start),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )


async def _events(request: Request, jobs: JobQueue, since: int) -> AsyncIterator[str]:
    """Yield changes as they come, and a comment now and then so that both sides notice a lost connection."""
    quiet = BEAT_SECONDS
    yield "retry: 1000\n\n"
    while not await request.is_disconnected():
        if jobs.clock > since:
            since, changed = await asyncio.to_thread(jobs.changed, since)
            for job in changed:
                yield f"id: {since}\nevent: job\ndata: {json.dumps(job.to_json())}\n\n"
            quiet = BEAT_SECONDS
        elif (quiet := quiet - EVENT_SECONDS) <= 0:
            quiet = BEAT_SECONDS
            yield ": still here\n\n"
        await asyncio.sleep(EVENT_SECONDS)


def _add_page(app: FastAPI, settings: Settings) -> None:
    def page(name: str) -> HTMLResponse:
        return HTMLResponse((PAGE / name).read_text("utf-8"), headers={"cache-control": "no-cache"})

    @app.get("/", include_in_schema=False)
    def read_page() -> HTMLResponse:
        return page("index.html")

    @app.get("/docs", include_in_schema=False)
    def read_docs() -> HTMLResponse:
        return page("docs.html")

    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

    @app.get("/page/{name}", include_in_schema=False)
    def read_asset(name: str) -> Response:
        path = PAGE / name
        if Path(name).name != name or Path(name).suffix not in kinds or not path.is_file():
            raise NotHereError("there is no such file here.")
        return Response(
            path.read_bytes(),
            media_type=kinds[Path(name).suffix],
            headers={"cache-control": "no-cache"},
        )

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Say that the server is there, and whether it wants a token."""
        return {"headwater": headwater.__version__, "token": settings.token is not None}

    @app.post("/login")
    def login(given: Login) -> Response:
        """Exchange the token for a cookie, for the page."""
        if settings.token is None or not same(given.token, settings.token):
            return JSONResponse({"detail": "that is not this server's token."}, 403)
        response = JSONResponse({"detail": "welcome"})
        response.set_cookie(
            COOKIE,
            cookie_value(settings.token),
            httponly=True,
            samesite="strict",
            max_age=30 * 86400,
        )
        return response


def _add_errors(app: FastAPI, settings: Settings) -> None:
    def answer(status: int, text: str) -> JSONResponse:
        return JSONResponse({"detail": public(text, settings.root)}, status)

    statuses = {slices.TooLargeError: 413, slices.IncompleteError: 409, NotHereError: 404}

    async def known(_: Request, error: Exception) -> Response:
        status = next((code for kind, code in statuses.items() if isinstance(error, kind)), 400)
        return answer(status, str(error))

    async def unreadable(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}.")

    async def damaged(_: Request, error: Exception) -> Response:
        return answer(500, f"the run is damaged: {error}")

    async def busy(_: Request, error: Exception) -> Response:
        found = answer(503, str(error))
        found.headers["retry-after"] = "1"
        return found

    async def wrong_method(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = {"detail": f"{request.method} is not for this path."}
        matching = [r for r in app.routes if r.matches(request.scope)[0] != Match.NONE]
        methods = {name for route in matching for name in getattr(route, "methods", None) or ()}
        return JSONResponse(detail, 405, {"allow": ", ".join(sorted(methods))})

    async def no_queue(_: Request, error: Exception) -> Response:
        return answer(503, f"the queue of jobs cannot be used ({error}). The disk may be full.")

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # the client closed the connection; nobody reads this

    app.add_exception_handler(BusyError, busy)
    app.add_exception_handler(StoreError, busy)
    app.add_exception_handler(405, wrong_method)
    app.add_exception_handler(sqlite3.Error, no_queue)
    app.add_exception_handler(ClientDisconnect, gone)
    for kind in (ValueError, NotHereError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(LedgerError, damaged)
    app.add_exception_handler(RunDamaged, damaged)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "the server failed at this request; its log says why."}, 500)


def _describe_problem(app: FastAPI) -> None:
    """Put the form of errors into the OpenAPI document."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = make().setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = Problem.model_json_schema()
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
