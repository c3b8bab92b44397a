"""Who may import whom, and what `import headwater` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import headwater

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels": set(),
    "store": set(),
    "extractor": {"kernels", "store"},
    "analysis": {"kernels", "store", "extractor"},
}
FORBIDDEN = {"store": {"torch", "ray", "triton"}, "kernels": {"ray", "zarr"}}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_they_may(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if (
                parts[0] == "headwater"
                and len(parts) > 1
                and parts[1] in {*ALLOWED, "cli", "commands", "benchmarks"}
            ):
                assert parts[1] in ALLOWED[folder] | {folder}, (
                    f"{path.relative_to(ROOT)} imports {name}"
                )
            assert parts[0] not in FORBIDDEN.get(folder, set()), (
                f"{path.relative_to(ROOT)} imports {name}"
            )


@pytest.mark.parametrize(
    ("package", "home"),
    [("ray", "extractor/cluster/ray.py"), ("obstore", "store/objects.py"), ("boto3", None)],
)
def test_an_optional_package_is_imported_in_one_module(package, home):
    found = {
        str(path.relative_to(ROOT))
        for folder in (*ALLOWED, "headwater")
        for path in (ROOT / folder).glob("*.py")
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert found <= {home}


def test_kernels_have_no_init():
    """A top-level package named `kernels` would hide Hugging Face's from transformers."""
    assert not (ROOT / "kernels/__init__.py").exists()


def modules() -> dict[str, Path]:
    """Return every module of the package by its name; each folder once, not through its link in headwater/."""
    found = {}
    for folder in (*ALLOWED, "benchmarks", "headwater"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder == "headwater" and len(parts) > 1 and parts[1] in {*ALLOWED, "benchmarks"}:
                continue
            name = ".".join(parts if folder == "headwater" else ("headwater", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def graph() -> dict[str, set[str]]:
    """Return which modules each one imports, anywhere in it, for type checking too."""
    known = modules()
    found = {}
    for module, path in known.items():
        found[module] = set()
        for name in imports(path):
            while name and name not in known:
                name = name.rpartition(".")[0]
            found[module] |= {name} - {"", module}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, none where there is no circle: take away the leaves."""
    left = {module: set(imported) for module, imported in edges.items()}
    while leaves := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in leaves}
    return sorted(left)


def test_no_imports_go_in_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == ["a", "b", "c"]
    edges = graph()
    assert len(edges) > 200 and "headwater.store.version" in edges["headwater"]
    assert circle(edges) == []


def test_nothing_below_the_front_door_imports_it():
    """Not even for its version: `headwater`, its command line and its service know the rest, and not the reverse."""
    for module, imported in graph().items():
        folder = module.split(".")[1] if "." in module else ""
        if folder in ALLOWED:
            above = [
                name
                for name in imported
                if name == "headwater" or name.split(".")[1] not in ALLOWED
            ]
            assert not above, f"{module} imports {above}"


def test_import_headwater_is_light():
    heavy = "{'torch', 'ray', 'zarr', 'xarray'}"
    code = f"import headwater.cli.entry, sys; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["benchmarks", "extractor", "store"])
def test_a_folder_shows_its_names_and_imports_nothing_heavy_before_one_is_used(folder):
    heavy = "{'torch', 'ray', 'zarr', 'xarray'}"
    code = f"import sys, headwater.{folder} as face; print(sorted({heavy} & set(sys.modules))); "
    code += "print({*face.__all__} <= {*dir(face)}, all(hasattr(face, n) for n in face.__all__))"
    assert run_python(code).splitlines() == ["[]", "True True"]


def test_dir_and_help_show_what_there_is():
    shown = run_python("import headwater; print(*dir(headwater)); help(headwater)")
    names, _, text = shown.partition("\n")
    assert names.split() == sorted(headwater.__all__)
    for name in {*headwater.__all__} - {"analysis", "__version__"}:
        assert getattr(headwater, name).__doc__
        assert f"\n    {name}(" in text or f"class {name}(" in text, name


@pytest.mark.parametrize("name", headwater.analysis.__all__)
def test_an_analysis_is_there_as_soon_as_it_is_named(name):
    function = getattr(headwater.analysis, name)
    assert callable(function) and function.__doc__ and function.__name__ == name


def test_what_is_not_there_is_an_attribute_error():
    for module in (headwater, headwater.analysis):
        with pytest.raises(AttributeError, match="no attribute 'sink'"):
            module.sink  # noqa: B018
    assert "sinks" in dir(headwater.analysis)


def test_python_runs_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "headwater", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"headwater {headwater.__version__}"
