"""Break an extraction at its disk operations, one after another; what is left must be right and resume to equal bytes.

`python -m headwater.benchmarks.breaking.crash` ends the process before each operation and half-way through each write,
and lets each operation, and all writes from it on, fail. `--power` replays what a power loss would leave instead.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from headwater.benchmarks.breaking import faults, power
from headwater.extractor.request import RunConfig
from headwater.extractor.run import extract
from headwater.store.manifest import RunError

WAYS = ("ended", "torn", "failed", "disk full")
LIBRARY_HANDLES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials and print what they found; return 1 if any went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks.breaking.crash", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--stride", type=int, default=1, metavar="N", help="try every N-th operation (default 1)"
    )
    parser.add_argument(
        "--preset", metavar="P", help="capture a preset (default: five sites of every kind)"
    )
    parser.add_argument(
        "--power", action="store_true", help="lose power instead of ending the process"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="trials at once (default 2)"
    )
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="where to work (default /dev/shm or the temporary directory)",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.getpid = lambda: 7  # as in a container, where every attempt has the same number
    faults.small_shards()
    base = options.folder or ("/dev/shm" if Path("/dev/shm").is_dir() else None)
    with tempfile.TemporaryDirectory(dir=base) as folder:
        config = faults.make_case(Path(folder), options.preset)
        start = time.perf_counter()
        if options.power:
            found = power.try_all(config, options.stride, options.jobs)
        else:
            found = try_all(config, options.stride, options.jobs)
        seconds = time.perf_counter() - start
    print(", ".join(f"{n} {what}" for what, n in sorted(found.items())) + f", {seconds:.0f} s")
    if found["wrong"]:
        return 1
    return 0


def try_all(config: RunConfig, stride: int, jobs: int) -> Counter[str]:
    """Break every `stride`-th operation in each way that applies; count the outcomes."""
    reference = Path(config.out).with_name("reference")
    names = faults.count_operations(lambda: extract(replace(config, out=str(reference))))
    expected = faults.contents(reference)
    points = [
        (n, way)
        for n in range(0, len(names), stride)
        for way in WAYS
        if way != "torn" or "write" in names[n]
    ]

    def trial(point: tuple[int, str]) -> str:
        n, way = point
        again = replace(config, out=str(reference.with_name(f"run-{n}-{way}")))
        code = faults.in_child(lambda: _break(again, expected, n, way))
        if n // stride % 8 == 0:
            deep = reference
        else:
            deep = None
        after = faults.in_child(lambda: _check(again, expected, deep))
        shutil.rmtree(again.out, ignore_errors=True)
        if code not in (0, faults.ENDED) or after:
            print(f"operation {n} ({names[n]}), {way}: exit codes {code}, {after}", file=sys.stderr)
            return "wrong"
        if code:
            return f"{way} and resumed"
        return f"{way} did no harm"

    return Counter(faults.spread(points, trial, jobs)) | Counter({"operations": len(names)})


def _break(config: RunConfig, expected: dict[str, bytes], n: int, way: str) -> None:
    """Extract until the fault; after an error go on in the same process, which must not have lost a file handle."""
    if way in ("ended", "torn"):
        with faults.hooked(faults.end_at(n, way == "torn")):
            extract(config)
        return
    handles = len(os.listdir("/proc/self/fd"))
    number = errno.ENOSPC
    if way == "failed":
        number = errno.EIO
    try:
        with faults.hooked(faults.fail_at(n, number, way == "failed")):
            extract(config)
    except (OSError, RunError) as error:
        assert number in (getattr(error, "errno", None), getattr(error.__cause__, "errno", None)), (
            error
        )
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= handles + LIBRARY_HANDLES, os.listdir(
            "/proc/self/fd"
        )
        _check(config, expected, None)
        os._exit(faults.ENDED)


def _check(config: RunConfig, expected: dict[str, bytes], deep: Path | None) -> None:
    """Check what a fault left (by zarr-python too, against the run `deep`), resume, and check the whole."""
    run = Path(config.out)
    faults.check_survivors(run, expected)
    if deep is not None:
        faults.check_with_zarr(run, deep)
    extract(config)
    faults.check_survivors(run, expected)
    assert faults.contents(run).keys() == expected.keys()


if __name__ == "__main__":
    sys.exit(main())
