"""An analysis of another package, one file, is there wherever Headwater's own are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import headwater
from headwater.analysis.engine.results import load

MODULE = '''
"""The largest size of the residual stream, as another package would measure it."""

from dataclasses import dataclass

import numpy as np
import xarray

from headwater.analysis.engine.analysis import Analysis, Plot, rounded
from headwater.analysis.engine.options import SOME, setting
from headwater.analysis.engine.reducer import Reducer


class Peak(Reducer):
    name = "zenith"
    sites = ("resid",)

    def __init__(self, n_leads):
        self.n_leads = n_leads

    def zero(self):
        return {"peak": np.zeros(self.n_leads)}

    def update(self, state, chunk):
        largest = float(np.abs(np.nan_to_num(chunk["resid"].astype(np.float64))).max())
        state["peak"][chunk.lead] = max(state["peak"][chunk.lead], largest)

    def merge(self, a, b):
        return {"peak": np.maximum(a["peak"], b["peak"])}

    def finalise(self, state):
        return state["peak"]


def draw_zenith(runs):
    from headwater.analysis.plots.draw import make_figure, style

    with style():
        figure, axes = make_figure()
        for run in runs:
            axes[0, 0].plot(run.results["zenith"].zenith, label=run.label)
    return figure


@dataclass(frozen=True)
class Zenith(Analysis):
    """Find the largest size of the residual stream at every depth."""

    name = "zenith"
    title = "the largest size of the residual stream"
    needs = (("resid",),)
    section = "Massive activations"
    conventions = "zenith: the largest |x| at a depth, times stretch."
    plots = (Plot("zenith", "The largest size by depth.", draw_zenith, variable="zenith"),)
    stretch: int = setting(1, SOME, "factor on the sizes", "N")

    def reducers(self, run):
        return [Peak(run["resid"].shape[0])]

    def result(self, run, states):
        return xarray.Dataset({"zenith": ("depth", self.stretch * states[0])})

    @staticmethod
    def headline(result):
        return {"zenith": rounded(result.zenith)}
'''


ASK = """
import json, sys
import headwater
from headwater.analysis.suite import registry
from headwater.service.schemas import analyze_schema

run = headwater.open_run(sys.argv[1])
found = headwater.analysis.zenith(run, stretch=2)
options = analyze_schema()["properties"]["options"]["properties"]
plots = [plot.name for _, plot in registry.plots()]
told = {"values": found.zenith.values.tolist(), "stretch": options["stretch"], "plots": plots}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a package beside Headwater offers the analysis by an entry point."""
    home = tmp_path_factory.mktemp("elsewhere")
    (home / "zenith_package.py").write_text(MODULE, "utf-8")
    info = home / "zenith_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zenith-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[headwater.analyses]\nzenith = zenith_package:Zenith\n")
    return {**os.environ, "PYTHONPATH": str(home), "MPLCONFIGDIR": str(home)}


def test_an_analysis_of_another_package_is_there_everywhere(
    elsewhere: dict[str, str], tiny_gpt2: Path, tiny_text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    request = headwater.RunConfig(out=path, model=str(tiny_gpt2), text=[str(tiny_text)])
    run = headwater.extract(request)
    wanted = np.nanmax(np.abs(run["resid"][...].astype(np.float64)), (1, 2, 3)).tolist()

    def call(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=elsewhere, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--stretch N" in call("-m", "headwater", "analyze", "--help")
    told = json.loads(call("-c", ASK, str(path)))
    np.testing.assert_allclose(told["values"], [2 * value for value in wanted], rtol=1e-6)
    assert told["stretch"]["default"] == 1
    assert "zenith" in told["plots"]
    call("-m", "headwater", "analyze", str(path), "zenith")
    kept = load(run, "zenith")
    np.testing.assert_allclose(kept.zenith.values, wanted, rtol=1e-6)
    call("-m", "headwater", "plot", str(path), "--figures", "zenith", "--out", str(tmp_path))
    assert (tmp_path / "zenith.png").read_bytes().startswith(b"\x89PNG")


def test_a_class_is_registered_for_its_process() -> None:
    code = MODULE + (
        "\nfrom headwater.analysis.suite import registry\n"
        "assert 'zenith' not in registry.analyses()\n"
        "assert registry.register(Zenith) is Zenith\n"
        "assert registry.analysis_of('zenith') is Zenith\n"
    )
    # Another process, since a registration stays; as a module, for the figure is named by nothing else.
    subprocess.run([sys.executable, "-c", code], check=True)
