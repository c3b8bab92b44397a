"""The command line: call the command, and turn every error into one paragraph and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from headwater.cli.command import DONE, FAILED
from headwater.cli.parser import read_arguments
from headwater.extractor.idle import IDLE_THREADS
from headwater.store.versions import CORE, check_versions

REFUSED = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 done, 1 failed while running, 2 wrong request, 130 interrupted."""
    # Nothing is told to anybody but what a download needs.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    settle_threads()
    try:
        with _termination():
            if arguments is None:
                arguments = sys.argv[1:]
            code = _run(list(arguments))
            _flush()
            return code
    except KeyboardInterrupt as stop:
        _hush()
        return _say(f"interrupted. {stop}", INTERRUPTED)
    # RequestError and RunError are ValueErrors: something about the request is wrong, and nothing was touched.
    except ValueError as error:
        return _say(f"error: {error}", REFUSED)
    except Exception as error:
        if os.environ.get("HEADWATER_DEBUG"):
            traceback.print_exc()
        return _say(f"error: {explain(error)}", FAILED)


def settle_threads() -> None:
    """Make idle OpenMP threads sleep, so that writer threads get their cores, but spin .1 ms first; before torch loads.

    *Measured*: a sleep between any two operations makes attention on two threads take 53 ms where it takes 39 ms.
    """
    for name, value in IDLE_THREADS.items():
        os.environ.setdefault(name, value)


def explain(error: Exception) -> str:
    """Say what went wrong while a command ran, and what to do next."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return (
            f"the memory was not enough ({text or 'no details'}). Finished blocks are kept: end other programs and run "
            "the same command again, or start a new run with a smaller --block or fewer sites."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full, or a limit on it is reached ({text}). Every finished block is kept: free some space, "
            "then run the same command again to go on."
        )
    if isinstance(error, OSError):
        return f"{text}. Check that the path is there and may be read and written, then run the same command again."
    if isinstance(error, RuntimeError) and text:
        return text
    # Whatever comes here was not foreseen: say where, so that a report of it can be acted on.
    frames = traceback.extract_tb(error.__traceback__)
    where = ""
    if frames:
        where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"
    return (
        f"unexpected {type(error).__name__}{where}: {text}. This is a fault in Headwater; what was written before is "
        "kept. Run the command again with HEADWATER_DEBUG=1 set, and report what it prints."
    )


def _run(arguments: list[str]) -> int:
    try:
        options = read_arguments(arguments)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or DONE)
    check_versions(*CORE)
    # `headwater sites | head` ends when head has read enough, and that is no failure.
    with suppress(BrokenPipeError):
        return int(options.command.run(options))
    return DONE


@contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM interrupt like Ctrl-C."""
    # Only the main thread may set signals; a test or a notebook can call this from another.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hush() -> None:
    """Keep quiet about zarr's reads that an interruption cut short."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _flush() -> None:
    """Write what is left to standard output; where nobody reads it, drop it, so that the last flush does not fail."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more when it ends, and would print a second error then.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        if not isinstance(error, BrokenPipeError):
            raise OSError(
                error.errno, f"standard output cannot be written: {error.strerror}"
            ) from error


def _say(text: str, code: int) -> int:
    """Write one paragraph to standard error, which may be closed."""
    with suppress(OSError, ValueError):
        print(f"headwater: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
