"""Old libraries are named: the table of the code is that of pyproject.toml, and the command and Python look at it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest

from headwater.benchmarks import bench_versions
from headwater.store import versions
from headwater.store.versions import CORE, LEAST, OldLibrary, check_versions


def test_the_table_is_that_of_the_project():
    floors = bench_versions.floors()
    assert LEAST.items() <= floors.items()
    project = tomllib.loads((bench_versions.ROOT / "pyproject.toml").read_text())["project"]
    test = project["optional-dependencies"]["test"]
    for extra in ("s3", "plots"):  # the suite has what users have
        assert set(project["optional-dependencies"][extra]) - {"boto3>=1.34"} <= set(test)


@pytest.mark.parametrize(
    ("found", "old"),
    [("3.1.5", True), ("3.1.6", False), ("3.1.6.dev3+gab", False), ("3.10", False), ("2", True)],
)
def test_versions_are_compared_by_number(monkeypatch, found, old):
    monkeypatch.setattr(versions, "version", lambda name: found)
    if not old:
        return check_versions("zarr")
    with pytest.raises(OldLibrary, match=rf"^zarr {found} is installed, .* needs 3\.1\.6 or newer"):
        check_versions("zarr")


def test_what_is_installed_here_is_new_enough():
    check_versions(*CORE, "ray", "obstore", "fastapi", "starlette")


def test_an_old_library_is_named_by_the_command_and_in_python(tmp_path):
    """As importlib sees an xarray that somebody's environment has."""
    (tmp_path / "xarray-2025.1.0.dist-info").mkdir()
    metadata = tmp_path / "xarray-2025.1.0.dist-info/METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: xarray\nVersion: 2025.1.0\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = "xarray 2025.1.0 is installed, but Headwater needs 2025.6 or newer."
    for command in (
        ["-m", "headwater", "sites"],
        ["-c", "import headwater; headwater.extract"],
    ):
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 1 and said in done.stderr.splitlines()[-1], done.stderr
