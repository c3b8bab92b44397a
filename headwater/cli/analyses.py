"""The commands that analyse runs and weights and show what came out: analyze, weights, plot, report, compare."""

from __future__ import annotations

import hashlib
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.analysis_arguments import (
    add_analyze,
    add_compare,
    add_plot,
    add_report,
    add_weights,
    read_numbers,
    read_options,
    read_scan,
    split_names,
)
from headwater.cli.command import DONE, FAILED, Command
from headwater.cli.show import print_json

if TYPE_CHECKING:
    from headwater.analysis.suite.analyze import Outcome

LONGEST_NAME = 100


def _on_pool(command: Callable[[Namespace], int], options: Namespace) -> int:
    """Run a command that scans runs, on the cluster of --ray if one is named."""
    from headwater.analysis.engine.pools import open_pool

    if options.ray is None:
        return command(options)
    with open_pool(read_scan(options).workers, options.ray) as options.pool:
        return command(options)


def run_analyze(options: Namespace) -> int:
    """Analyse runs one after another; print what was found, where it is kept, and what was skipped and why."""
    from headwater.analysis.suite.analyze import analyze
    from headwater.analysis.suite.registry import summarise
    from headwater.cli.progress import ScanReporter
    from headwater.store.reader import open_run

    paths, names = split_names(options.names)
    runs = [open_run(path) for path in paths]
    given = read_options(options, names)
    found = []
    failed = False
    for run in runs:
        reporter = ScanReporter(sys.stderr, str(run.path))
        try:
            outcome = analyze(run, names, given, read_scan(options, reporter), options.again)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "What was read is kept: run the same command again to go on."
            ) from None
        finally:
            reporter.close()
        figures = {name: summarise(name, dataset) for name, dataset in outcome.results.items()}
        found.append(
            {
                "run": str(run.path),
                "results": {
                    name: {"path": str(outcome.paths[name]), "figures": values}
                    for name, values in figures.items()
                },
                "skipped": outcome.skipped,
            }
        )
        failed = failed or bool(outcome.failed)
        if not options.json:
            _print_outcome(str(run.path), outcome, figures)
    if options.json:
        print_json(found)
    return FAILED if failed else DONE


def _print_outcome(path: str, outcome: Outcome, figures: dict[str, dict[str, Any]]) -> None:
    print(path)
    for name, values in figures.items():
        print(f"  {name:15} {', '.join(f'{label} {value}' for label, value in values.items())}")
        how = " (kept from before)" if name in outcome.reused else ""
        if name in outcome.replaced:
            how = " (in place of a result of other settings, data or version)"
        print(f"  {'':15} {outcome.paths[name]}{how}")
    for name, why in outcome.skipped.items():
        print(f"  {name:15} {'failed' if name in outcome.failed else 'skipped'}: {why}")


def run_weights(options: Namespace) -> int:
    """Decompose the weights of models, and score them on a corpus; keep the results and print their figures."""
    from headwater.analysis.engine.results import save_at
    from headwater.analysis.suite.registry import summarise
    from headwater.analysis.weights.directions import weights

    run = _corpus_run(options.corpus)

    found = []
    for model in options.model:
        datasets = [weights(model, options.directions, options.tokens)]
        if options.corpus:
            datasets.append(_coherence(model, options, run))
        for dataset in datasets:
            name = dataset.attrs["analysis"]
            path = save_at(_weights_path(model, dataset, options.out, run), dataset)
            found.append({"model": model, "path": str(path), "figures": summarise(name, dataset)})
    if options.json:
        print_json(found)
        return DONE
    for one in found:
        print(
            f"{one['model']}: {', '.join(f'{label} {value}' for label, value in one['figures'].items())}"
        )
        print(f"  {one['path']}")
    return DONE


def _corpus_run(corpus: str | None) -> Any:
    """Open the run that --corpus names; None where it names a text, or nothing."""
    from headwater.store.manifest import RunError
    from headwater.store.reader import open_run

    try:
        return None if corpus is None else open_run(corpus)
    except RunError:
        return None


def _weights_path(model: str, dataset: Any, out: str | None, run: Any) -> Any:
    """Return where a result goes: --out, else beside the corpus where that is a run of the model, else here."""
    from headwater.analysis.engine.results import analysis_path

    name = dataset.attrs["analysis"]
    if (
        out is None
        and run is not None
        and run.manifest.model["digest"] == dataset.attrs["model_digest"]
    ):
        return analysis_path(run, name)
    return Path(out or ".") / f"{Path(model).name}.{name}"


def _coherence(model: str, options: Namespace, run: Any) -> Any:
    """Score a model's directions on --corpus, beside the sinks that are kept with it."""
    from headwater.analysis.engine.results import load
    from headwater.analysis.weights.coherence import Settings, coherence

    try:
        sinks = None if run is None else load(run, "sinks")
    except FileNotFoundError:
        sinks = None
    return coherence(model, options.corpus, sinks, Settings(options.directions, options.tokens))


def run_plot(options: Namespace) -> int:
    """Draw the figures of kept results into files; print their paths."""
    from headwater.analysis.plots.catalogue import draw, save_figures

    if options.list:
        return _list_plots(options)
    if not options.runs:
        raise ValueError("no run is named; expected `headwater plot RUN …`, or --list.")
    runs = kept(options.runs)
    folder = target(options, "plots")
    names = options.figures.split(",") if options.figures else ()
    paths = [str(path) for path in save_figures(draw(runs, names), folder, options.format)]
    if options.json:
        print_json(paths)
    else:
        print("\n".join(paths))
    return DONE


