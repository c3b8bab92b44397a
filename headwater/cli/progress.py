"""Show progress: one line that is redrawn on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from headwater.extractor.units import count, show_bytes

if TYPE_CHECKING:
    from headwater.analysis.engine.scan import ScanProgress
    from headwater.extractor.progress import Progress

PLAIN_SECONDS = 10.0
REDRAW_SECONDS = 0.1


class Line:
    """A line on a stream. A stream that cannot be written any more is left alone."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._terminal = stream is not None and stream.isatty()
        self._last = 0.0
        self._open = False

    def show(self, text: str, always: bool = False, shorter: Sequence[str] = ()) -> None:
        """Show a text, if the last one is old enough or this one must be seen.

        A terminal that is too narrow for it gets the first of `shorter` texts that fits, and the last one cut.
        """
        now = time.perf_counter()
        wait = REDRAW_SECONDS if self._terminal else PLAIN_SECONDS
        if not always and now - self._last < wait:
            return
        self._last = now
        self._open = self._terminal
        if not self._terminal:
            self._write(f"{text}\n")
            return
        width = self._width()
        fitting = next((one for one in (text, *shorter) if len(one) <= width), [text, *shorter][-1])
        # Back to the start of the line, and erase to its end: the text before may have been longer.
        self._write(f"\r\x1b[K{fitting[:width]}")

    def close(self) -> None:
        """End the line."""
        if self._open:
            self._write("\n")
        self._open = False

    def _write(self, text: str) -> None:
        try:
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        except (OSError, ValueError):
            # A closed pipe or terminal must not end hours of work.
            self._stream = None

    def _width(self) -> int:
        columns = 0
        try:
            if self._stream is not None:
                columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            pass
        # The last column stays free: terminals wrap when it is written, and the line could not be redrawn.
        return (columns or 80) - 1


class Reporter:
    """An observer of `extract` that writes to a stream."""

    def __init__(self, stream: TextIO | None) -> None:
        self._line = Line(stream)
        self._begun = 0
        self._seen: Progress | None = None

    @property
    def computing(self) -> bool:
        """Whether the text is committed and blocks are under way."""
        return self._seen is not None and self._seen.phase == "blocks"

    def __call__(self, progress: Progress) -> None:
        first = self._seen is None or self._seen.phase != progress.phase
        self._seen = progress
        if progress.phase == "text":
            self._line.show(f"reading text: {count(progress.rows, 'sequence')}", first)
        elif progress.entry is None:
            self._begun = progress.done
            self._line.show(_beginning(progress) + _also(progress), not progress.workers)
        else:
            text, *shorter = self._rates(progress)
            self._line.show(text, progress.done == progress.n_blocks, shorter)

    def close(self) -> None:
        """End the line."""
        self._line.close()

    def _rates(self, progress: Progress) -> list[str]:
        """Say how far it is, longest first: what narrow terminals lose last is the time that is left."""
        seconds = max(time.perf_counter() - progress.started, 1e-9)
        # Blocks that were there before this process began took none of its time.
        left = seconds / max(progress.done - self._begun, 1) * (progress.n_blocks - progress.done)
        bar = f"{_bar(progress.done / progress.n_blocks)} "
        done = f"{progress.done:,}/{count(progress.n_blocks, 'block')}"
        tokens = f"  {progress.n_tokens / seconds:,.0f} tokens/s"
        rate = f"  {show_bytes(progress.n_bytes / seconds)}/s"
        time_left = f"  {_clock(seconds)} gone, {_clock(left)} left"
        return [
            f"{bar}{done}{tokens}{rate}{time_left}{_also(progress)}",
            f"{done}{tokens}{rate}{time_left}{_also(progress)}",
            f"{done}{tokens}{rate}{time_left}",
            f"{done}{tokens}{time_left}",
            f"{done}{time_left}",
            f"{_clock(left)} left  {done}",
        ]


class ScanReporter:
    """An observer of the scans of an analysis."""

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self._line = Line(stream)
        self._name = name
        self._begun = time.perf_counter()

    def __call__(self, progress: ScanProgress) -> None:
        seconds = time.perf_counter() - self._begun
        # Every pass reads all blocks, so passes count alike.
        passes_done = progress.at - 1 + progress.done / max(progress.n_blocks, 1)
        share = passes_done / max(progress.passes, 1)
        passes = ""
        if progress.passes > 1:
            passes = f" of pass {progress.at} of {progress.passes}"
        done = f"{progress.done:,}/{count(progress.n_blocks, 'block')}{passes}"
        gone = f"  {_clock(seconds)} gone"
        shorter = (f"{done}, {self._name}{gone}", f"{done}{gone}")
        self._line.show(f"{_bar(share)} {shorter[0]}", share == 1, shorter)

    def close(self) -> None:
        """End the line."""
        self._line.close()


class ByteReporter:
    """Count bytes from several threads."""

    def __init__(self, stream: TextIO | None, verb: str) -> None:
        self._line = Line(stream)
        self._verb = verb
        self._lock = threading.Lock()
        self._total = 0
        self._begun = time.perf_counter()

    def __call__(self, n_bytes: int) -> None:
        with self._lock:
            self._total += n_bytes
            seconds = max(time.perf_counter() - self._begun, 1e-9)
            # What takes a second or less needs no line, and its rate would be noise.
            if seconds > 1:
                self._line.show(
                    f"{self._verb} {show_bytes(self._total)}, {show_bytes(self._total / seconds)}/s"
                )

    def close(self) -> None:
        """End the line."""
        self._line.close()


def _beginning(progress: Progress) -> str:
    if progress.done == progress.n_blocks:
        return f"nothing to do: {count(progress.n_blocks, 'block')} done already"
    already = ""
    if progress.done:
        already = f", {progress.done:,} done already"
    return f"{count(progress.n_blocks, 'block')}{already}"


def _also(progress: Progress) -> str:
    if not progress.workers:
        return ""
    return f"  {progress.workers}"


def _bar(share: float, width: int = 20) -> str:
    full = int(share * width)
    return "█" * full + "░" * (width - full)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
