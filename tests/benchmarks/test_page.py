"""The performance page comes from CSVs alone, losses included; another commit is timed only where its tests pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.benchmarks import page
from headwater.benchmarks.lib import base, measure

ROOT = Path(__file__).parents[2]
ROW = {
    "spread": 0.1,
    "x_plain_without_fsync": 1.3,
    "batch": 2,
    "peak_MB": 900,
    "MB_on_disk": 10,
    "lines": 5,
    "values_checked": 9,
    "problem": "",
    "version": "1",
    "storage": "x",
    "model": "small",
    "sequences": 4,
    "rounds": 3,
    "seq_len": 1024,
    "tokens_per_second": 800,
}


def test_page_shows_goals_losses_and_what_was_not_measured(tmp_path):
    rows = [
        {"workload": "patterns", "memory": memory, "case": case, "x_plain": ratio, "read_ms": read}
        | ROW
        for memory in ("default", "kept")
        for case, ratio, read in (
            ("plain", 1.0, ""),
            ("headwater", 1.2, 0.5),
            ("rival", 0.6, 0.3),
            ("other", 0.7, 0.9),
        )
    ]
    rows.append(
        rows[1]
        | {"memory": "default", "case": "absent", "x_plain": "", "problem": "pip cannot install it"}
    )
    measure.write_csv("peers", rows, tmp_path)
    measure.write_csv("store", [{"case": "headwater", "write_x": 1}], tmp_path)
    forward = [
        {"compute": compute, "case": "plain", "of_gemm_rate": rate}
        for compute, rate in (("bf16", 0.5), ("fp32", 0.79))
    ]
    measure.write_csv("extract", forward, tmp_path)
    measure.write_csv("extract", [forward[1] | {"of_gemm_rate": 0.81}], tmp_path / "elsewhere")
    made = page.make_page(tmp_path, page.newest(tmp_path))
    text = made["performance.md"]
    assert "| patterns | ≥ 1.1 × plain | 1.2 | met" in text
    assert "≥ 1.7 × the best peer (other), memory kept | 1.71 | met" in text
    assert "| short | ≥ 1.1 × plain | not measured yet" in text
    assert (
        "| our forward, nothing captured | ≥ 0.8 of the fp32 GEMM rate | 0.79 | **not met** |"
        in text
    )
    elsewhere = text.split("## The same goals on ")[1].split("## ")[0]
    assert (
        "| patterns | ≥ 1.1 × plain | not measured yet" in elsewhere
        and "| 0.81 | met |" in elsewhere
    )
    behind = text.split("## Where Headwater is behind")[1].split("##")[0]
    assert behind.count("rival has read_ms 0.3, Headwater 0.5") == 2 and "other" not in behind
    assert "not measured: pip cannot install it" in text and "## Stores" in text
    assert made["performance/patterns.svg"].count("<rect") == 7


def test_committed_page_is_what_its_results_make():
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    names = re.findall(r"`([\w-]+\.csv)`", text.split("in\n[benchmarks")[0])
    for name, expected in page.make_page(measure.RESULTS, names).items():
        assert (ROOT / "docs" / name).read_text("utf-8") == expected, (
            f"{name}: run python -m headwater.benchmarks page"
        )


def test_results_of_parts_of_a_table_are_merged(tmp_path):
    for workload, ratio in (("a", 1), ("b", 2), ("a", 3)):
        path = measure.write_csv(
            "x", [{"workload": workload, "r": ratio}], tmp_path, keys=("workload",)
        )
    assert [line.split(",")[-2:] for line in path.read_text().splitlines()[1:]] == [
        ["b", "2"],
        ["a", "3"],
    ]


def test_torch_loads_after_idle_threads_are_settled():
    code = "import sys, headwater.benchmarks.__main__; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "False\n"
    )


SCRIPT = """
import os, sys
from pathlib import Path
folder = Path(os.environ["HEADWATER_RESULTS"])
folder.mkdir()
speed = (Path(__file__).resolve().parents[1] / "headwater" / "speed.txt").read_text()
(folder / "x-1.csv").write_text("case,tokens_per_second\\nresidual," + speed + "\\n")
"""


@pytest.fixture
def repository(tmp_path):
    """A repository whose commits differ in the speed that its benchmark reports and in whether its test passes."""
    root = tmp_path / "repo"
    for folder in ("benchmarks", "headwater", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "headwater" / "__init__.py").touch()
    (root / "headwater" / "benchmarks").symlink_to("../benchmarks")
    (root / "benchmarks" / "__main__.py").write_text(SCRIPT)

    def commit(speed: int, passes: bool) -> None:
        (root / "headwater" / "speed.txt").write_text(str(speed))
        (root / "tests" / "test_x.py").write_text(f"def test_x():\n    assert {passes}\n")
        for command in (["add", "-A"], ["commit", "-q", "-m", "x"]):
            names = ["-c", "user.name=x", "-c", "user.email=x@y"]
            subprocess.run(["git", "-C", str(root), *names, *command], check=True)

    subprocess.run(["git", "init", "-q", str(root)], check=True)
    commit(100, False)
    commit(200, True)
    commit(300, True)
    return root


def test_another_commit_is_compared_and_refused_where_its_tests_fail(repository):
    text = base.compare("x", [], "HEAD~1", ["tests/test_x.py"], repository, 1)
    assert re.search(r"residual: tokens_per_second +200\.0 +300\.0 +1\.500", text)
    with pytest.raises(base.BaseError, match=r"tests of \w+ fail, so nothing is reported: FAILED"):
        base.compare("x", [], "HEAD~2", ["tests/test_x.py"], repository)
    with pytest.raises(base.BaseError, match="not a commit"):
        base.compare("x", [], "no-such-ref", ["tests/test_x.py"], repository)
    with pytest.raises(base.BaseError, match="none of the tests"):
        base.compare("x", [], "HEAD~1", ["tests/test_y.py"], repository)
    assert os.listdir(repository.parent) == ["repo"]
