"""Numbers written for people."""

from __future__ import annotations


def show_bytes(n: float) -> str:
    """Write a number of bytes: 512 B, 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 999.5:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} PB" if n < 1000 else f"{n:,.0f} PB"


def count(n: int, noun: str) -> str:
    """Write a number with its noun: 1 block, 2 blocks."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
