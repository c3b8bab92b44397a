"""Texts that are sent to the server, kept under its root for jobs."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from headwater.service.places import NotHereError, shown

TEXT_NAME = re.compile(r"\w[\w.-]{0,100}")


def keep_text(home: Path, name: str, data: bytes) -> str:
    """Write texts/NAME in a folder, whole or not at all; raise ValueError for a name that is not plain, or taken."""
    if not TEXT_NAME.fullmatch(name):
        raise ValueError(f"the name {shown(name)} is not taken; use letters, digits, and . _ - after the first.")
    folder = home / "texts"
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        raise NotHereError("texts is a link; it must be a directory.")
    temporary = folder / f".{name}.{secrets.token_hex(4)}"
    try:
        temporary.write_bytes(data)
        os.link(temporary, folder / name)
    except FileExistsError:
        raise ValueError(f"texts/{name} is there already; choose another name, or use that text.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return f"texts/{name}"
