"""Names from outside to places inside: nothing that a request names lies elsewhere, whatever links there are."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from headwater.service.settings import Settings

PART = re.compile(r"[^\x00-\x1f\x7f/\\]{1,200}")
DEPTH = 12
PATHS = re.compile(r"(?<![\w./:])/(?:[^\s:'\",()`]+/)+")


class NotHereError(LookupError):
    """Something that a request names does not exist, or not inside the root."""


class DeniedError(ValueError):
    """A path that a job may not read or write."""


def inside(root: Path, name: str) -> Path:
    """Return a place under `root`; raise NotHereError for a name that leads out of it, hidden ones included."""
    parts = name.split("/")
    if len(parts) > DEPTH or not all(PART.fullmatch(p) and not p.startswith(".") for p in parts):
        raise NotHereError(f"there is no {shown(name)} here.")
    path = root.joinpath(*parts)
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise NotHereError(f"there is no {shown(name)} here.") from error
    if not real.is_relative_to(root):
        raise NotHereError(f"there is no {shown(name)} here.")
    return path


def out_path(settings: Settings, name: object) -> str:
    """Return the directory of a run that a job may write, from its name under the root."""
    if not isinstance(name, str) or not name.strip():
        raise DeniedError("out is missing; name the run, such as 'my-run'.")
    try:
        path = inside(settings.root, _relative(settings.root, name))
    except NotHereError:
        raise DeniedError(f"out {shown(name)} is no name under the server's root; use one such as 'my-run'.") from None
    if path == settings.root or path.name.endswith(".analysis") or path.is_relative_to(settings.root / "texts"):
        raise DeniedError(f"out {shown(name)} is taken; name another run.")
    return str(path)


def read_path(settings: Settings, name: object, what: str, folders: tuple[Path, ...]) -> str:
    """Return a file or directory that a job may read: under the root, or in one of `folders`."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DeniedError(f"{what} {shown(name)} is no path.")
    for root in (settings.root, *folders):
        path = root / name
        if path.resolve().is_relative_to(root) and path.exists() and not _hidden(path, root):
            return str(path)
    raise DeniedError(
        f"{what} {shown(name)} is not under the server's root or in a folder that it may read; upload texts with PUT "
        f"/texts/NAME, or start the server with --{'models' if what == 'model' else 'texts'} FOLDER."
    )


def public(text: str, root: Path) -> str:
    """Take the server's own paths out of a message."""
    return PATHS.sub("…/", text.replace(f"{root}/", "").replace(str(root), "ROOT"))


def shown(value: object) -> str:
    """Return a value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _relative(root: Path, name: str) -> str:
    path = PurePosixPath(name)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else name.rstrip("/")


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts) or ".." in path.parts
