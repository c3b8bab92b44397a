"""One object for each analysis: what it needs, takes and computes, and how its result is shown.

The command line, the report, the plots, jobs and `headwater.analysis` are all made of these classes, so that a new
analysis is one file. A throw-away one, complete:

    @dataclass(frozen=True)
    class Largest(Analysis):
        \"\"\"Find the largest |x| of the residual stream at every depth.\"\"\"

        name = "largest"
        title = "the largest |x| of the residual stream"
        needs = (("resid",),)
        section = "Massive activations"
        power: float = setting(1.0, NUMBER, "power that it is raised to", "P")

        def reducers(self, run):
            return [LargestReducer()]

        def result(self, run, states):
            return xarray.Dataset({"largest": ("depth", states[0] ** self.power)})

        @staticmethod
        def headline(result):
            return {"largest": rounded(result.largest)}
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from headwater.analysis.engine.reducer import Reducer
from headwater.analysis.engine.results import provenance
from headwater.analysis.engine.scan import ONE_BY_ONE, Prepared, Scan, Steps, analyse, as_run
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

    from headwater.analysis.engine.results import RunResults

# Headline figures by label: numbers, words, or short lists of numbers.
Figures = dict[str, Any]
Draw = Callable[[Sequence["RunResults"]], "Figure"]

STATE_BYTES = 256 << 20
DIGITS = 4
# The report's sections in their order, which is that of the computation too; one that is not named here comes last.
SECTIONS = (
    "The residual stream over depth",
    "Attention sinks and the transition",
    "Repeated tokens",
    "Massive activations",
    "The dimensions of the stream",
    "Heads compared",
    "What the depths predict",
    "What writes the output",
    "Where units are active",
    "The weights",
)


@dataclass(frozen=True)
class Plot:
    """A figure of a result.

    `draw` takes the runs' results and returns a matplotlib figure; it may be named as "module:function", so that
    nothing of it is imported before it is drawn. `together` says whether several runs share the figure; `variable` must
    be in the result.
    """

    name: str
    caption: str
    draw: str | Draw
    together: bool = True
    variable: str = ""

    @property
    def function(self) -> Draw:
        """The function that draws it."""
        if not isinstance(self.draw, str):
            return self.draw
        module, _, name = self.draw.partition(":")
        function: Draw = getattr(import_module(module), name)
        return function


class Shown:
    """A kind of result, and how it is shown: its section of the report, its figures, and its headline numbers."""

    name: ClassVar[str] = ""
    section: ClassVar[str] = ""
    plots: ClassVar[tuple[Plot, ...]] = ()

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the figures that are worth a line."""
        return {}

    @staticmethod
    def page(result: xarray.Dataset) -> str:
        """Return HTML that the report shows besides figures and numbers."""
        return ""


@dataclass(frozen=True)
class Analysis(Shown):
    """An analysis of a run with its settings, which are the fields.

    A field whose metadata are an `option` has a flag, a place in jobs and a parameter in Python; a field without them
    is for Python alone. `needs` are alternatives: the run must hold every site of one of them. `brings` are analyses
    that are run with it where they can be.
    """

    title: ClassVar[str] = ""
    needs: ClassVar[tuple[tuple[str, ...], ...]] = ((),)
    brings: ClassVar[tuple[str, ...]] = ()
    conventions: ClassVar[str] = ""

    @classmethod
    def parameters(cls) -> list[str]:
        """Return the names of what it takes."""
        return [item.name for item in fields(cls)]

    def alternatives(self) -> tuple[tuple[str, ...], ...]:
        """Return the sites that it needs with these settings, as `needs` does."""
        if "site" in self.parameters():
            return ((str(self.site),),)  # type: ignore[attr-defined]
        return self.needs

    def reducers(self, run: Run) -> Sequence[Reducer]:
        """Return what one pass over the run computes; analyses of several passes override `prepare`."""
        raise NotImplementedError(f"{type(self).__name__} has no reducers")

    def result(self, run: Run, states: Sequence[Any]) -> xarray.Dataset:
        """Make the result of what the reducers found."""
        raise NotImplementedError(f"{type(self).__name__} has no result")

    def prepare(self, run: Run, state_bytes: int = STATE_BYTES) -> Prepared:
        """Make it ready for the engine: one pass, unless overridden. Raise ValueError for settings that cannot be.

        One state of what it yields has at most `state_bytes`, where it can be split.
        """
        reducers = list(self.reducers(run))

        def steps() -> Steps:
            states = yield reducers
            found = self.result(run, states)
            about = provenance(run, self.name, prepared.arguments, 1, self.conventions)
            return found.assign_attrs(about | found.attrs)

        prepared = Prepared(self.name, 1, steps, asdict(self))
        return prepared

    def of(self, run: Run | str | Path, scan: Scan = ONE_BY_ONE) -> xarray.Dataset:
        """Analyse a run, and return the result; nothing is kept."""
        run = as_run(run)
        prepared = self.prepare(run, scan.state_bytes(run, STATE_BYTES))
        found: xarray.Dataset = analyse(run, [prepared], scan)[0]
        return found


