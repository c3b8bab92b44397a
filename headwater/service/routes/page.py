"""The page, its assets, the login, and whether the server is there."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse

import headwater
from headwater.service.guard import COOKIE, cookie_value, same
from headwater.service.places import NotHereError
from headwater.service.schemas import Login
from headwater.service.settings import Settings

PAGE = files("headwater.service") / "page"
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def add_page(app: FastAPI, settings: Settings) -> None:
    def page(name: str) -> HTMLResponse:
        # Read each time, and asked for each time by browsers, so that a new version is seen at once.
        return HTMLResponse((PAGE / name).read_text("utf-8"), headers={"cache-control": "no-cache"})

    @app.get("/", include_in_schema=False)
    def read_page() -> HTMLResponse:
        return page("index.html")

    @app.get("/docs", include_in_schema=False)
    def read_docs() -> HTMLResponse:
        return page("docs.html")

    @app.get("/page/{name}", include_in_schema=False)
    def read_asset(name: str) -> Response:
        # Assets lie in one folder, so a name with a folder in it is none of them.
        path = PAGE / name
        if Path(name).name != name or Path(name).suffix not in KINDS or not path.is_file():
            raise NotHereError("there is no such file here.")
        return Response(
            path.read_bytes(),
            media_type=KINDS[Path(name).suffix],
            headers={"cache-control": "no-cache"},
        )

    @app.get("/health")
    def health() -> dict[str, object]:
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
