"""The files of a run that Zarr readers ask for, and nothing else that lies beside them; whole or in ranges."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import chain

from fastapi import Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from headwater.service.places import NotHereError, inside, stays_in
from headwater.store.manifest import manifest_path
from headwater.store.objects import StoreError
from headwater.store.place import Place

# Nothing else below a run is served: no internal file, no hidden one, and no name with "..".
KEY = re.compile(
    r"((?P<array>[\w.-]+)/)?(zarr\.json|c(/\d{1,12})*)|tokenizer\.json|documents\.parquet"
)
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
PIECE_BYTES = 4 << 20


class BigFileResponse(FileResponse):
    """A file that is read in larger pieces, of which one is in memory."""

    chunk_size = 256 << 10


def zarr_file(root: Place, key: str) -> Place:
    """Return the file that `RUN/KEY` or `RUN.analysis/NAME/KEY` names; raise NotHereError where there is none."""
    parts = key.split("/")
    for n in range(1, len(parts)):
        name = "/".join(parts[:n])
        folder = inside(root, name)
        if _is_run(root, name, folder):
            rest = "/".join(parts[n:])
            if name.endswith(".analysis"):
                analysis, _, rest = rest.partition("/")
                folder = inside(root, f"{name}/{analysis}")
            if KEY.fullmatch(rest) and _is_file(root, folder / rest):
                return (folder / rest).resolve()
            break
    raise NotHereError("there is no such file here.")


def file_response(path: Place, request: Request) -> Response:
    """Answer with a file, or with the range of it that the request asks for."""
    kind = "application/octet-stream"
    if path.name.endswith(".json"):
        kind = "application/json"
    # On this machine Starlette answers ranges itself; what follows does so for an object store.
    if path.local is not None:
        return BigFileResponse(path.local, media_type=kind, stat_result=path.local.stat())
    n_bytes, _, mark = path.state()
    tag = f'"{hashlib.sha256(mark.encode()).hexdigest()[:32]}"'
    # A range continues what a reader has, so where that was another state of the file it gets the whole.
    asked = ""
    if request.headers.get("if-range", tag) == tag:
        asked = request.headers.get("range", "")
    low, high, status = _span(asked, n_bytes)
    headers = {"accept-ranges": "bytes", "etag": tag, "content-length": str(high - low)}
    if status != 200:
        span = f"{low}-{high - 1}" if high > low else "*"
        headers["content-range"] = f"bytes {span}/{n_bytes}"
    if request.method == "HEAD" or high == low:
        return Response(None, status, headers, kind)
    pieces = _pieces(path, low, high)
    # Read before anything is answered, so that a store that fails is a status and not half a body.
    first = next(pieces)
    return StreamingResponse(chain([first], pieces), status, headers, kind)


def _span(asked: str, n_bytes: int) -> tuple[int, int, int]:
    """Return the bytes [low, high) that a Range header asks for, and a status; what it does not say is all of them."""
    match = RANGE.fullmatch(asked)
    if match is None or not (match[1] or match[2]):
        return 0, n_bytes, 200
    # "5-9" and "5-" count from the front, the end included; "-5" are the last five bytes.
    if match[1]:
        low = int(match[1])
        high = min(int(match[2] or n_bytes) + 1, n_bytes)
    else:
        low = max(n_bytes - int(match[2]), 0)
        high = n_bytes
    if low >= high:
        return 0, 0, 416
    return low, high, 206


def _pieces(path: Place, low: int, high: int) -> Iterator[bytes]:
    for at in range(low, high, PIECE_BYTES):
        yield path.read_range(at, min(PIECE_BYTES, high - at))


def _is_run(root: Place, name: str, folder: Place) -> bool:
    if name.endswith(".analysis"):
        folder = inside(root, name.removesuffix(".analysis"))
    return manifest_path(folder).is_file()


def _is_file(root: Place, path: Place) -> bool:
    try:
        return stays_in(root, path) and path.is_file()
    except StoreError:
        raise
    except OSError:
        return False
