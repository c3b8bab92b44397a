"""Numbers written for people."""

from __future__ import annotations

# With three digits, what is more would round to 1000 of its unit.
LARGEST = 999.5


def show_bytes(n: float) -> str:
    """Write a number of bytes: 512 B, 1.5 GB."""
    if abs(n) < LARGEST:
        return f"{n:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        n /= 1000
        if abs(n) < LARGEST:
            return f"{n:.3g} {unit}"
    n /= 1000
    digits = ",.3g" if n < 1000 else ",.0f"
    return f"{n:{digits}} PB"


def count(n: int, noun: str) -> str:
    """Write a number with its noun: 1 block, 2 blocks."""
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {noun}s"
