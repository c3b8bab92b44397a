"""The routes of runs: their list, slices of their arrays, figures, results, and their files for Zarr readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Literal

import fastapi
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from headwater.service.catalog import Catalog
from headwater.service.connections import Budget
from headwater.service.data import figures, slices
from headwater.service.data.results import read_result
from headwater.service.data.zarr_files import file_response, zarr_file
from headwater.service.documents import JsonObject
from headwater.service.guard import Receive, Scope, Send
from headwater.service.places import shown
from headwater.service.settings import Settings

Name = Annotated[
    str, fastapi.Path(max_length=1000, description="a run, by its path under the server's root")
]
Place = Annotated[int, Query(ge=0, le=2**31 - 1)]
Selected = Annotated[
    str | None, Query(pattern=slices.RANGE, description='a number, or a range such as "2:5"')
]


class _Held:
    """The part of the memory for slices that one answer has."""

    def __init__(self, flight: Budget) -> None:
        self._flight = flight
        self._n_bytes = 0

    def take(self, n_bytes: int) -> None:
        """Take what making a slice needs: its values, their copy in the order of the format, and the answer."""
        # All or nothing: where only a part were left, two answers could wait for each other.
        self._flight.take(3 * n_bytes)
        self._n_bytes = 3 * n_bytes

    def keep(self, n_bytes: int) -> None:
        """Keep the bytes of the answer alone, or nothing once it was sent."""
        rest = min(n_bytes, self._n_bytes)
        self._flight.give_back(self._n_bytes - rest)
        self._n_bytes = rest


class _HeldResponse(Response):
    """An answer that is in memory until it was sent; `done` is called then."""

    def __init__(
        self, data: bytes, media_type: str, headers: dict[str, str], done: Callable[[], None]
    ) -> None:
        super().__init__(data, media_type=media_type, headers=headers)
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


def add_runs(app: FastAPI, settings: Settings, catalog: Catalog) -> None:
    flight = Budget(settings.limits.flight_bytes, "other slices wait for their readers.")

    @app.get("/runs")
    def list_runs() -> JsonObject:
        """List the runs under the root, with progress and what is known of damage."""
        return {"runs": catalog.summaries()}

    @app.get("/runs/{name:path}/about")
    def describe_run(name: Name) -> JsonObject:
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
        # FastAPI drops parameters that it does not know: a misspelt dimension would answer with the whole array.
        known = {*slices.DIMS, "format", "partial"}
        for parameter in request.query_params:
            if parameter not in known:
                raise ValueError(
                    f"{shown(parameter)} is no parameter; expected {', '.join((*slices.DIMS, 'format'))}."
                )
        wanted = {}
        for dim in slices.DIMS:
            asked = request.query_params.get(dim)
            if asked is not None:
                wanted[dim] = asked
        run = catalog.open(name)
        # Many large slices at once would take the memory of jobs: each asks the budget before it reads.
        held = _Held(flight)
        try:
            part = slices.read_slice(run, site, wanted, partial, settings.limits, held.take)
            if format == "npy":
                data = slices.to_npy(part.values)
                kind = "application/x-npy"
            else:
                data = slices.to_arrow(part)
                kind = "application/vnd.apache.arrow.stream"
        # Whatever happens, a cancellation too, the budget gets its part back.
        except BaseException:
            held.keep(0)
            raise
        # The values are gone; the answer stays in memory until its reader has it.
        held.keep(len(data))
        ends = {}
        for dim, coordinate in part.coordinates.items():
            if coordinate.dtype.kind in "iu":
                ends[dim] = [int(coordinate[0]), int(coordinate[-1])]
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
