"""`headwater.extract`: what the extractor does, with its progress shown."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from headwater.cli.progress import Reporter
from headwater.extractor import run as extractor

if TYPE_CHECKING:
    from headwater.extractor.progress import Observer
    from headwater.extractor.request import RunConfig
    from headwater.store.reader import Run


def extract(config: RunConfig, observe: Observer | None = None, *, progress: bool = True) -> Run:
    """Make a run, or go on with the one at `config.out`; return it for reading.

    Blocks that are committed are not computed again, so a finished run is left as it is. Progress goes to standard
    error: one line that is redrawn on a terminal, a plain line every ten seconds in notebooks and files;
    `progress=False` is silent. `observe`, where given, is called with every `Progress` instead. Raises RequestError or
    RunError for a request that cannot be met, and leaves the run resumable on every other error.
    """
    if observe is not None or not progress:
        return extractor.extract(config, observe)
    reporter = Reporter(sys.stderr)
    try:
        return extractor.extract(config, reporter)
    finally:
        reporter.close()
