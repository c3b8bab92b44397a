"""What this machine has to give."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory() -> int:
    """Return the bytes of memory that can be used without swapping, within the container's limit."""
    try:
        free = _table("/proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(
        free,
        _room("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        _room(
            "/sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    )


def _room(folder: str, limit: str, used: str, cached: str) -> int:
    """Return what a control group leaves; its cache of files is given back when memory is short."""
    try:
        most, now = (int(Path(folder, name).read_text()) for name in (limit, used))
        return max(most - now + _table(f"{folder}/memory.stat").get(cached, 0), 0)
    except (OSError, ValueError):
        return 1 << 62


def _table(path: str) -> dict[str, int]:
    """Read a file of lines that hold a name and a number."""
    return {
        name: int(value) for name, value, *_ in map(str.split, Path(path).read_text().splitlines())
    }