@dataclass(frozen=True)
class ModelAnalysis(Analysis):
    """An analysis that runs the model, or reads its weights, instead of scanning the run.

    `after` is the analysis whose result it goes on from.
    """

    after: ClassVar[str] = ""

    def compute(self, run: Run, result: xarray.Dataset | None = None) -> xarray.Dataset:
        """Compute the result; `result` is that of `after`."""
        raise NotImplementedError(f"{type(self).__name__} computes nothing")


def as_function(kind: type[Analysis], name: str = "") -> Callable[..., xarray.Dataset]:
    """Return an analysis as a function of a run and of its settings, with their names, defaults and documentation."""
    given = [_parameter("run", inspect.Parameter.empty)]
    scans = not issubclass(kind, ModelAnalysis)
    if issubclass(kind, ModelAnalysis) and kind.after:
        given.append(_parameter("result", None))
    given += [_parameter(item.name, item.default) for item in fields(kind)]
    if scans:
        given.append(_parameter("scan", ONE_BY_ONE))
    signature = inspect.Signature(given)

    def function(*values: Any, **named: Any) -> xarray.Dataset:
        settings = signature.bind(*values, **named).arguments
        run = as_run(settings.pop("run"))
        result = settings.pop("result", None)
        scan = settings.pop("scan", ONE_BY_ONE)
        analysis = kind(**settings)
        if isinstance(analysis, ModelAnalysis):
            return analysis.compute(run, result)
        return analysis.of(run, scan)

    function.__name__ = function.__qualname__ = name or kind.name
    function.__doc__ = kind.__doc__
    function.__module__ = kind.__module__
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _parameter(name: str, default: object) -> inspect.Parameter:
    if default is MISSING:
        default = inspect.Parameter.empty
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


def lacking(run: Run, name: str, alternatives: Sequence[Sequence[str]]) -> RunError | None:
    """Return the error that says which sites a run lacks, and what to extract; None where it has what is needed."""
    held = set(run.sites)
    if any(held.issuperset(sites) for sites in alternatives):
        return None
    wanted = " or ".join(" + ".join(sites) for sites in alternatives)
    least = min(alternatives, key=lambda sites: len(set(sites) - held))
    return RunError(
        f"{name} needs {wanted}; {run.path} holds {', '.join(run.sites)}. Extract a run with --sites {','.join(least)}."
    )


def rounded(values: Any) -> list[Any]:
    """Round numbers to four significant digits for a headline; None stands for NaN and infinities."""
    text = json.dumps([float(f"{value:.{DIGITS}g}") for value in np.ravel(values)])
    found: list[Any] = json.loads(text, parse_constant=lambda _: None)
    return found


def rounded_one(value: Any) -> Any:
    """Round one number to four significant digits for a headline."""
    return rounded(value)[0]
