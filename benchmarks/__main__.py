"""Run a benchmark: python -m headwater.benchmarks NAME [--help]; without a name, list them.

NAME … --base REF compares with another commit instead; `page` makes docs/performance.md from the results.
"""

from __future__ import annotations

import sys

from headwater.benchmarks import page
from headwater.benchmarks.lib import base
from headwater.benchmarks.registry import BENCHMARKS, TESTS, load
from headwater.cli.entry import settle_threads


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names with the others."""
    if arguments[:1] == ["page"]:
        return page.main(arguments[1:])
    if not arguments or arguments[0] not in BENCHMARKS:
        print("usage: python -m headwater.benchmarks NAME [--help] [--base REF]\n")
        for name, (_, text) in BENCHMARKS.items():
            print(f"  {name:10} {text}")
        print(f"  {'page':10} docs/performance.md from the newest results")
        if not arguments or arguments[0] in ("-h", "--help"):
            return 0
        return 2
    name = arguments[0]
    rest = arguments[1:]
    if "--base" not in rest:
        settle_threads()
        return int(load(name)(rest))
    at = rest.index("--base")
    if at + 1 == len(rest):
        print("--base needs a commit, such as --base main~5.", file=sys.stderr)
        return 2
    try:
        print(
            base.compare(
                name, [*rest[:at], *rest[at + 2 :]], rest[at + 1], TESTS.get(name, TESTS["extract"])
            )
        )
    except base.BaseError as error:
        print(f"headwater.benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
