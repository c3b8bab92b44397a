"""Bar charts as SVG text: the same bytes from the same figures, readable in a light or a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH = 760
LABEL = 150
BAR = 16
GAP = 5
COLOURS = ("#2b6cb0", "#90b8de")
OURS = ("#c05621", "#e8b48f")


def bars(
    title: str,
    series: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    mark: float,
) -> str:
    """Draw groups of horizontal bars, one group a row and one bar a series, with a line at `mark`."""
    top = (
        max([mark, *(value for _, values in rows for value in values if value is not None)]) * 1.08
    )
    scale = (WIDTH - LABEL - 60) / top
    y = 34
    parts = [f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>']
    for name, values in rows:
        height = len(values) * BAR
        parts.append(
            f'<text x="{LABEL - 8}" y="{y + height / 2 + 4:.0f}" text-anchor="end">{escape(name)}</text>'
        )
        for i, value in enumerate(values):
            at = y + i * BAR
            if value is None:
                parts.append(f'<text x="{LABEL + 4}" y="{at + 12}" fill="#888">not measured</text>')
                continue
            colour = (OURS if name == "headwater" else COLOURS)[i % 2]
            parts.append(
                f'<rect x="{LABEL}" y="{at}" width="{value * scale:.1f}" height="{BAR - 2}" fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{LABEL + value * scale + 5:.1f}" y="{at + 12}">{value:.2f}</text>'
            )
        y += height + GAP
    x = LABEL + mark * scale
    parts.append(
        f'<line x1="{x:.1f}" y1="28" x2="{x:.1f}" y2="{y}" stroke="#888" stroke-dasharray="4 3"/>'
    )
    if len(series) > 1:
        parts.append(
            f'<text x="{LABEL}" y="{y + 14}" fill="#888">{escape(" (dark); ".join(series))} (light)</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 24}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
