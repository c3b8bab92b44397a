"""Run the tests with the oldest versions that pyproject.toml allows and with the newest, on several Pythons.

Each pair has an environment of its own in the cache folder, which is used again while the requirements stay the same.
torch is large: for the Python of this environment its own is linked there, unless --torch install is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from headwater.benchmarks.peers.environments import cache_folder

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
WHICH = ("lowest", "newest")
EXTRAS = ("s3", "serve", "plots")
LINKED = ("torch", "functorch", "torchgen", "triton")
# What takes minutes, needs a quiet machine or a registry, or checks kernels rather than libraries.
SLOW = (
    "cluster/test_ray_",
    "store/test_crash",
    "extractor/test_same_bytes",
    "kernels/test_interpreter",
    "kernels/test_aot",
    "benchmarks/",
    "service/test_page",
    "service/test_ray",
)
TIERS = ("smoke", "fast", "all")
SMOKE = (
    "cluster/test_workers.py",
    "store/test_readers.py",
    "kernels/test_huggingface.py",
    "test_docs.py",
)
LISTED = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one environment: the last line and the seconds of its tests, and the versions that were there."""

    case: str
    said: str
    seconds: float
    versions: dict[str, str]
    ok: bool


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each environment; return 1 where tests fail in one."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks versions", description=__doc__
    )
    parser.add_argument("--pythons", nargs="+", choices=PYTHONS, default=list(PYTHONS))
    parser.add_argument("--which", nargs="+", choices=WHICH, default=list(WHICH))
    parser.add_argument("--tests", choices=TIERS, default="fast", help="how much of the suite")
    parser.add_argument("--torch", choices=("link", "install"), default="link")
    parser.add_argument("--cache", help="where environments are kept")
    parser.add_argument("--prepare", action="store_true", help="only make the environments")
    options = parser.parse_args(arguments)
    cache = cache_folder(options.cache)
    outcomes = []
    for minor in options.pythons:
        python = find_python(minor)
        if python is None:
            print(f"{minor}: there is no such Python here")
            continue
        for which in options.which:
            home = cache / f"versions-{minor}-{which}"
            outcome = try_versions(python, which, home, options)
            outcomes.append(outcome)
            print(f"{outcome.case:14} {outcome.said} ({outcome.seconds:.0f} s)", flush=True)
    print_versions(outcomes)
    if outcomes and all(outcome.ok for outcome in outcomes):
        return 0
    return 1


def try_versions(python: str, which: str, home: Path, options: argparse.Namespace) -> Outcome:
    """Make the environment of one pair, and run the tests in it."""
    case = home.name.removeprefix("versions-")
    try:
        inside = make_environment(python, which, home, options.torch == "link")
    except subprocess.CalledProcessError as error:
        said = " ".join(str(error.stderr).strip().splitlines()[-3:])
        return Outcome(case, f"cannot be installed: {said}", 0.0, {}, False)
    names = json.dumps(list(floors()))
    listed = subprocess.run([inside, "-c", LISTED, names], check=True, capture_output=True)
    versions = json.loads(listed.stdout)
    if options.prepare:
        return Outcome(case, "ready", 0.0, versions, True)
    start = time.perf_counter()
    command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests_of(options.tests)]
    # A network test fetches; the kernels have a card of their own.
    done = subprocess.run(
        [*command, "-m", "not network and not gpu"], cwd=ROOT, capture_output=True, text=True
    )
    (home / "tests.txt").write_text(done.stdout + done.stderr, "utf-8")
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr[-200:]]
    if done.returncode:
        said = f"{lines[-1].strip('= ')}; see {home / 'tests.txt'}"
    else:
        said = lines[-1]
    return Outcome(case, said, time.perf_counter() - start, versions, done.returncode == 0)


def find_python(minor: str) -> str | None:
    """Return an interpreter of a minor version: this one, one on PATH, or pyenv's."""
    if sys.version_info[:2] == tuple(map(int, minor.split("."))):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [shutil.which(f"python{minor}"), *sorted(pyenv.glob(f"{minor}.*/bin/python"))]
    for found in map(str, filter(None, candidates)):
        if subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found  # pyenv has a shim for every version, whether it runs or not
    return None


def floors() -> dict[str, str]:
    """Return the lowest version of every library that Headwater itself uses, as pyproject.toml gives it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    found = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", item) for item in wanted)
    return {match[1]: match[2] for match in found if match is not None}


def make_environment(python: str, which: str, home: Path, link: bool) -> str:
    """Make an environment, unless it is there; return its interpreter. Raises CalledProcessError where pip fails."""
    inside = home / "bin" / "python"
    ready = home / "ready.txt"
    mark = f"{link}\n{(ROOT / 'pyproject.toml').read_text('utf-8')}"
    if ready.is_file() and ready.read_text("utf-8") == mark:
        return str(inside)
    shutil.rmtree(home, ignore_errors=True)
    _run([python, "-m", "venv", str(home)])
    linked = link and python == sys.executable
    if linked:
        _link_torch(inside)
    pins = []
    if which == "lowest":
        pins = [f"{name}=={version}" for name, version in floors().items()]
        pins = [pin for pin in pins if not (linked and pin.startswith("torch=="))]
    pip = [str(inside), "-m", "pip", "install", "--quiet", "--no-input"]
    _run([*pip, "--upgrade", "pip"])
    _run([*pip, "--editable", f"{ROOT}[{','.join(EXTRAS)}]", *pins])
    # The tools of the tests are as new as they come: they may raise what they need themselves, which is shown.
    _run([*pip, "--editable", f"{ROOT}[test]"])
    ready.write_text(mark, "utf-8")
    return str(inside)


def _link_torch(inside: Path) -> None:
    """Link this environment's torch into another one of the same Python."""
    here = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    there = Path(_run([str(inside), "-c", here]).strip())
    site = Path(torch.__file__).parents[1]
    for name in LINKED:
        for item in (site / name, *site.glob(f"{name}-*.dist-info")):
            if item.exists():
                (there / item.name).symlink_to(item)


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tests_of(tier: str) -> list[str]:
    """List the test files of a tier."""
    tests = ROOT / "tests"
    files = [path.relative_to(tests).as_posix() for path in sorted(tests.rglob("test_*.py"))]
    if tier == "smoke":
        files = [name for name in files if name in SMOKE]
    elif tier == "fast":
        files = [name for name in files if not name.startswith(SLOW)]
    return [str(tests / name) for name in files]


def print_versions(outcomes: list[Outcome]) -> None:
    """Print the versions: a line a library, a column an environment; * marks another than the lowest asked for."""
    least = floors()
    print(f"\n{'':20}" + "".join(f"{outcome.case:>16}" for outcome in outcomes))
    for name, version in least.items():
        cells = []
        for outcome in outcomes:
            found = outcome.versions.get(name, "")
            raised = outcome.case.endswith("lowest") and not _same(found, version)
            cells.append(f"{found}{'*' if raised and found else ''}")
        print(f"{name:20}" + "".join(f"{cell:>16}" for cell in cells))


def _same(found: str, asked: str) -> bool:
    """Whether two versions are one: 2025.6 is 2025.6.0."""

    def parts(text: str) -> list[int]:
        numbers = [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]
        return (numbers + [0] * 4)[:4]

    return parts(found) == parts(asked)


if __name__ == "__main__":
    sys.exit(main())
