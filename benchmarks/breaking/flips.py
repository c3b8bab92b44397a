"""Damage files of a run at random, and see whether any reader gives other values without a word.

A case flips a bit of one file, cuts it, empties it, deletes it or swaps it with another; then every reader reads what
it can. What it gives is as before, or refused with an error that says why; anything else is counted as what it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from headwater.benchmarks.breaking import faults
from headwater.benchmarks.lib.rows import Row
from headwater.store import layout, shard_file
from headwater.store.entry import LedgerError
from headwater.store.manifest import RunDamaged
from headwater.store.reader import Run, open_run
from headwater.store.writer import INTERNAL

DAMAGES = ("flip", "cut", "empty", "delete", "swap")
SHARES = (0.5, 0.1, 0.1, 0.1, 0.2)
ANALYSES = ("norms", "top")
REFUSALS = (ValueError, OSError, RunDamaged, LedgerError)
Digests = dict[str, str]
Outcomes = dict[tuple[str, str], Counter[str]]


def run(n: int, seed: int = 0) -> Outcomes:
    """Damage a small run n times; count outcomes by kind of file and by reader.

    The outcomes are "same", "refused", "wrong" (other values, silently) and "unclear" (an error of no kind that a user
    is promised).
    """
    rng = np.random.default_rng(seed)
    found: Outcomes = {}
    with tempfile.TemporaryDirectory(prefix="hw-flips-") as folder:
        whole = make_run(Path(folder))
        broken = Path(folder) / "broken" / "run"
        expected = {name: reader(open_run(whole)) for name, reader in READERS.items()}
        for _ in range(n):
            shutil.rmtree(broken.parent, ignore_errors=True)
            shutil.copytree(whole, broken)
            shutil.copytree(f"{whole}.analysis", f"{broken}.analysis")
            held = open_run(broken)
            read_values(held)
            kind = damage(broken, rng)
            for name, reader in {**READERS, "open_run, held open": read_values}.items():
                shard_file.forget_checks()  # as in a process that has read nothing yet
                outcome = _outcome(
                    reader, held if "held" in name else broken, expected[name.partition(",")[0]]
                )
                found.setdefault((kind, name), Counter())[outcome] += 1
    return found


def make_run(home: Path) -> Path:
    """Extract a run of three blocks in small shards, two of whose entries lie in a segment; analyse it once."""
    from headwater.extractor.run import extract
    from headwater.store.verify import Problem, Report, repair

    config = faults.make_case(home)
    small = mock.patch.multiple(layout, LAYER_BYTES=0, SHARD_BYTES=8 << 10, CHUNK_BYTES=3 << 10)
    with small:
        extract(config)
    path = Path(config.out)
    opened = open_run(path)
    opened.ledger.compact(least=1)
    repair(opened, Report(3, 3, 0, 0, (Problem("", "", block=2),)))
    with small:
        extract(config)
    analyses(open_run(path))
    return path


def damage(run: Path, rng: np.random.Generator) -> str:
    """Damage one file of a run or of its results; return its kind."""
    files = sorted(
        path
        for folder in (run, run.with_name(f"{run.name}.analysis"))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", ".lock")
    )
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(kind_of(path, run), []).append(path)
    kind = str(rng.choice(sorted(kinds)))
    path = kinds[kind][rng.integers(len(kinds[kind]))]
    what = str(rng.choice(DAMAGES, p=SHARES))
    data = bytearray(path.read_bytes())
    if what == "delete":
        path.unlink()
    elif what == "swap":
        others = files
        if len(kinds[kind]) > 1 and rng.random() < 0.7:
            others = kinds[kind]
        other = others[rng.integers(len(others))]
        exchanged = run.with_name("exchanged")
        other.rename(exchanged)
        if path.exists():
            path.rename(other)
        exchanged.rename(path)
    else:
        size = {"cut": int(rng.integers(len(data) + 1)), "empty": 0}.get(what, len(data))
        if what == "flip" and data:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data[:size])
    return f"{kind}: {what}"


def kind_of(path: Path, run: Path) -> str:
    """Return the kind of a file."""
    if not path.is_relative_to(run):
        return "result"
    name = path.relative_to(run).as_posix()
    first = name.partition("/")[0]
    if name.endswith("zarr.json"):
        return "zarr.json"
    if first == INTERNAL:
        return name.split("/")[1]
    if "/c/" not in name:
        return name
    if first in faults.SITES:
        if first == "pattern":
            return "shard, zstd"
        return "shard, raw"
    if first == "complete":
        return "complete"
    return "text and coordinates"


def read_values(run: Run) -> Digests:
    """Read every array of a run, captured or small, and its tokenizer."""
    small = [name.partition("/")[0] for name in run.manifest.statics if name.endswith("/zarr.json")]
    values = {name: run[name][...] for name in run}
    values |= {name: run.plain(name) for name in small if name not in values and name != "complete"}
    return _digests(values) | {
        "tokenizer": _digest((run.read_text("tokenizer.json") or "").encode())
    }


def stream(run: Run) -> Digests:
    """Stream all rows of the residual stream, in order and shuffled."""
    import headwater

    parts = {}
    for shuffle in (False, True):
        batches = list(headwater.stream(run, "resid", 64, shuffle=shuffle, index=True))
        for i, name in enumerate(("values", "index")):
            parts[f"{name} {shuffle}"] = np.concatenate([batch[i].numpy() for batch in batches])
    return _digests(parts)


def slices(run: Run) -> Digests:
    """Ask for slices as the server reads them."""
    from headwater.service.data.slices import read_slice
    from headwater.service.settings import Limits

    names = (*run.sites, "tokens", "length", "label_rank")
    return _digests(
        {name: read_slice(run, name, {"sequence": "1:9"}, False, Limits()).values for name in names}
    )


def analyses_again(run: Run) -> Digests:
    """Analyse the run anew, whatever is kept beside it."""
    return analyses(run, again=True)


def analyses(run: Run, again: bool = False) -> Digests:
    """Analyse the run, with what is kept beside it, and scan its patterns."""
    from headwater.analysis.engine.scan import analyse
    from headwater.analysis.measures.sinks import SinksAnalysis
    from headwater.analysis.suite.analyze import analyze

    found = analyze(run, ANALYSES, again=again).results | {
        "sinks": analyse(run, [SinksAnalysis().prepare(run)])[0]
    }
    return _digests(
        {
            f"{name} {variable}": values.values
            for name, one in found.items()
            for variable, values in one.items()
        }
    )


READERS: dict[str, Callable[[Run], Digests]] = {
    "open_run": read_values,
    "analyze": analyses,
    "stream": stream,
    "slices": slices,
    "analyze --again": analyses_again,  # last, since it mends results
}


def _outcome(reader: Callable[[Run], Digests], run: Run | Path, expected: Digests) -> str:
    try:
        got = reader(open_run(run) if isinstance(run, Path) else run)
    except REFUSALS:
        return "refused"
    except Exception as error:
        if os.environ.get("HEADWATER_SHOW"):
            raise
        return f"unclear ({type(error).__name__})"
    if got == expected:
        return "same"
    return "wrong"


def _digests(values: Row) -> Digests:
    return {
        name: _digest(
            repr(list(map(str, array.flat))).encode()
            if array.dtype.kind in "OUT"
            else array.tobytes()
        )
        for name, array in ((name, np.asarray(value)) for name, value in values.items())
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
