"""Draw with matplotlib: the one module that imports it. Figures are plain objects, so that threads can make them.

It comes with the extra `plots`. Colours are those of Okabe & Ito (2008) and the maps viridis and RdBu,
which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
WIDTH = 7.2
HEIGHT = 2.9
LOCK = RLock()  # a drawing function may set the style again
FONTS = b"'DejaVu Sans', Verdana, sans-serif"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # TrueType; publishers refuse Type 3
    "svg.hashsalt": "headwater",
    "figure.dpi": 110,
}


def make_figure(
    rows: int = 1, columns: int = 1, width: float = WIDTH, height: float | None = None, **more: Any
) -> tuple[Any, Any]:
    """Make a figure and its axes [rows, columns]; sizes in inches. Call it within `style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height or HEIGHT * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


@contextmanager
def style() -> Iterator[None]:
    """Set the style of figures while they are drawn; one thread at a time, since matplotlib keeps it for all."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "plots need matplotlib, which is not installed. Run `pip install matplotlib`."
        ) from error
    with LOCK, matplotlib.rc_context(STYLE):
        yield


def finish(figure: Any) -> Any:
    """Write the numbers of logarithmic axes plainly, between the powers of ten too where there are few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for drawn in figure.axes:
        for axis, ends in (
            (drawn.xaxis, drawn.dataLim.intervalx),
            (drawn.yaxis, drawn.dataLim.intervaly),
        ):
            if axis.get_scale() != "log":
                continue
            if not 0 < max(ends) < np.inf:  # nothing that a logarithm can show
                getattr(drawn, f"set_{axis.axis_name}scale")("linear")
                continue
            low, high = axis.get_view_interval()
            decades = np.log10(max(high, 1e-300) / max(low, 1e-300))
            if decades < 4:
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
            close = decades < 2.2
            axis.set_minor_locator(LogLocator(subs=(2, 5) if close else range(2, 10)))
            axis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:,.12g}") if close else NullFormatter()
            )
            if decades < 0.5:
                axis.set_major_locator(MaxNLocator(5))
                axis.set_minor_locator(LogLocator(subs=()))
    return figure


def render(figure: Any, kind: str = "png", dpi: int = 150) -> bytes:
    """Return a figure as the bytes of a png, svg or pdf file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[
        kind
    ]
    with style():
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    drawn = buffer.getvalue()
    return drawn.replace(b"'DejaVu Sans'", FONTS) if kind == "svg" else drawn


def colour_of(index: int) -> str:
    """Return a colour for the n-th run, dimension or variant."""
    return COLOURS[index % len(COLOURS)]


def shade_of(fraction: float) -> Any:
    """Return a colour for a depth or layer by its fraction of the model."""
    import matplotlib

    return matplotlib.colormaps[SEQUENTIAL](0.05 + 0.85 * float(fraction))


def heat(
    figure: Any,
    axis: Any,
    values: Any,
    label: str,
    low: float | None = None,
    high: float | None = None,
    diverging: bool = False,
    bar: bool = True,
) -> Any:
    """Draw a matrix, row 0 at the top, with its colour bar; NaN is light grey. Cells are numbered by hand."""
    import matplotlib

    values = np.asarray(values, np.float64)
    colours = matplotlib.colormaps[DIVERGING if diverging else SEQUENTIAL].with_extremes(
        bad="#e8e8e8"
    )
    if diverging and low is None:
        high = float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0
        low = -high
    image = axis.imshow(
        values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    axis.grid(False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(True)
    if bar:
        figure.colorbar(image, ax=axis, label=label, shrink=0.95, pad=0.02).outline.set_linewidth(
            0.5
        )
    return image


def number_ticks(axis: Any, which: str, labels: Sequence[Any], most: int = 13) -> None:
    """Label the cells of a matrix along x or y, every n-th where there are many."""
    step = -(-len(labels) // most)
    at = np.arange(0, len(labels), step)
    getattr(axis, f"set_{which}ticks")(at, [str(labels[int(i)]) for i in at])


def mark_text(axis: Any, x: float, text: str) -> None:
    """Draw a vertical line with a word at its foot, on the left."""
    axis.axvline(x, color="#444444", lw=0.8, ls=(0, (4, 2)))
    axis.annotate(
        text,
        (x, 0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 4),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color="#444444",
    )


def legend(axis: Any, **more: Any) -> None:
    """Add a legend where anything is named."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**more)


def letter(axes: Any) -> None:
    """Put a, b, c … before the titles of a figure's axes."""
    for at, axis in enumerate(np.ravel(axes)):
        axis.set_title(f"{chr(ord('a') + at)}\u00a0\u00a0{axis.get_title(loc='left')}", loc="left")
