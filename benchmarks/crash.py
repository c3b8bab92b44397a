"""End an extraction at its disk operations, one after another; what is left must be right and resume to the same bytes.

`python -m headwater.benchmarks.crash` tries every operation; `--power` replays what a power loss would leave.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from headwater.benchmarks import faults, power
from headwater.extractor.config import RunConfig
from headwater.extractor.run import extract


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials and print what they found; return 1 if any went wrong."""
    parser = argparse.ArgumentParser(prog="python -m headwater.benchmarks.crash", description=__doc__.split("\n")[0])
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="try every N-th operation (default 1)")
    parser.add_argument("--preset", metavar="P", help="capture a preset (default: five sites of every kind)")
    parser.add_argument("--power", action="store_true", help="lose power instead of ending the process")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="trials at once (default 2)")
    parser.add_argument("--folder", metavar="DIR", help="where to work (default /dev/shm or the temporary directory)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
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
    return 1 if found["wrong"] else 0


def try_all(config: RunConfig, stride: int, jobs: int) -> Counter[str]:
    """End the process at every `stride`-th operation, before it and half-way through writes; count the outcomes."""
    reference = Path(config.out).with_name("reference")
    names = faults.count_operations(lambda: extract(replace(config, out=str(reference))))
    expected = faults.contents(reference)
    points = [(n, torn) for n in range(0, len(names) + stride, stride) for torn in (False, True)]
    points = [(n, torn) for n, torn in points if not torn or (n < len(names) and "write" in names[n])]

    def trial(point: tuple[int, bool]) -> str:
        n, torn = point
        run = reference.with_name(f"run-{n}-{torn}")
        code = faults.in_child(lambda: _ended(replace(config, out=str(run)), n, torn))
        deep = reference if n // stride % 8 == 0 else None
        after = faults.in_child(lambda: _checked(replace(config, out=str(run)), expected, deep))
        shutil.rmtree(run, ignore_errors=True)
        if code not in (0, faults.ENDED) or after:
            where = names[n] if n < len(names) else "the end"
            print(f"operation {n} ({where}{', torn' if torn else ''}): exit codes {code}, {after}", file=sys.stderr)
            return "wrong"
        return "ended and resumed" if code else "ran to the end"

    return Counter(faults.spread(points, trial, jobs)) | Counter({"operations": len(names)})


def _ended(config: RunConfig, n: int, torn: bool) -> None:
    with faults.hooked(faults.end_at(n, torn)):
        extract(config)


def _checked(config: RunConfig, expected: dict[str, bytes], deep: Path | None) -> None:
    """Check what the crash left (by zarr-python too, against the run `deep`), resume, and check the whole."""
    run = Path(config.out)
    faults.check_survivors(run, expected)
    if deep is not None:
        faults.check_with_zarr(run, deep)
    extract(config)
    faults.check_survivors(run, expected)
    assert faults.contents(run).keys() == expected.keys()


if __name__ == "__main__":
    sys.exit(main())
