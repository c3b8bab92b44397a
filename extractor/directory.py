"""The directory of a run: made when its request is accepted, taken back when its text is refused."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from headwater.store.files import make_directories, sync_directory
from headwater.store.manifest import RunError, manifest_path
from headwater.store.place import Place
from headwater.store.publish import clear_unpublished


def make_directory(run: Place) -> list[Path]:
    """Make the directory of a run; return the directories that were not there, the innermost first."""
    if run.local is None:
        return []
    missing = [path for path in (run.local, *run.local.parents) if not path.exists()]
    try:
        for parent in make_directories(run.local):
            sync_directory(parent)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise RunError(f"--out {run} cannot be made ({reason}). Name another directory.") from error
    if not os.access(run.local, os.W_OK | os.X_OK):
        raise RunError(
            f"--out {run} may not be written by you. Name another directory, or change its permissions."
        )
    return missing


def remove_directory(run: Place, made: list[Path]) -> None:
    """Take back what a refused request made; `made` are the directories that were not there before."""
    if run.remote is not None:
        clear_unpublished(run.remote)
    elif run.local is not None and not manifest_path(run).exists():
        shutil.rmtree(run.local / "headwater", ignore_errors=True)
        # Only what is empty goes: whatever somebody else put there meanwhile keeps its folder.
        for directory in made:
            with suppress(OSError):
                directory.rmdir()
