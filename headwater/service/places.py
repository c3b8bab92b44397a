"""Names from outside to places inside: nothing that a request names lies elsewhere, whatever links there are."""

from __future__ import annotations

import re
from pathlib import Path

from headwater.service.settings import Settings
from headwater.store.place import Place

PART = re.compile(r"[^\x00-\x1f\x7f/\\]{1,200}")
DEPTH = 12
# An absolute path in a message, but not the path of an address (s3://…, http://…).
PATHS = re.compile(r"(?<![\w./:])/(?:[^\s:'\",()`]+/)+")


class NotHereError(LookupError):
    """Something that a request names does not exist, or not inside the root."""


class DeniedError(ValueError):
    """A path that a job may not read or write."""


def inside(root: Place, name: str) -> Place:
    """Return a place under `root`; raise NotHereError for a name that leads out of it, hidden ones included."""
    parts = name.split("/")
    if len(parts) > DEPTH or not all(PART.fullmatch(p) and not p.startswith(".") for p in parts):
        raise NotHereError(f"there is no {shown(name)} here.")
    # Names without ".." can still lead out, through a link.
    path = root / name
    if not stays_in(root, path):
        raise NotHereError(f"there is no {shown(name)} here.")
    return path


def stays_in(root: Place, path: Place) -> bool:
    """Say whether a path lies under a root when all links are followed; an object store has none."""
    return root.contains(path)


def out_path(settings: Settings, name: object) -> str:
    """Return the directory of a run that a job may write, from its name under the root."""
    if not isinstance(name, str) or not name.strip():
        raise DeniedError("out is missing; name the run, such as 'my-run'.")
    try:
        path = inside(settings.root, name := name.removeprefix(f"{settings.root}/").rstrip("/"))
    except NotHereError:
        raise DeniedError(
            f"out {shown(name)} is no name under the server's root; use one such as 'my-run'."
        ) from None
    # Results lie in NAME.analysis beside a run, and texts in texts/.
    if name.endswith(".analysis") or name.partition("/")[0] == "texts":
        raise DeniedError(f"out {shown(name)} is taken; name another run.")
    return str(path)


def read_path(settings: Settings, name: object, what: str, folders: tuple[Path, ...]) -> str:
    """Return a file or directory that a job may read: under the root, or in one of `folders`."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DeniedError(f"{what} {shown(name)} is no path.")
    for root in (settings.local, *folders):
        path = root / name
        if path.resolve().is_relative_to(root) and path.exists() and not _hidden(path, root):
            return str(path)
    flag = "--models" if what == "model" else "--texts"
    raise DeniedError(
        f"{what} {shown(name)} is not under the server's root or in a folder that it may read; upload texts with PUT "
        f"/texts/NAME, or start the server with {flag} FOLDER."
    )


def public(text: str, root: Place) -> str:
    """Take the server's own paths out of a message."""
    return PATHS.sub("…/", text.replace(f"{root}/", "").replace(str(root), "ROOT"))


def shown(value: object) -> str:
    """Return a value for a message, cut to 80 characters."""
    text = repr(value)
    if len(text) <= 80:
        return text
    return text[:77] + "..."


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts) or ".." in path.parts
