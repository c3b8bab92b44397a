"""The commands that analyse runs and weights: analyze, weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.analysis_arguments import add_analyze, add_weights, read_options, read_scan, split_names
from headwater.commands import DONE
from headwater.show import print_json

if TYPE_CHECKING:
    from headwater.analysis.suite import Outcome

NAMES = ("analyze", "weights")


def add_commands(group: Any, make: Any) -> None:
    """Add the commands to the parser."""
    add_analyze(make(group, "analyze", run_on_pool, "analyse runs and keep the results beside them"))
    add_weights(make(group, "weights", run_weights, "decompose the weights of models; no run is needed"))


def run_on_pool(options: Any) -> int:
    """Run `analyze`, on the cluster of --ray if one is named."""
    from headwater.analysis.pools import open_pool

    if options.ray is None:
        return run_analyze(options)
    with open_pool(read_scan(options).workers, options.ray) as options.pool:
        return run_analyze(options)


def run_analyze(options: Any) -> int:
    """Analyse runs one after another; print what was found, where it is kept, and what was skipped and why."""
    from headwater.analysis.summary import summarise
    from headwater.progress import ScanReporter
    from headwater.store.reader import open_run

    paths, names = split_names(options.names)
    runs, given = [open_run(path) for path in paths], read_options(options)
    found = []
    for run in runs:
        reporter = ScanReporter(sys.stderr, str(run.path))
        try:
            outcome = analyze_run(run, names, given, read_scan(options, reporter), options.again)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("What was read is kept: run the same command again to go on.") from None
        finally:
            reporter.close()
        figures = {name: summarise(name, dataset) for name, dataset in outcome.results.items()}
        found.append({"run": str(run.path), "results": {name: {"path": str(outcome.paths[name]), "figures": values}
                      for name, values in figures.items()}, "skipped": outcome.skipped})  # fmt: skip
        if not options.json:
            _print_outcome(str(run.path), outcome, figures)
    if options.json:
        print_json(found)
    return DONE


def analyze_run(run: Any, names: list[str], given: dict[str, Any], scan: Any, again: bool) -> Outcome:
    """Call `analyze`; a value that only the run can refuse names the flag."""
    from headwater.analysis.suite import analyze

    return analyze(run, names, given, scan, again)


def _print_outcome(path: str, outcome: Outcome, figures: dict[str, dict[str, Any]]) -> None:
    print(path)
    for name, values in figures.items():
        print(f"  {name:15} {', '.join(f'{label} {value}' for label, value in values.items())}")
        print(f"  {'':15} {outcome.paths[name]}{' (kept from before)' if name in outcome.reused else ''}")
    for name, why in outcome.skipped.items():
        print(f"  {name:15} skipped: {why}")


def run_weights(options: Any) -> int:
    """Decompose the weights of models; keep each result as a Zarr group and print its figures."""
    from headwater.analysis.results import save_at
    from headwater.analysis.summary import summarise
    from headwater.analysis.weights import weights

    found = []
    for model in options.model:
        dataset = weights(model, options.directions, options.tokens)
        path = save_at(Path(options.out or ".") / f"{Path(model).name}.weights", dataset)
        found.append({"model": model, "path": str(path), "figures": summarise("weights", dataset)})
    if options.json:
        print_json(found)
        return DONE
    for one in found:
        print(f"{one['model']}: {', '.join(f'{label} {value}' for label, value in one['figures'].items())}")
        print(f"  {one['path']}")
    return DONE
