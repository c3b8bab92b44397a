"""The routes of jobs: plan, submit, list, cancel, send texts, and follow what changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import fastapi
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse

from headwater.service.connections import Budget
from headwater.service.data import slices
from headwater.service.data.texts import Upload
from headwater.service.documents import JsonObject
from headwater.service.jobs.requests import read_document
from headwater.service.jobs.scheduler import Executor
from headwater.service.jobs.table import JobQueue
from headwater.service.schemas import Submission
from headwater.service.settings import Settings

EVENT_SECONDS = 0.2
BEAT_SECONDS = 15.0
PLANS = 8


def add_jobs(app: FastAPI, settings: Settings, jobs: JobQueue, executor: Executor) -> None:
    uploads = Budget(settings.limits.uploads, "too many texts are being sent.")
    # Threads apart from those that read, since planning takes long.
    waiting = CapacityLimiter(PLANS)

    def read(submission: Submission) -> JsonObject:
        document = read_document(submission.document)
        n_bytes = len(json.dumps(document))
        if n_bytes > settings.limits.document_bytes:
            raise slices.TooLargeError(
                f"the document of this job has {n_bytes:,} bytes; at most "
                f"{settings.limits.document_bytes:,} are kept. Name folders of texts, not every file."
            )
        return document

    async def price_of(kind: str, document: JsonObject) -> tuple[str, JsonObject]:
        return await run_sync(executor.plan, kind, document, limiter=waiting)

    @app.post("/plan")
    async def plan_job(submission: Submission) -> JsonObject:
        """Say what a job would cost; nothing is queued."""
        run, price = await price_of(submission.kind, await run_sync(read, submission))
        return {"kind": submission.kind, "run": run, "price": price}

    @app.post(
        "/jobs",
        status_code=201,
        responses={200: {"description": "the same job waits or runs already"}},
    )
    async def submit_job(submission: Submission, response: Response) -> JsonObject:
        """Plan a job, and queue it; the same one that waits or runs already is returned instead of a second."""
        document = await run_sync(read, submission)
        run, price = await price_of(submission.kind, document)
        job, new = await run_sync(executor.submit, submission.kind, document, run, price)
        # 201 is the route's own status; a job that was there already is no new one.
        if not new:
            response.status_code = 200
        return job.to_json()

    @app.get("/jobs")
    def list_jobs(
        state: Literal["queued", "running", "done", "failed", "cancelled"] | None = None,
        before: Annotated[int | None, Query(ge=1, le=2**62)] = None,
        most: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> JsonObject:
        """List jobs, the newest first."""
        states: tuple[str, ...] = ()
        if state is not None:
            states = (state,)
        # The clock before the jobs: who follows from it may see a change twice, but misses none.
        clock = jobs.clock
        found = jobs.newest(states, before, most)
        return {"jobs": [job.to_json() for job in found], "clock": clock}

    @app.get("/jobs/{number}")
    def read_job(number: Annotated[int, fastapi.Path(ge=1, le=2**62)]) -> JsonObject:
        """Return a job."""
        return jobs.get(number).to_json()

    @app.post("/jobs/{number}/cancel")
    def cancel_job(number: Annotated[int, fastapi.Path(ge=1, le=2**62)]) -> JsonObject:
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
    ) -> JsonObject:
        """Keep a text for jobs, as texts/NAME; a file of that name must not be there."""
        # Each upload holds a file open until its client has sent everything.
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
        # A browser that lost the connection says by itself which event it saw last.
        last = request.headers.get("last-event-id", "")
        start = jobs.clock
        if last.isdecimal() and len(last) < 19:
            start = int(last)
        elif since is not None:
            start = since
        return StreamingResponse(
            _events(request, jobs, start),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )


async def _events(request: Request, jobs: JobQueue, since: int) -> AsyncIterator[str]:
    """Yield changes as they come, and a comment now and then so that both sides notice a lost connection."""
    quiet = BEAT_SECONDS
    # Browsers connect again by themselves, after a second.
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
