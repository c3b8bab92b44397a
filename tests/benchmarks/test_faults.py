"""The command that breaks everything: it says what it found, fails where anything was wrong, and writes its page."""

from __future__ import annotations

import pytest

from headwater.benchmarks import bench_faults


def test_damaged_files_are_tried_and_told_by_reader(capsys):
    assert bench_faults.main(["--only", "flips", "--scale", "0.005"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("flips, ") and "silently wrong" in said[2], said
    assert said[-1].startswith("all") and said[-1].endswith("0        0"), said


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"trial": "x", "silently_wrong": 0}, 0),
        ({"trial": "x", "silently_wrong": 1}, 1),
        ({"parser": "x", "over_memory": 1}, 1),
        ({"idle": 5, "missed": 1}, 1),
    ],
)
def test_what_is_wrong_fails_and_stands_on_the_page(row, code, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- disk -->\nold\n<!-- end -->\nafter\n<!-- fuzz -->\n<!-- end -->\n"
    )
    monkeypatch.setitem(bench_faults.TRIALS, "disk", lambda scale: [row])
    monkeypatch.setattr(bench_faults, "PAGE", page)
    monkeypatch.setenv("HEADWATER_RESULTS", str(tmp_path))
    assert bench_faults.main(["--only", "disk", "--save"]) == code
    names, values = (" | ".join(map(str, cells)) for cells in (row, row.values()))
    text = page.read_text()
    assert f"| {values} |" in text and f"| {names.replace('_', ' ')} |" in text
    assert "old" not in text and text.startswith("before\n") and "\nafter\n<!-- fuzz -->" in text


def test_a_page_without_a_place_is_an_error(tmp_path):
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="no place for disk"):
        bench_faults.write_page("disk", [{"trial": "x"}], tmp_path / "page.md")
