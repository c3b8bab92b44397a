"""Run a benchmark: python -m headwater.benchmarks NAME [--help]; without a name, list them."""

from __future__ import annotations

import sys

from headwater.benchmarks.registry import BENCHMARKS, load
from headwater.cli import settle_threads


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names with the others."""
    if not arguments or arguments[0] not in BENCHMARKS:
        print("usage: python -m headwater.benchmarks NAME [--help]\n")
        for name, (_, text) in BENCHMARKS.items():
            print(f"  {name:10} {text}")
        return 0 if not arguments or arguments[0] in ("-h", "--help") else 2
    settle_threads()
    return int(load(arguments[0])(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
