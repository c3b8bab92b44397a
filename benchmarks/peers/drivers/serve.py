"""Run one peer's driver in its own environment, on command: JSON lines in, JSON lines out. Imports nothing of ours.

`python -P serve.py DRIVER`. A driver is a module with `load`, one function a workload, and `read`. Commands are
`load`, `begin`, `step`, `read` and `peak`; each answers one line, `{"error": …}` where it failed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np


class Steps:
    """A workload taken one step at a time; a step stores all sequences once and is timed with its fsync."""

    def __init__(self, driver: Any, model: Any, request: dict[str, Any]) -> None:
        self.driver = driver
        self.model = model
        self.request = request
        self.out = Path(request["out"])
        self.n = 0

    def step(self) -> dict[str, float]:
        """Capture into a new folder and sync it."""
        folder = self.out / str(self.n)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        getattr(self.driver, self.request["workload"])(
            self.model, self.request["tokens"], str(folder), self.request["batch"]
        )
        captured = time.perf_counter()
        sync(folder)
        self.n += 1
        return {"seconds": time.perf_counter() - start, "sync": time.perf_counter() - captured}

    def place(self) -> str:
        """Return the folder of the newest step."""
        return str(self.out / str(self.n - 1))


class Paced(Steps):
    """A driver whose one call does all steps and reports after each; the report is held until the next is asked for."""

    def __init__(self, driver: Any, model: Any, request: dict[str, Any]) -> None:
        super().__init__(driver, model, request)
        self.go: queue.Queue[None] = queue.Queue()
        self.came: queue.Queue[BaseException | None] = queue.Queue()
        self.out.mkdir(parents=True)
        threading.Thread(target=self._run, daemon=True).start()
        self._take()

    def step(self) -> dict[str, float]:
        """Let the driver go on until its next report."""
        start = time.perf_counter()
        self.go.put(None)
        self._take()
        return {"seconds": time.perf_counter() - start, "sync": 0.0}

    def place(self) -> str:
        """Return the folder of the run."""
        return str(self.out / "run")

    def _take(self) -> None:
        if (error := self.came.get()) is not None:
            raise error

    def _run(self) -> None:
        def observe() -> None:
            self.came.put(None)
            self.go.get()

        try:
            workload = getattr(self.driver, self.request["workload"])
            workload(
                self.model, self.request["tokens"], self.place(), self.request["batch"], observe
            )
            self.came.put(None)
        except BaseException as error:
            self.came.put(error)


def sync(folder: Path) -> None:
    """Make every file of a folder durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def lines_of_code(source: str, workload: str) -> int:
    """Count the lines of `load`, a workload and all that they use of the module, imports included; no docstrings."""
    tree = ast.parse(source)
    defined = {
        node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    used = set[str]()
    open_names = ["load", workload]
    while open_names:
        name = open_names.pop()
        if name in defined and name not in used:
            used.add(name)
            open_names += [n.id for n in ast.walk(defined[name]) if isinstance(n, ast.Name)]
    parts = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.Assign))]
    names = {n.id for name in used for n in ast.walk(defined[name]) if isinstance(n, ast.Name)}
    kept = [
        p
        for p in parts
        if not isinstance(p, ast.Assign) or {getattr(t, "id", "") for t in p.targets} & names
    ]
    kept = [p for p in kept if getattr(p, "module", "") != "__future__"]
    return sum(
        len(ast.unparse(node).splitlines())
        for node in [*kept, *(_bare(defined[name]) for name in used)]
    )


def _bare(node: Any) -> Any:
    for inner in ast.walk(node):
        if (
            isinstance(inner, (ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(inner) is not None
        ):
            inner.body = inner.body[1:] or [ast.Pass()]
    return node


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


class Server:
    """The state between commands: the driver, its model, the workload under way."""

    def __init__(self, path: str) -> None:
        spec = importlib.util.spec_from_file_location("driver", path)
        assert spec is not None and spec.loader is not None
        self.source = Path(path).read_text("utf-8")
        self.driver = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.driver)
        self.model: Any = None
        self.steps: Steps | None = None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load the model."""
        self.model = self.driver.load(request["model"])
        return {"workloads": [w for w in request["workloads"] if hasattr(self.driver, w)]}

    def begin(self, request: dict[str, Any]) -> dict[str, Any]:
        """Get ready for a workload: `workload`, `tokens` (a file), `out`, `batch`; `whole`: no reports in between."""
        with suppress(OSError):  # the peak of this workload alone
            Path("/proc/self/clear_refs").write_text("5")
        self.steps = (
            Paced if getattr(self.driver, "PACED", False) and not request.get("whole") else Steps
        )(self.driver, self.model, request)
        return {"lines": lines_of_code(self.source, request["workload"])}

    def step(self, request: dict[str, Any]) -> dict[str, Any]:
        """Capture all sequences once; return the seconds."""
        assert self.steps is not None
        return {**self.steps.step(), "out": self.steps.place()}

    def read(self, request: dict[str, Any]) -> dict[str, Any]:
        """Read `places` (site, layer, sequence, position) from `out` and save them to `into`; return the seconds."""
        values: dict[str, Any] = {}
        seconds = []
        for i, place in enumerate(request["places"]):
            start = time.perf_counter()
            try:
                value = np.asarray(self.driver.read(request["out"], *place, request["batch"]))
            except Exception as error:
                if not request.get("missing"):
                    raise
                values[f"{i}"] = np.asarray(str(error))
                continue
            seconds.append(time.perf_counter() - start)
            values[f"{i}"] = value
        np.savez(request["into"], **values)
        return {"seconds": seconds}

    def peak(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the peak memory of this process."""
        return {"bytes": peak_bytes()}


def main(path: str) -> None:
    """Answer commands until the input ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(function: Callable[[], dict[str, Any]]) -> None:
        try:
            result = function()
        except BaseException as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()

    server: list[Server] = []

    def start() -> dict[str, Any]:
        server.append(Server(path))
        return {}

    answer(start)
    for line in sys.stdin:
        request = json.loads(line)
        answer(lambda request=request: getattr(server[0], request.pop("do"))(request))  # type: ignore[misc]


if __name__ == "__main__":
    main(sys.argv[1])
