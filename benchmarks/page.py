"""Make docs/performance.md and its plots from the dated CSVs in benchmarks/results, and from nothing else."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from headwater.benchmarks.lib.bars import bars
from headwater.benchmarks.registry import BENCHMARKS, RESULTS

DOCS = Path(__file__).resolve().parents[1] / "docs"
Row = Mapping[str, str]
WORKLOADS = {
    "residual": "Residual stream at all depths, T = 1024",
    "patterns": "Residual stream and every attention pattern, T = 1024",
    "statistics": "Statistics of attention only, T = 1024",
    "short": "Residual stream at all depths, T = 128",
}
GOALS = {"residual": 1.15, "statistics": 1.15, "patterns": 1.1, "short": 1.1}
LEADS = {"patterns": 1.7, "statistics": 1.4}
DATED = re.compile(r"(.+)-(\d{4}-\d{2}-\d{2})\.csv")
SECTIONS = ("peers", "limits", "survive", "store")
HEAD = """# Performance

Made by `python -m headwater.benchmarks page` from {sources} in
[benchmarks/results](../benchmarks/results). {machine}

Every figure is end to end: from token ids to files on disk, fsync included, model loading left out. Ratios are to
transformers' plain SDPA forward of the same ids, which captures and stores nothing, run before and after each capture
in the same minutes; 1.0 means that capturing and storing cost nothing. All models are random GPT-2 small in float32;
states and patterns are stored as float16, statistics as float32. What each peer stored was read back and compared with
float64 first, |a − b| ≤ 1e-4 + 1e-3 · |b|. `python -m headwater.benchmarks peers` repeats it in an environment for each
peer, which it makes; [the drivers](../benchmarks/peers/drivers) are what was run. What is not here was not
measured yet.
"""


def main(arguments: list[str]) -> int:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks page", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, default=DOCS, help="the folder of performance.md (default docs)"
    )
    options = parser.parse_args(arguments)
    for name, text in make_page(RESULTS, newest(RESULTS)).items():
        path = options.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        print(path)
    return 0


def put_table(page: Path, name: str, table: str) -> None:
    """Put a table between the lines `<!-- name -->` and `<!-- end -->` of a page; ValueError where it has no place."""
    before, mark, rest = page.read_text("utf-8").partition(f"<!-- {name} -->\n")
    if not mark:
        raise ValueError(f"{page} has no place for {name}: expected a line <!-- {name} -->.")
    after = rest.partition("<!-- end -->")[2]
    page.write_text(f"{before}{mark}{table}\n<!-- end -->{after}", "utf-8")


def newest(results: Path) -> list[str]:
    """Return the file names of the newest results of every benchmark that the page shows or lists."""
    found: dict[str, str] = {}
    for path in sorted(results.glob("*.csv")):
        if (match := DATED.fullmatch(path.name)) and match[1] in BENCHMARKS:
            found[match[1]] = path.name
    return [found[name] for name in sorted(found, key=lambda n: (n not in SECTIONS, n))]


def read(results: Path, names: Sequence[str]) -> dict[str, list[Row]]:
    """Return the rows of dated results by the name of their benchmark."""
    tables: dict[str, list[Row]] = {}
    for name in names:
        with (results / name).open(newline="", encoding="utf-8") as file:
            tables[name.rsplit("-", 3)[0]] = list(csv.DictReader(file))
    return tables


def make_page(results: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the files of the page, by path below docs, from these results."""
    tables = read(results, names)
    machines = _machines([row for rows in tables.values() for row in rows])
    sources = ", ".join(f"`{name}`" for name in names) or "no results yet"
    if machines:
        machine = f"Measured on {machines}."
    else:
        machine = ""
    parts = [HEAD.format(sources=sources, machine=machine).replace(" \n", "\n")]
    files = dict[str, str]()
    peers = tables.pop("peers", [])
    parts += [goals(peers, tables.get("extract", [])), *goals_elsewhere(results)]
    if peers:
        parts.append(behind(peers))
        for workload, title in WORKLOADS.items():
            if rows := [row for row in peers if row["workload"] == workload]:
                files[f"performance/{workload}.svg"] = plot(title, rows)
                parts.append(
                    f"## {title}\n\n![ratios](performance/{workload}.svg)\n\n{peer_table(rows)}"
                )
        parts.append(NOTES)
    for name, title in (("limits", LIMITS), ("survive", SURVIVE), ("store", STORE)):
        if rows := tables.pop(name, []):
            hidden = {"limits": (), "survive": ("sequences",), "store": ()}[name]
            parts.append(title + "\n\n" + table(rows, (*MACHINE, *hidden)))
    if rows := tables.pop("kernels", []):
        parts.append(f"{KERNELS}\n\n{kernel_table(rows)}")
    for name, rows in tables.items():
        parts.append(
            f"## {name}\n\n`python -m headwater.benchmarks {name}`\n\n{table(rows, MACHINE)}"
        )
    return {"performance.md": "\n\n".join(part.strip() for part in parts) + "\n", **files}


