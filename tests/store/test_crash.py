"""Crashes, failing disks, lost power and kill -9 at any moment: nothing wrong is read, and resume gives equal bytes.

The trials live in benchmarks/breaking (crash.py, power.py and kill.py), which can try every operation; here a part
of them runs.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

FLAWED = """
import sys
from headwater.benchmarks.breaking import crash
from headwater.store import writer
finish = writer.BlockWriter.finish
def too_early(self):
    self._mark_complete()
    return finish(self)
if sys.argv[1] == "not synced":
    writer.sync_directory = lambda path: None
else:
    writer.BlockWriter.finish = too_early
sys.exit(crash.main(sys.argv[2:]))
"""


def trials(*arguments, start=("-m", "headwater.benchmarks.breaking.crash")):
    """Run the trials; return the exit code, how often each outcome was met, and the messages."""
    done = subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, timeout=600
    )
    counts = {what: int(n) for n, what in re.findall(r"(\d+) ([a-z][^,\n]+)", done.stdout)}
    return done.returncode, counts, done.stdout + done.stderr


def test_an_operation_that_ends_the_process_or_fails():
    code, counts, said = trials("--stride", "37")
    assert code == 0 and "wrong" not in counts, said
    assert counts["operations"] > 300 and counts["ended and resumed"] >= 10, said
    assert counts["failed and resumed"] >= 8 and counts["disk full and resumed"] >= 8, said


def test_a_power_loss():
    code, counts, said = trials("--power", "--stride", "150")
    assert code == 0 and "wrong" not in counts, said
    assert counts["events"] > 1000 and counts["lost and resumed"] >= 50, said


@pytest.mark.parametrize(
    ("flaw", "arguments"),
    [("not synced", ["--power", "--stride", "400"]), ("complete too early", ["--stride", "17"])],
)
def test_the_trials_would_find_a_flaw(flaw, arguments):
    code, counts, said = trials(flaw, *arguments, start=("-c", FLAWED))
    assert code == 1 and counts["wrong"], said


def test_kill_9(tmp_path):
    code, counts, said = trials(
        "--n",
        "4",
        "--lines",
        "40",
        "--folder",
        str(tmp_path),
        start=("-m", "headwater.benchmarks.breaking.kill"),
    )
    assert code == 0 and counts["killed"] == 4 and counts["wrong"] == 0, said
