"""What a worker does for each kind of job: say what it will cost, and do it. Documents come with resolved paths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from headwater.analysis.interventions.requests import REQUESTS
from headwater.service.documents import JsonObject
from headwater.service.jobs.interventions import plan_intervention, run_intervention
from headwater.store.ledger import Damage

if TYPE_CHECKING:
    from headwater.store.reader import Run

Document = JsonObject
Progress = Callable[..., None]
Task = Callable[[Document, Progress], Any]

MODEL_BYTES = 640 << 20  # torch itself, which analyses that run the model load


def plan_extract(document: Document, progress: Progress) -> Any:
    """Price an extraction: bytes of each array and of memory, as `headwater plan` does; refuse what cannot fit."""
    from headwater.extractor.budget import check_resources, free_disk
    from headwater.extractor.run import plan_rest, plan_run
    from headwater.store.manifest import check_target, manifest_path
    from headwater.store.place import place_of

    config = _config(document)
    out = place_of(config.out)
    check_target(out)
    # A run that goes on needs disk for its missing blocks alone.
    done = 0
    if manifest_path(out).exists():
        plan, done = plan_rest(config)
    else:
        plan = plan_run(config)
    check_resources(plan, out, done / plan.n_blocks)
    return {
        "n_sequences": plan.n_sequences,
        "seq_len": plan.geometry.seq_len,
        "block": plan.geometry.block,
        "n_blocks": plan.n_blocks,
        "committed": done,
        "arrays": plan.array_bytes(),
        "total_bytes": plan.total_bytes,
        "host_bytes": plan.host_bytes,
        "free_disk_bytes": free_disk(out),
    }


def run_extract(document: Document, progress: Progress) -> Any:
    """Extract, or go on with an extraction."""
    import headwater

    def observe(p: Any) -> None:
        progress(
            {
                "phase": p.phase,
                "done": p.done,
                "of": p.n_blocks,
                "unit": "blocks",
                "rows": p.rows,
                "n_tokens": p.n_tokens,
                "n_bytes": p.n_bytes,
                "workers": p.workers,
            },
            always=p.phase == "blocks" and p.done in (0, p.n_blocks),
        )

    run = headwater.extract(_config(document), observe)
    return {
        "n_sequences": run.manifest.n_sequences,
        "n_blocks": run.manifest.n_blocks,
        "fingerprint": run.manifest.fingerprint,
    }


def plan_analyze(document: Document, progress: Progress) -> Any:
    """Price analyses: passes over the run, bytes that they read, and memory. Those that run the model add its own."""
    from headwater.analysis.engine.scan import ONE_BY_ONE
    from headwater.analysis.engine.work import projected_bytes
    from headwater.analysis.suite.analyze import Outcome, choose, describe
    from headwater.store.reader import open_run

    run = open_run(document["run"])
    names = document["analyses"]
    options = document["options"]
    chosen = choose(names, options)
    described = describe(run, chosen, names, options, ONE_BY_ONE, Outcome())
    made = [one.prepared for one in described.values()]
    # What the first step of each analysis reads and holds; what a later one takes depends on what that finds.
    reducers = [reducer for a in made for reducer in next(a.steps())]
    sites = {site for reducer in reducers for site in reducer.sites} & set(run.sites)
    passes = max((a.passes for a in made), default=0)
    # All analyses share a pass, so the longest one's passes count, and every site in each.
    read = passes * sum(run.spec(site).stored_bytes(run.manifest.n_sequences) for site in sites)
    return {
        "passes": passes,
        "read_bytes": read,
        "host_bytes": projected_bytes(run, reducers, 1) + MODEL_BYTES,
        "n_blocks": run.manifest.n_blocks,
    }


def run_analyze(document: Document, progress: Progress) -> Any:
    """Analyse a run and save the results beside it."""
    from headwater.analysis.engine.scan import Scan, ScanProgress
    from headwater.analysis.suite.analyze import analyze
    from headwater.analysis.suite.registry import summarise

    def observe(p: ScanProgress) -> None:
        progress(
            {
                "phase": f"pass {p.at} of {p.passes}",
                "done": p.done,
                "of": p.n_blocks,
                "unit": "blocks",
            }
        )

    # Whoever cancels or stops the server loses ten seconds of reading at most.
    scan = Scan(partial=document["partial"], keep_seconds=10.0, observe=observe)
    out = analyze(
        document["run"], document["analyses"], document["options"], scan, document["again"]
    )
    return {
        "results": {name: summarise(name, dataset) for name, dataset in out.results.items()},
        "skipped": out.skipped,
    }


def plan_verify(document: Document, progress: Progress) -> Any:
    """Price a check: the bytes that it reads."""
    from headwater.store.reader import open_run

    run = open_run(document["run"])
    return {
        "read_bytes": _ledger_bytes(run),
        "host_bytes": 64 << 20,
        "n_blocks": run.manifest.n_blocks,
    }


def _ledger_bytes(run: Run) -> int:
    """Return the bytes of the blocks whose entries can be trusted; the check itself says which cannot."""
    return sum(found.n_bytes for found in run.ledger.examine() if not isinstance(found, Damage))


def run_verify(document: Document, progress: Progress) -> Any:
    """Check a run, and take damaged blocks out where that is asked for."""
    from headwater.store.lock import hold
    from headwater.store.reader import open_run
    from headwater.store.verify import repair, verify

    run = open_run(document["run"])
    total = _ledger_bytes(run)
    seen = 0

    def count(n_bytes: int) -> None:
        nonlocal seen
        seen += n_bytes
        progress({"phase": "reading", "done": seen, "of": total, "unit": "bytes"})

    report = verify(run, document["quick"], 2, count)
    fixed: list[int] = []
    if document["repair"] and report.problems:
        # As in `headwater verify --repair`: nobody may commit blocks while others are taken out.
        with hold(run.path):
            fixed = repair(run, report)
    problems = [vars(p) for p in report.problems]
    return {
        "n_files": report.n_files,
        "n_bytes": report.n_bytes,
        "n_problems": len(problems),
        # A run with one bad disk can have a problem a block; the number says how many.
        "problems": problems[:50],
        "uncommitted": fixed,
        "quick": document["quick"],
    }


def _plan_intervention(kind: str, document: Document, progress: Progress) -> Any:
    return plan_intervention(kind, document)


def _run_intervention(kind: str, document: Document, progress: Progress) -> Any:
    return run_intervention(kind, document)


def _config(document: Document) -> Any:
    from headwater.extractor.request import RunConfig

    return RunConfig(**document)


PLANS: dict[str, Task] = {
    "extract": plan_extract,
    "analyze": plan_analyze,
    "verify": plan_verify,
    **{kind: partial(_plan_intervention, kind) for kind in REQUESTS},
}
RUNS: dict[str, Task] = {
    "extract": run_extract,
    "analyze": run_analyze,
    "verify": run_verify,
    **{kind: partial(_run_intervention, kind) for kind in REQUESTS},
}