BETTER = {
    "x_plain": 1,
    "x_plain_without_fsync": 1,
    "peak_MB": -1,
    "MB_on_disk": -1,
    "read_ms": -1,
    "lines": -1,
}
MACHINE = ("date", "processor", "threads", "torch", "products", "gpu")
NOTES = """`no fsync` is the same ratio without the time of the fsync. Peak memory is that of the whole process, model
included. `read` is the median time to read one (layer, sequence, position) vector or row back. `lines` counts a user's
code as `ast.unparse` lays it out, without docstrings: loading, capturing, storing. SAELens stores one hook point a run,
so all depths are one pass over the model each; it was timed in one round. "Kept" means that every process, the plain
forward too, ran with MALLOC_ settings that keep freed memory, which spares the peers most of their page faults."""
LIMITS = """## Limits of the machine, in the same runs

Raw transfers of 256 MiB in pieces of 8 MiB, the best of three; matrix products of
[2048, 768] × [768, 3072], in bf16 of 256 rows."""
SURVIVE = """## After kill -9

256 sequences, residual stream, 16 at a time; killed when about a quarter, half and three quarters of the bytes were
there. A sequence is `right` when every depth reads back as in an undisturbed capture, `missing` when a read fails or
says that nothing is there, `silently wrong` otherwise. Then the same capture ran again into the same folder: `kept` is
the share of the surviving bytes that were not written again."""
KERNELS = """## Kernels on a GPU

`python -m headwater.benchmarks kernels`: microseconds of the GPU alone for 16,384 tokens; `of copy` is the share of the
copy bandwidth of the same run; `statistics` with column sums, against the same from eager attention;
[more](kernels.md)."""
STORE = """## Stores

One float16 array [sequence, 1024, 1024] in chunks of one sequence. `_x` is Headwater's speed over the store's: above 1
Headwater is faster. `vector` reads one position of one sequence."""


def kernel_table(rows: Sequence[Row]) -> str:
    """Lay out one line for each shape from one row for each case."""
    cells = {
        "pattern µs": ("pattern", "us"),
        "of copy": ("pattern", "share_of_copy"),
        "× eager": ("pattern", "x_eager"),
        "× SDPA + pattern": ("pattern", "x_sdpa_pattern"),
        "square µs": ("pattern, square", "us"),
        "statistics µs": ("statistics", "us"),
        "× eager statistics": ("statistics", "x_eager_statistics"),
        "× flash": ("statistics", "x_flash"),
        "flash µs": ("flash", "us"),
        "SDPA µs": ("sdpa", "us"),
        "residual tap µs": ("residual", "us"),
        "of copy ": ("residual", "share_of_copy"),
        "× unfused": ("residual", "x_unfused"),
    }
    shapes = dict.fromkeys((row["model"], row["n_positions"], row["dtype"]) for row in rows)
    found = {(row["model"], row["n_positions"], row["dtype"], row["case"]): row for row in rows}
    lines = []
    for shape in shapes:
        values = {
            head: found.get((*shape, case), {}).get(column, "")
            for head, (case, column) in cells.items()
        }
        lines.append(dict(zip(("model", "T", "type"), shape, strict=True)) | values)
    return table(lines, ())


def of(rows: Sequence[Row], case: str, memory: str, column: str) -> float | None:
    """Return one figure, or None where it was not measured."""
    for row in rows:
        if row["case"] == case and row["memory"] == memory and row.get(column):
            return float(row[column])
    return None


def cases(rows: Sequence[Row]) -> list[str]:
    """Return the cases in their order, without the plain forward."""
    return [name for name in dict.fromkeys(row["case"] for row in rows) if name != "plain"]


def plot(title: str, rows: Sequence[Row]) -> str:
    """Draw the ratios of one workload."""
    memories = list(dict.fromkeys(row["memory"] for row in rows))
    values = [
        (case, [of(rows, case, memory, "x_plain") for memory in memories]) for case in cases(rows)
    ]
    return bars(f"{title}: × plain forward", [f"memory {m}" for m in memories], values, 1.0)


