"""Studies: phases that are planted and noise that is not, and pages that are made, kept and used again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import headwater
from headwater.analysis.studies.phases import find_phases
from headwater.analysis.studies.questions import STUDIES, PhaseStudy, PlateauStudy, study_of
from headwater.analysis.studies.study import (
    Estimate,
    label_models,
    plain,
    run_study,
    write_table,
    write_value,
)
from headwater.cli.studies import NAMES


@pytest.mark.parametrize(
    ("levels", "lengths", "kind", "changes"),
    [
        ([0.9, 0.1], [1, 11], "two phases", (1,)),
        ([0.9, 0.1, 0.3], [2, 8, 2], "three phases", (2, 10)),
        ([0.2], [12], "one phase", ()),
    ],
)
def test_planted_phases_are_found(
    levels: list[float], lengths: list[int], kind: str, changes: tuple[int, ...]
) -> None:
    steps = np.repeat(levels, lengths) + 0.01 * np.random.default_rng(3).normal(size=12)
    found = find_phases(steps)
    assert (found.kind, found.changes) == (kind, changes)


def test_noise_and_ramps_are_rarely_called_phases() -> None:
    rng = np.random.default_rng(5)
    n = 200
    for base in (np.full(12, 0.1), np.linspace(0.3, 0.05, 12)):
        kinds = [find_phases(base + 0.02 * rng.normal(size=12)).kind for _ in range(n)]
        wrong = sum(kind.endswith("phases") for kind in kinds)
        # 1.2 times the level of .05, and two standard errors of a count of 200
        assert wrong / n <= 0.06 + 2 * (0.06 * 0.94 / n) ** 0.5


def test_two_levels_are_rarely_called_three() -> None:
    rng = np.random.default_rng(6)
    base = np.repeat([0.5, 0.1], [2, 10])
    kinds = [find_phases(base + 0.02 * rng.normal(size=12)).kind for _ in range(200)]
    assert kinds.count("three phases") / 200 <= 0.06 + 2 * (0.06 * 0.94 / 200) ** 0.5


def test_few_layers_cannot_tell_and_gaps_are_refused() -> None:
    assert find_phases([0.5, 0.1, 0.1]).kind == "too few layers"
    with pytest.raises(ValueError, match="expected a number for every layer"):
        find_phases([0.1, 0.2, np.nan, 0.1, 0.1, 0.1])


def test_values_are_written_for_people_and_as_json() -> None:
    estimate = Estimate([0.25, 2.0], [0.01, float("nan")])
    assert write_value(estimate) == "0.250 ± 0.010, 2 ± –"
    assert write_value(None) == "–"
    assert plain({"x": estimate}) == {"x": {"values": [0.25, 2.0], "errors": [0.01, None]}}
    assert write_table([{"a": 1}, {"a": 2, "b": "x|y"}]).splitlines()[-1] == "| 2 | x∣y |"
    assert label_models(["demo", "x/demo", "y/demo"]) == ["demo", "demo-2", "demo-3"]


def test_the_command_names_every_study() -> None:
    assert tuple(study.name for study in STUDIES) == NAMES
    with pytest.raises(ValueError, match="expected one of transition, phases"):
        study_of("phase")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of the demo model's language, of its own files' length."""
    path = tmp_path_factory.mktemp("study") / "book.py"
    path.write_text(Path(json.__file__).read_text("utf-8"), "utf-8")
    return path


def test_a_study_answers_keeps_its_run_and_uses_it_again(book: Path, tmp_path: Path) -> None:
    request = headwater.RunConfig(
        out=".", model="demo", text=(str(book),), seq_len=64, max_sequences=4
    )
    first = run_study(PhaseStudy(), [request], tmp_path)
    (answer,) = first.answers
    run = headwater.open_run(tmp_path / "demo-phases")
    x = run["resid"][:, :, 1:].astype(np.float64)
    x = x - x.mean((1, 2), keepdims=True)
    norm = np.linalg.norm(x, axis=-1)
    cosine = ((x[1:] * x[:-1]).sum(-1) / (norm[1:] * norm[:-1])).mean((1, 2))
    assert isinstance(answer["steps by layer"], list)
    # the study leaves dimensions of massive activations out, of which the demo has none
    np.testing.assert_allclose(answer["steps by layer"], 1 - cosine, atol=1e-3)
    entry = run.ledger.committed()
    second = run_study(PhaseStudy(), [request], tmp_path)
    assert plain(second.answers) == plain(first.answers)
    assert headwater.open_run(tmp_path / "demo-phases").ledger.committed() == entry
    assert "![phases.png](phases.png)" in first.page.read_text("utf-8")
    record = json.loads((tmp_path / "phases.json").read_text("utf-8"))
    assert record["answers"][0]["model"] == "demo"


def test_results_of_interventions_are_kept_for_the_next_time(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = headwater.RunConfig(
        out=".", model="demo", text=(str(book),), seq_len=32, max_sequences=8
    )
    study = PlateauStudy(n_pairs=2, n_tokens=8, steps=5)
    first = run_study(study, [request], tmp_path)
    assert [answer["pairs"] for answer in first.answers] == [2] * len(first.answers)

    def never(*_: object) -> dict[str, object]:
        raise AssertionError("computed again")

    monkeypatch.setattr(PlateauStudy, "more", never)
    assert plain(run_study(study, [request], tmp_path).answers) == plain(first.answers)
