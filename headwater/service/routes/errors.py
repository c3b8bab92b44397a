"""What a request is answered that cannot be met: one status and one paragraph for each kind of error."""

from __future__ import annotations

import sqlite3

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from headwater.service.connections import BusyError
from headwater.service.data.slices import IncompleteError, TooLargeError
from headwater.service.places import NotHereError, public
from headwater.service.settings import Settings
from headwater.store.entry import LedgerError
from headwater.store.manifest import RunDamaged
from headwater.store.objects import StoreError


def add_errors(app: FastAPI, settings: Settings) -> None:
    def answer(status: int, text: str) -> JSONResponse:
        return JSONResponse({"detail": public(text, settings.root)}, status)

    # Every other ValueError is a request that cannot be met.
    statuses = {TooLargeError: 413, IncompleteError: 409, NotHereError: 404}

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
        # HTTP wants the methods that the path does have.
        matching = [r for r in app.routes if r.matches(request.scope)[0] != Match.NONE]
        methods = {name for route in matching for name in getattr(route, "methods", None) or ()}
        return JSONResponse(detail, 405, {"allow": ", ".join(sorted(methods))})

    async def no_queue(_: Request, error: Exception) -> Response:
        return answer(503, f"the queue of jobs cannot be used ({error}). The disk may be full.")

    async def gone(_: Request, error: Exception) -> Response:
        # The client closed the connection; nobody reads this.
        return Response(status_code=499)

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
