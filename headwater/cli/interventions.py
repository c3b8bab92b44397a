"""The commands that intervene: plateau, patch, ablate."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.command import DONE, Command
from headwater.cli.intervention_arguments import add_ablate, add_patch, add_plateau
from headwater.cli.show import print_json

if TYPE_CHECKING:
    from headwater.analysis.interventions.requests import Intervention
    from headwater.store.place import Place


def run_plateau(options: Namespace) -> int:
    """Sweep plateaus; keep and print the results."""
    return _run("plateau", options)


def run_patch(options: Namespace) -> int:
    """Patch pairs; keep and print the results."""
    return _run("patch", options)


def run_ablate(options: Namespace) -> int:
    """Ablate by scale, measure effects or probe repeated tokens; keep and print the results."""
    return _run("ablate", options)


def _run(kind: str, options: Namespace) -> int:
    """Make the request of the flags that were given, and report what it finds."""
    from headwater.analysis.interventions.requests import REQUESTS, make_request

    given = {item.name: getattr(options, item.name, None) for item in fields(REQUESTS[kind])}
    request = make_request(kind, {name: v for name, v in given.items() if v is not None})
    found, _ = request.results()
    return _report(options, request, found)


def _report(options: Namespace, request: Intervention, found: Sequence[Any]) -> int:
    """Keep results, draw them where asked, and print their figures."""
    from headwater.analysis.interventions.figures import headline
    from headwater.store.place import place_of

    home = place_of(options.out or getattr(options, "run", None) or options.command.name)
    paths, aside = request.keep(home, found)
    figures = _draw(options, found, home) if options.plot else []
    lines = [headline(dataset) for dataset in found]
    if options.json:
        print_json(
            [
                {"analysis": d.attrs["analysis"], "path": str(path), "figures": figure}
                for d, path, figure in zip(found, paths, lines, strict=True)
            ]
        )
        return DONE
    for dataset, path, figure in zip(found, paths, lines, strict=True):
        print(f"{dataset.attrs['analysis']}")
        for label, value in figure.items():
            print(f"  {label:34} {value if isinstance(value, str) else _shown(value)}")
        print(f"  kept in {path}")
    for file in figures:
        print(f"drew {file}")
    for other in aside:
        print(f"earlier results of other settings are kept in {other}")
    return DONE


def _draw(options: Namespace, found: Sequence[Any], home: Place) -> list[Path]:
    from headwater.analysis.engine.results import RunResults
    from headwater.analysis.plots.catalogue import draw, save_figures

    results = RunResults(home.name, {dataset.attrs["analysis"]: dataset for dataset in found}, home)
    return save_figures(draw([results]), Path(options.plot))


def _shown(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(
        "-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values
    )


COMMANDS = (
    Command(
        "plateau",
        "move a state from one prompt's to another's, and see plateaus",
        add_plateau,
        run_plateau,
    ),
    Command(
        "patch",
        "patch clean activations into a corrupt prompt, place by place",
        add_patch,
        run_patch,
    ),
    Command(
        "ablate",
        "scale what is at a place, and see loss, sinks and gradients",
        add_ablate,
        run_ablate,
    ),
)
