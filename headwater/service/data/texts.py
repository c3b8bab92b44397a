"""Texts that are sent to the server, kept under its root for jobs."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from headwater.service.places import NotHereError, shown

TEXT_NAME = re.compile(r"\w[\w.-]{0,100}")
TEMPORARY = re.compile(rf"\.{TEXT_NAME.pattern}\.[0-9a-f]{{16}}")
TAKEN = "{} is there already; choose another name, or use that text."


class Upload:
    """A text that comes in pieces: texts/NAME in a folder, there whole or not at all.

    Raises ValueError for a name that is not plain, or taken.
    """

    def __init__(self, home: Path, name: str) -> None:
        if not TEXT_NAME.fullmatch(name):
            raise ValueError(
                f"the name {shown(name)} is not taken; use letters, digits, and . _ - after the first."
            )
        folder = home / "texts"
        folder.mkdir(exist_ok=True)
        # A link would let a client write wherever it leads.
        if folder.is_symlink():
            raise NotHereError("texts is a link; it must be a directory.")
        self.name = f"texts/{name}"
        self.n_bytes = 0
        self._final = folder / name
        if self._final.exists():
            raise ValueError(TAKEN.format(self.name))
        # Hidden names are no texts (places.read_path), so a job cannot read half of one.
        self._temporary = folder / f".{name}.{secrets.token_hex(8)}"
        self._file = self._temporary.open("xb")

    def write(self, piece: bytes) -> None:
        """Add a piece."""
        self._file.write(piece)
        self.n_bytes += len(piece)

    def keep(self) -> str:
        """Give the text its name; return it."""
        if not self.n_bytes:
            raise ValueError(f"{self.name} is empty; send the text as the body of the request.")
        self._file.close()
        # A link fails where the name is taken; a rename would replace what another upload put there meanwhile.
        try:
            os.link(self._temporary, self._final)
        except FileExistsError:
            raise ValueError(TAKEN.format(self.name)) from None
        return self.name

    def close(self) -> None:
        """Remove what only the upload needed."""
        with suppress(OSError):  # of a full disk; the file is removed
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def clear_uploads(home: Path) -> None:
    """Remove what uploads of a server that was killed left; a folder has one server."""
    for path in (home / "texts").glob(".*"):
        if TEMPORARY.fullmatch(path.name) and not path.is_symlink() and path.is_file():
            path.unlink(missing_ok=True)
