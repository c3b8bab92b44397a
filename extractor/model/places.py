"""Where on this disk a process may load models from; without torch, so that a worker can say it when it starts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_folders: tuple[Path, ...] | None = None


def allow_only(folders: Iterable[Path]) -> None:
    """Let this process load models from these folders, the hub and the package alone, whoever names another."""
    global _folders
    _folders = tuple(folder.resolve() for folder in folders)


def is_allowed(path: Path) -> bool:
    """Say whether a model that lies at a path may be loaded."""
    return _folders is None or any(path.resolve().is_relative_to(folder) for folder in _folders)
