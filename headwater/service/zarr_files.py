"""The files of a run that Zarr readers ask for, and nothing else that lies beside them."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from headwater.service.places import NotHereError, inside
from headwater.store.manifest import manifest_path

KEY = re.compile(r"((?P<array>[\w.-]+)/)?(zarr\.json|c(/\d{1,12})*)|tokenizer\.json|documents\.parquet")
FIXED = ("tokenizer.json", "documents.parquet")


def zarr_file(root: Path, key: str) -> Path:
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
            if not KEY.fullmatch(rest):
                break
            path = folder / rest
            try:
                real, kind = path.resolve(), path.stat().st_mode
            except OSError:
                break
            if real.is_relative_to(root) and stat.S_ISREG(kind):
                return real
            break
    raise NotHereError("there is no such file here.")


def _is_run(root: Path, name: str, folder: Path) -> bool:
    if name.endswith(".analysis"):
        folder = inside(root, name.removesuffix(".analysis"))
    return manifest_path(folder).is_file()
