"""Studies: a question to several models, answered with numbers, their errors and a figure.

A study is a composition of analyses: it extracts a run a model, or goes on with the one that is there, analyses it, and
writes one page. Nothing is measured here; `headwater.analysis.studies.questions` says what is asked.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from headwater.analysis.engine.results import RunResults, kept_results, load, save, set_aside
from headwater.analysis.plots.catalogue import draw, save_figures
from headwater.analysis.suite.analyze import analyze
from headwater.store.version import __version__

if TYPE_CHECKING:
    import xarray as xr

    from headwater.extractor.request import RunConfig
    from headwater.store.reader import Run


@dataclass(frozen=True)
class Estimate:
    """Numbers with their standard errors, one of each for every value."""

    values: Sequence[float]
    errors: Sequence[float]


Value = str | int | float | Sequence[float] | Estimate | None
Answer = dict[str, Value]


class Study(ABC):
    """One question. `sites` and `analyses` are what its answer needs, `figures` the plots that show it."""

    name: ClassVar[str]
    question: ClassVar[str]
    reading: ClassVar[str]
    sites: ClassVar[tuple[str, ...]]
    analyses: ClassVar[tuple[str, ...]] = ()
    figures: ClassVar[tuple[str, ...]] = ()

    # The names of the results that `more` gives.
    further: ClassVar[tuple[str, ...]] = ()

    def more(self, run: Run, found: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
        """Return results beside those of `analyses`, by the names of `further`."""
        return {}

    def kept(self, run: Run, found: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
        """Return what `more` gives, from beside the run where a study of these settings has kept it there."""
        parts = [__version__, repr(self), run.manifest.fingerprint]
        request = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        with suppress(ValueError, FileNotFoundError):
            there = {name: load(run, name) for name in self.further}
            if all(one.attrs.get("request") == request for one in there.values()):
                return there
        made = self.more(run, found)
        set_aside(run, self.further, request)
        for one in made.values():
            one.attrs["request"] = request
            save(run, one)
        return made

    @abstractmethod
    def answer(self, results: RunResults) -> list[Answer]:
        """Return the answer for one model: one record or several, with the same names in each."""


@dataclass(frozen=True)
class Finding:
    """What a study gives: its answers, a record each, and the files that it wrote."""

    study: Study
    answers: list[Answer]
    page: Path
    figures: list[Path]


def run_study(study: Study, requests: Sequence[RunConfig], out: str | Path) -> Finding:
    """Ask a study of models; write OUT/NAME.md, OUT/NAME.json and the figures.

    `requests` say which model reads which text; their `out` and sites are the study's. Runs are kept in OUT, results
    beside them, and both are used again. Raises what `extract` and `analyze` raise.
    """
    from dataclasses import replace

    from headwater.extractor.run import extract

    home = Path(out)
    home.mkdir(parents=True, exist_ok=True)
    found = []
    for label, request in zip(label_models([r.model for r in requests]), requests, strict=True):
        place = home / f"{label}-{study.name}"
        run = extract(replace(request, out=place, sites=study.sites, dtype="float32"))
        analyze(run, study.analyses)
        kept = kept_results(run, label)
        kept.results.update(study.kept(run, kept.results))
        found.append(kept)
    answers = [{"model": one.label, **answer} for one in found for answer in study.answer(one)]
    figures: list[Path] = []
    if study.figures:
        figures = save_figures(draw(found, study.figures), home, "png")
    page = home / f"{study.name}.md"
    page.write_text(write_page(study, answers, found, [path.name for path in figures]), "utf-8")
    record = {"study": study.name, "question": study.question, "answers": plain(answers)}
    (home / f"{study.name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return Finding(study, answers, page, figures)


def label_models(models: Sequence[str]) -> list[str]:
    """Return a short name for each model, the last part of its path, numbered where two are the same."""
    names: list[str] = []
    for model in models:
        base = Path(model).name or model
        name = base
        while name in names:
            name = f"{base}-{names.count(base) + sum(n.startswith(base + '-') for n in names) + 1}"
        names.append(name)
    return names


def write_page(
    study: Study, answers: Sequence[Answer], found: Sequence[RunResults], figures: Sequence[str]
) -> str:
    """Write the page of a study in Markdown: the question, the answer as a table, figures, and what made it."""
    made = []
    for one in found:
        attributes = next(iter(one.results.values())).attrs
        weights = str(attributes.get("model_digest", ""))[:16]
        mark = str(attributes.get("fingerprint", ""))[:16]
        made.append(f"- {one.label}: weights {weights}, run {mark} at `{one.path}`")
    parts = [
        f"# {study.question}",
        write_table(answers),
        "\n".join(f"![{name}]({name})" for name in figures),
        study.reading,
        "Errors (±) are standard errors. Every sentence is about these models on these texts.",
        "\n".join(made),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_table(answers: Sequence[Answer]) -> str:
    """Write records as a table of Markdown, a column a name."""
    heads = list(dict.fromkeys(name for answer in answers for name in answer))
    rows = [[write_value(answer.get(name)) for name in heads] for answer in answers]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def write_value(value: Value) -> str:
    """Write a value for people: three digits, errors behind ±, a dash for what there is not."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return str(value).replace("|", "∣")
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Estimate):
        pairs = zip(value.values, value.errors, strict=True)
        return ", ".join(f"{_number(v)} ± {_number(e)}" for v, e in pairs)
    return ", ".join(_number(v) for v in value)


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "–"
    if 0.01 <= abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:.4g}"


def plain(value: object) -> object:
    """Return JSON values: an estimate as its values and errors, null for what is not a number."""
    if isinstance(value, Estimate):
        return {"values": plain(value.values), "errors": plain(value.errors)}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