def peer_table(rows: Sequence[Row]) -> str:
    """Lay out one workload, default and kept memory side by side."""
    heads = (
        "",
        "version",
        "stored with",
        "× plain",
        "no fsync",
        "kept: × plain",
        "tokens/s",
        "peak MB",
        "MB on disk",
        "read ms",
        "lines",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in (r for r in rows if r["memory"] == "default"):
        if row["problem"]:
            lines.append(
                f"| {row['case']} | {row['version']} | {row['storage']} | not measured: {row['problem']} |"
                + " |" * 7
            )
            continue
        kept = of(rows, row["case"], "kept", "x_plain")
        cells = [
            row["case"],
            row["version"],
            row["storage"],
            f"**{row['x_plain']}** ± {float(row['spread']) / 2:.0%}",
            row["x_plain_without_fsync"],
            "not measured" if kept is None else str(kept),
            row["tokens_per_second"],
            row["peak_MB"],
            row["MB_on_disk"],
            row["read_ms"],
            row["lines"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = next(r for r in rows if r["case"] == "plain")
    batches = sorted({f"{r['memory']} memory {r['batch']}" for r in rows if r["case"] == "plain"})
    rounds = [
        f"{r['case']} {r['rounds']}" for r in rows if r["memory"] == "default" and not r["problem"]
    ]
    note = f"{_processor(first)}; {first['sequences']} sequences; rounds: {', '.join(rounds)}; "
    note += "± is half the spread over rounds. "
    loads = [float(r["load"]) for r in rows if r.get("load")]
    if loads:
        note += f"Load average at most {max(loads):g} on {rows[0]['threads']} cores, these threads included. "
    return note + f"The plain forward's best batch: {', '.join(batches)}.\n\n" + "\n".join(lines)


def _machines(rows: Sequence[Row]) -> str:
    """Name every machine that rows were measured on, with torch's version and the day."""
    return "; ".join(
        sorted(
            {
                f"{r.get('gpu') or _processor(r)}, {r['threads']} threads, torch {r['torch']}, {r['date']}"
                for r in rows
                if "processor" in r
            }
        )
    )


def _processor(row: Row) -> str:
    products = row.get("products") or "torch"
    return row["processor"] + ("" if products == "torch" else f" by {products}")


def goals_elsewhere(results: Path) -> list[str]:
    """Say which goals are met on other machines: each has a folder of results of its own."""
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        tables = read(folder, newest(folder))
        peers = tables.get("peers", [])
        extract = tables.get("extract", [])
        parts.append(goals(peers, extract, f"The same goals on {_machines([*peers, *extract])}"))
    return parts


def goals(rows: Sequence[Row], extract: Sequence[Row], title: str = "Goals") -> str:
    """Say which goals are met: ratios to the plain forward, to the best peer where memory is kept, to GEMM."""
    lines = [f"## {title}", "", "| workload | goal | measured | |", "|---|---|---|---|"]
    for workload, goal in GOALS.items():
        mine = [row for row in rows if row["workload"] == workload]
        lines.append(
            _goal(workload, f"≥ {goal} × plain", of(mine, "headwater", "default", "x_plain"), goal)
        )
        memory = "default"
        if workload in LEADS:
            memory = "kept"
        value, name = best_peer(mine, memory)
        rival = (
            f"≥ {LEADS.get(workload, 1.0)} × the best peer ({name or 'of all'}), memory {memory}"
        )
        lines.append(
            _goal(workload, rival, round(value, 2) if name else None, LEADS.get(workload, 1.0))
        )
    of_rate = [
        float(row["of_gemm_rate"])
        for row in extract
        if (row["compute"], row["case"]) == ("fp32", "plain")
    ]
    if of_rate:
        rate = of_rate[0]
    else:
        rate = None
    lines.append(_goal("our forward, nothing captured", "≥ 0.8 of the fp32 GEMM rate", rate, 0.8))
    return "\n".join(lines)


def _goal(workload: str, goal: str, value: float | None, least: float) -> str:
    if value is None:
        return f"| {workload} | {goal} | not measured yet | |"
    return f"| {workload} | {goal} | {value} | {'met' if value >= least else '**not met**'} |"


def best_peer(rows: Sequence[Row], memory: str) -> tuple[float, str]:
    """Return Headwater's speed over that of the best peer, and its name."""
    ours = of(rows, "headwater", memory, "x_plain")
    theirs = {
        case: value
        for case in cases(rows)
        if case != "headwater" and (value := of(rows, case, memory, "x_plain")) is not None
    }
    if ours is None or not theirs:
        return 0.0, ""
    name = max(theirs, key=lambda case: theirs[case])
    return ours / theirs[name], name


def behind(rows: Sequence[Row]) -> str:
    """List every figure in which a peer is ahead of Headwater."""
    found = []
    for workload in WORKLOADS:
        for memory in ("default", "kept"):
            mine = [row for row in rows if row["workload"] == workload and row["memory"] == memory]
            for column, sign in BETTER.items():
                ours = of(mine, "headwater", memory, column)
                for case in cases(mine):
                    theirs = of(mine, case, memory, column)
                    if ours is not None and theirs is not None and sign * (theirs - ours) > 0:
                        where = f"- {workload}, memory {memory}"
                        found.append(
                            f"{where}: {case} has {column} {theirs:g}, Headwater {ours:g}."
                        )
    text = "Nowhere in these tables."
    if found:
        text = "\n".join(found)
    return f"## Where Headwater is behind a peer\n\n{text}"


def table(rows: Sequence[Row], hidden: Sequence[str]) -> str:
    """Lay out rows as they are, without the columns that say where they were measured."""
    columns = list(dict.fromkeys(c for row in rows for c in row if c not in hidden and row.get(c)))
    lines = [
        "| " + " | ".join(c.replace("_", " ") for c in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += ["| " + " | ".join(row.get(c) or "" for c in columns) + " |" for row in rows]
    return "\n".join(lines)