def _list_plots(options: Namespace) -> int:
    """Print the figures by name, with what they show and of which results."""
    from headwater.analysis.suite.registry import plots

    found = [
        {"figure": plot.name, "of": kind.name, "caption": plot.caption} for kind, plot in plots()
    ]
    if options.json:
        print_json(found)
        return DONE
    for one in found:
        print(f"{one['figure']:16} {one['of']:17} {one['caption']}")
    return DONE


def run_report(options: Namespace) -> int:
    """Analyse what is not analysed yet, and write one page about it; print its path."""
    from headwater.analysis.plots.report import report
    from headwater.analysis.suite.analyze import analyze
    from headwater.cli.progress import ScanReporter
    from headwater.store.reader import open_run

    target(options, "report.html")
    opened = [open_run(path) for path in options.runs]
    skipped: dict[str, dict[str, str]] = {}
    given = read_options(options)
    for run, label in zip(opened, labels(options.runs), strict=True):
        reporter = ScanReporter(sys.stderr, str(run.path))
        try:
            outcome = analyze(run, [], given, read_scan(options, reporter), options.again)
        finally:
            reporter.close()
        skipped[label] = outcome.skipped
    page = target(options, "report.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(report(kept(options.runs), skipped), "utf-8")
    if options.json:
        print_json({"report": str(page), "skipped": skipped})
    else:
        print(page)
    return DONE


def run_compare(options: Namespace) -> int:
    """Print the headline figures of runs side by side, in the order of their training steps where they have them."""
    from headwater.analysis.suite.compare import side_by_side

    if len(options.runs) < 2:
        raise ValueError(f"compare takes two runs or more; {options.runs[0]} is the only one.")
    steps = None if options.steps is None else read_numbers("--steps", options.steps)
    rows = side_by_side(kept(options.runs), steps)
    if options.json:
        print_json(rows)
        return DONE
    _print_side_by_side(rows, labels(options.runs))
    return DONE


def _print_side_by_side(rows: list[dict[str, Any]], names: list[str]) -> None:
    """Print numbers and words in a column for each run, and lists one below the other."""
    if rows:
        names = list(rows[0]["values"])
    width = max(12, *(len(name) + 2 for name in names))
    print(f"{'':48}" + "".join(f"{name:>{width}}" for name in names))
    for row in rows:
        what = f"{row['analysis'] or 'run'}: {row['figure'].replace('_', ' ')}"
        values = list(row["values"].values())
        if any(isinstance(value, list) or len(str(value)) >= width for value in values):
            print(what)
            for name, value in row["values"].items():
                print(f"  {name:{width}} {_plain(value)}")
        else:
            print(f"{what:48}" + "".join(f"{_plain(value):>{width}}" for value in values))


def _plain(value: Any) -> str:
    """Return a figure as a person writes it."""
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "none"
    return "–" if value is None else str(value)


def labels(paths: list[str]) -> list[str]:
    """Return short names that tell runs apart: their directories' names, with the parents' where those are equal."""
    found = [
        (path if "://" in path else str(Path(path).resolve())).rstrip("/").split("/")
        for path in paths
    ]
    for n in (1, 2, 3):
        names = ["/".join(parts[-n:]) for parts in found]
        if len(set(names)) == len(names):
            return names
    return ["/".join(parts) for parts in found]


def target(options: Namespace, name: str) -> Path:
    """Return where a figure or page goes: --out, or beside the first run where that is a directory.

    What is of several runs is named after them all, so that it takes no other's place.
    """
    from headwater.analysis.engine.results import analysis_path

    if len(options.runs) > 1:
        stem, dot, kind = name.partition(".")
        others = "+".join(label.replace("/", "_") for label in labels(options.runs)[1:])
        if len(others) > LONGEST_NAME:
            others = hashlib.sha256(others.encode()).hexdigest()[:16]
        name = f"{stem}-with-{others}{dot}{kind}"
    path = Path(options.out) if options.out else analysis_path(options.runs[0], name)
    if not isinstance(path, Path):
        raise ValueError(
            f"{options.runs[0]} lies in an object store; say with --out where to write {name} here."
        )
    return path


def kept(paths: list[str]) -> list[Any]:
    """Open the kept results of runs; raise ValueError for a run that has none."""
    from headwater.analysis.engine.results import kept_results
    from headwater.store.reader import open_run

    found = [
        kept_results(open_run(path), label)
        for path, label in zip(paths, labels(paths), strict=True)
    ]
    for path, run in zip(paths, found, strict=True):
        if not run.results:
            raise ValueError(
                f"{path} has no results yet. Make them with `headwater analyze {path}`."
            )
    return found


COMMANDS = (
    Command(
        "analyze",
        "analyse runs and keep the results beside them",
        add_analyze,
        partial(_on_pool, run_analyze),
    ),
    Command(
        "weights",
        "decompose the weights of models; no run is needed",
        add_weights,
        run_weights,
    ),
    Command("plot", "draw the results of runs", add_plot, run_plot),
    Command(
        "report",
        "analyse runs and write one page about them",
        add_report,
        partial(_on_pool, run_report),
    ),
    Command("compare", "show the results of several runs side by side", add_compare, run_compare),
)
