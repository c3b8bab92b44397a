"""Find the analyses there are: those of this package, those of other packages, and those that were registered.

Another package offers analyses as entry points of the group `headwater.analyses`, which name a module or a class; a
script or a notebook calls `headwater.analysis.register`. Nothing here imports torch, xarray or matplotlib.
"""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from headwater.analysis.engine.analysis import (
    SECTIONS,
    Analysis,
    Figures,
    Plot,
    Shown,
    lacking,
)
from headwater.extractor.settings import Option, options_of
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

GROUP = "headwater.analyses"
PACKAGES = ("headwater.analysis.measures", "headwater.analysis.plots")

K = TypeVar("K", bound=type[Shown])
_registered: list[type[Shown]] = []


def register(kind: K) -> K:
    """Add an analysis for this process; it can stand before the class as a decorator."""
    check_name(kind, kinds())
    _registered.append(kind)
    kinds.cache_clear()
    return kind


@cache
def kinds() -> Mapping[str, type[Shown]]:
    """Return all kinds of results by name, in the order of the report's sections."""
    found: dict[str, type[Shown]] = {}
    for package in PACKAGES:
        home = import_module(package)
        for module in pkgutil.iter_modules(home.__path__, f"{package}."):
            for kind in _kinds_in(import_module(module.name)):
                found[kind.name] = kind
    for kind in [*_offered(), *_registered]:
        try:
            check_name(kind, found)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        found[kind.name] = kind
    return {kind.name: kind for kind in _in_order(found)}


def analyses() -> dict[str, type[Analysis]]:
    """Return the analyses of runs by name, each before those that it brings."""
    return {name: kind for name, kind in kinds().items() if issubclass(kind, Analysis)}


def analysis_of(name: str) -> type[Analysis]:
    """Return an analysis by name; raise ValueError with the names there are."""
    known = analyses()
    if name not in known:
        raise ValueError(f"there is no analysis {name!r}; expected one of {', '.join(known)}.")
    return known[name]


def plots() -> list[tuple[type[Shown], Plot]]:
    """Return all figures, each with the kind of result that it shows."""
    return [(kind, plot) for kind in kinds().values() for plot in kind.plots]


def sections() -> dict[str, list[type[Shown]]]:
    """Return the kinds of results by the section of the report that shows them."""
    found: dict[str, list[type[Shown]]] = {}
    for kind in kinds().values():
        if kind.section:
            found.setdefault(kind.section, []).append(kind)
    return found


def summarise(name: str, result: xarray.Dataset) -> Figures:
    """Return the headline figures of a result, by label; numbers, words or short lists of numbers."""
    known = kinds()
    return known[name].headline(result) if name in known else {}


def base_name(key: str) -> str:
    """Return the analysis of a kept result: `svd` for svd_mlp_out."""
    fits = [name for name in kinds() if key == name or key.startswith(f"{name}_")]
    return max(fits, key=len, default=key)


def takes(kind: type[Analysis], option: str) -> bool:
    """Say whether an analysis has a setting."""
    return option in kind.parameters()


def make_analysis(run: Run, kind: type[Analysis], options: Mapping[str, object]) -> Analysis:
    """Make an analysis of the settings that it takes, with a site that the run holds where none is named.

    Raises RunError where the run lacks what it needs.
    """
    own = own_options(run, kind, options)
    analysis = kind(**own)
    if error := lacking(run, kind.name, analysis.alternatives()):
        raise error
    return analysis


def own_options(run: Run, kind: type[Analysis], options: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that an analysis takes, with a site that the run holds where none is named."""
    own = {name: value for name, value in options.items() if takes(kind, name)}
    if takes(kind, "site") and "site" not in own:
        if error := lacking(run, kind.name, kind.needs):
            raise error
        own["site"] = next(sites[0] for sites in kind.needs if set(sites) <= set(run.sites))
    return own


def all_options() -> dict[str, list[tuple[type[Analysis], Option]]]:
    """Return every setting of every analysis by its name, with the analyses that take it."""
    found: dict[str, list[tuple[type[Analysis], Option]]] = {}
    for kind in analyses().values():
        for option in settings_of(kind):
            found.setdefault(option.name, []).append((kind, option))
    return found


def settings_of(kind: type[Analysis]) -> list[Option]:
    """Return the settings of an analysis that flags and jobs have too."""
    return options_of(kind)


def flag_of(option: str) -> str:
    """Return the flag of a setting of analyses."""
    takers = all_options().get(option)
    return takers[0][1].flag if takers else f"--{option}"


def check_name(kind: type[Shown], known: Mapping[str, type[Shown]]) -> None:
    """Raise ValueError for an analysis without a name of its own, or whose settings clash with those of others."""
    if not kind.name.isidentifier():
        raise ValueError(f"{kind.__qualname__} has the name {kind.name!r}; expected a word.")
    if kind.name in known and known[kind.name] is not kind:
        raise ValueError(
            f"{kind.__module__} offers an analysis {kind.name!r}, but there is one of that name already."
        )


def _kinds_in(module: ModuleType) -> Iterator[type[Shown]]:
    for value in vars(module).values():
        kind = isinstance(value, type) and issubclass(value, Shown) and bool(value.name)
        if kind and value.__module__ == module.__name__:
            yield value


def _offered() -> Iterator[type[Shown]]:
    """Yield what installed packages offer; one that cannot be imported is left out with a warning."""
    for point in entry_points(group=GROUP):
        try:
            value = point.load()
        except Exception as error:
            warnings.warn(
                f"the analyses of {point.value} cannot be imported: {error}.", stacklevel=2
            )
            continue
        if isinstance(value, ModuleType):
            yield from _kinds_in(value)
        else:
            yield value


def _in_order(found: Mapping[str, type[Shown]]) -> Iterable[type[Shown]]:
    """Sort by section, and within one by name, but what another analysis brings or is made from stands behind it."""
    brought = {
        name
        for kind in found.values()
        if issubclass(kind, Analysis)
        for name in kind.brings
        if name in found and found[name].section == kind.section
    }

    def place(kind: type[Shown]) -> tuple[int, str]:
        known = kind.section in SECTIONS
        return (SECTIONS.index(kind.section) if known else len(SECTIONS), kind.section)

    ordered: dict[str, type[Shown]] = {}
    for kind in sorted(found.values(), key=place):
        if kind.name in brought:
            continue
        ordered[kind.name] = kind
        if issubclass(kind, Analysis):
            ordered |= {name: found[name] for name in kind.brings if name in brought}
    return ordered.values()
