"""Show the progress of an extraction: one line that is redrawn on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

from headwater.extractor.plan import show_bytes
from headwater.extractor.run import Progress

PLAIN_SECONDS = 10.0


class Reporter:
    """An observer of `extract` that writes to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._last, self._open, self._begun = 0.0, False, 0

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        final = progress.phase == "blocks" and progress.done == progress.n_blocks
        if not self._terminal and not final and now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        if progress.phase == "text":
            self._show(f"reading text: {progress.rows} sequences")
            return
        if progress.entry is None:
            self._begun = progress.done
            self._show(
                f"{progress.done} of {progress.n_blocks} blocks are done already"
                if progress.done
                else f"{progress.n_blocks} blocks"
            )
            return
        seconds = max(now - progress.started, 1e-9)
        left = seconds / max(progress.done - self._begun, 1) * (progress.n_blocks - progress.done)
        self._show(
            f"{_bar(progress.done / progress.n_blocks)} {progress.done}/{progress.n_blocks} blocks  "
            f"{progress.n_tokens / seconds:,.0f} tokens/s  {show_bytes(progress.n_bytes / seconds)}/s  "
            f"{_clock(seconds)} gone, {_clock(left)} left"
        )

    def close(self) -> None:
        """End the line."""
        if self._open:
            self._stream.write("\n")
            self._open = False

    def _show(self, text: str) -> None:
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text}")
            self._open = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def _bar(share: float, width: int = 20) -> str:
    full = int(share * width)
    return "█" * full + "░" * (width - full)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
