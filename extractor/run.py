"""Drive a run: commit its text, compute the blocks that are missing, resume where it stopped."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from headwater.extractor.edits.grammar import read_edits
from headwater.extractor.edits.places import encode_edits
from headwater.extractor.model import hub
from headwater.extractor.model.forward_device import check_device, load_model
from headwater.extractor.model.weights import (
    Checkpoint,
    describe_source,
    load_checkpoint,
    read_config,
)
from headwater.extractor.plan import Geometry, Plan, check_resources, make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.resume import check_same, stored_request
from headwater.extractor.sites import RequestError
from headwater.extractor.text.commit import commit_text
from headwater.extractor.text.source import Source, count_rows
from headwater.extractor.tokenizer import load_tokenizer
from headwater.extractor.worker import Worker
from headwater.store.files import GONE, RunMoved, make_directories, sync_directory
from headwater.store.ledger import COMPACT_AT, Entry, Ledger
from headwater.store.lock import hold, probe
from headwater.store.manifest import (
    Manifest,
    RunError,
    check_target,
    manifest_path,
    read_manifest,
    settle,
)
from headwater.store.place import Place, place_of
from headwater.store.publish import clear_unpublished, publish
from headwater.store.reader import Run, open_run
from headwater.store.scratch import scratch_folder


@dataclass
class Progress:
    """What an observer is told: the phase, blocks and tokens done, bytes written, the newest entry, the workers."""

    phase: str
    n_blocks: int = 0
    done: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    rows: int = 0
    started: float = field(default_factory=time.perf_counter)
    entry: Entry | None = None
    workers: str = ""


Observer = Callable[[Progress], None]
Notify = Callable[[str], None]


def plan_run(config: RunConfig) -> Plan:
    """Plan a run without writing anything: its text is tokenised and counted, the weights are not read."""
    model = read_config(config.model, config.revision, config.activation)
    place = hub.locate(config.model, config.revision)
    home = hub.find_tokenizer(place.parent if place.is_file() else place)
    config = _encoded(config, home)
    source = Source(config, model, home)
    make_plan(config, model, source.geometry, 1)
    plan = make_plan(config, model, source.geometry, count_rows(source))
    notes = describe_source(place, model, config.activation)
    return replace(plan, notes=notes, text=source.layout())


def plan_rest(config: RunConfig) -> tuple[Plan, int]:
    """Plan a run whose text is committed, and count its committed blocks; its weights are not read."""
    run = place_of(config.out)
    config = stored_request(config, run)
    manifest = read_manifest(run)
    shape = Geometry(manifest.n_positions, manifest.block, manifest.micro)
    model = read_config(config.model, config.revision, config.activation)
    plan = make_plan(replace(config, block=manifest.block), model, shape, manifest.n_sequences)
    return plan, len(Ledger(run, manifest.fingerprint).committed())


def extract(config: RunConfig, observe: Observer | None = None) -> Run:
    """Make a run, or go on with the one at `config.out`; return it for reading.

    Blocks that are committed are not computed again, so a finished run is left as it is. Raises RequestError or
    RunError for a request that cannot be met, and leaves the run resumable on every other error.
    """
    observe = observe or (lambda progress: None)
    run = place_of(config.out)
    check_target(run)
    check_device(config.device)
    started = manifest_path(run).exists()
    if started:
        config = stored_request(config, run)
    checkpoint = load_checkpoint(config.model, config.revision, config.activation)
    config = _encoded(config, checkpoint.tokenizer)
    if not started:
        _check_before(config, checkpoint, run)
    elif _finished(manifest := check_same(config, checkpoint, run), run):
        observe(Progress("blocks", manifest.n_blocks, manifest.n_blocks))
        return open_run(run)
    made = _make_directory(run)
    with hold(run) as check, _threads(config.threads):
        settle(run)
        probe(run)
        if manifest_path(run).exists():
            manifest = manifest if started else check_same(config, checkpoint, run)
        else:
            text = Progress("text")

            def rows(n: int) -> None:
                text.rows = n
                observe(text)

            try:
                manifest = _commit_text(config, checkpoint, run, rows, check)
            except ValueError:
                check()  # what lies there is another's, once the lock is
                _remove_directory(run, made)
                raise
        _compute(config, checkpoint, run, manifest, observe, check)
    return open_run(run)


def _encoded(config: RunConfig, home: Path | None) -> RunConfig:
    """Write the prompts of edits as ids."""
    edits = read_edits(config.edits)
    if not any(isinstance(edit.value, str) and edit.value.startswith("text:") for edit in edits):
        return config
    place = config.tokenizer or home
    return replace(
        config, edits=encode_edits(edits, None if place is None else load_tokenizer(place))
    )


def _commit_text(
    config: RunConfig,
    checkpoint: Checkpoint,
    run: Place,
    rows: Callable[[int], None],
    check: Callable[[], None],
) -> Manifest:
    """Commit the text into the run, through a scratch directory where the run is in an object store.

    `check` raises LockedError once the lock is lost: after hours of tokenising, what was begun there is another's.
    """
    if run.remote is None:
        assert run.local is not None
        return commit_text(config, checkpoint, run.local, rows)
    with scratch_folder("hw-text-") as folder:
        (folder / "run").mkdir()
        manifest = commit_text(config, checkpoint, folder / "run", rows)
        check()
        publish(folder / "run", run.remote, manifest)
    return manifest


def _make_directory(run: Place) -> list[Path]:
    """Make the directory of a run; return the directories that were not there, the innermost first."""
    if run.local is None:
        return []
    missing = [path for path in (run.local, *run.local.parents) if not path.exists()]
    try:
        for parent in make_directories(run.local):
            sync_directory(parent)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise RunError(f"--out {run} cannot be made ({reason}). Name another directory.") from error
    if not os.access(run.local, os.W_OK | os.X_OK):
        raise RunError(
            f"--out {run} may not be written by you. Name another directory, or change its permissions."
        )
    return missing


def _remove_directory(run: Place, made: list[Path]) -> None:
    """Take back what a refused request made; `made` are the directories that were not there before."""
    if run.remote is not None:
        clear_unpublished(run.remote)
    elif run.local is not None and not manifest_path(run).exists():
        shutil.rmtree(run.local / "headwater", ignore_errors=True)
        for directory in made:
            with suppress(OSError):
                directory.rmdir()


def plan_of(config: RunConfig, checkpoint: Checkpoint, manifest: Manifest) -> Plan:
    """Rebuild the plan of a run from its manifest."""
    shape = Geometry(manifest.n_positions, manifest.block, manifest.micro)
    return make_plan(
        replace(config, block=manifest.block), checkpoint.config, shape, manifest.n_sequences
    )


def _compute(
    config: RunConfig,
    checkpoint: Checkpoint,
    run: Place,
    manifest: Manifest,
    observe: Observer,
    check: Callable[[], None],
) -> None:
    plan = plan_of(config, checkpoint, manifest)
    ledger = Ledger(run, manifest.fingerprint)
    ledger.compact()
    committed = ledger.trusted()
    progress = Progress("blocks", manifest.n_blocks, len(committed))
    observe(progress)
    missing = [block for block in plan.blocks if block not in committed]
    if not missing:
        return
    check_resources(plan, run, done=len(committed) / plan.n_blocks)
    run.clear_temporary()

    def notify(text: str) -> None:
        progress.workers = text
        observe(progress)

    compute = _in_process if config.workers == 0 and config.ray is None else _on_ray
    with closing(compute(config, checkpoint, run, manifest, missing, notify)) as entries:
        for n, entry in enumerate(entries, 1):
            check()
            if n % COMPACT_AT == 0:
                ledger.compact()
            progress.done += 1
            progress.n_tokens += entry.n_tokens
            progress.n_bytes += sum(size for size, _ in entry.files.values())
            progress.entry = entry
            observe(progress)
    if lost := set(plan.blocks) - ledger.committed().keys():
        raise RunMoved(
            f"{len(lost)} blocks of {run} were computed, but their entries in the ledger are gone: {GONE}"
        )


def _in_process(
    config: RunConfig,
    checkpoint: Checkpoint,
    run: Place,
    manifest: Manifest,
    blocks: Sequence[int],
    _: Notify,
) -> Generator[Entry, None, None]:
    """Compute and commit blocks one after another in this process."""
    plan = plan_of(config, checkpoint, manifest)
    ledger = Ledger(run, manifest.fingerprint)
    model = load_model(checkpoint, config.compute, config.device)
    worker = Worker(run, manifest, plan, model, config.on_overflow == "keep")
    tried = ledger.tried()
    try:
        for block in blocks:
            entry = worker.extract_block(block, tried.get(block, 0) + 1)
            ledger.commit(entry)
            yield entry
    finally:
        worker.close()


def _on_ray(
    config: RunConfig,
    checkpoint: Checkpoint,
    run: Place,
    manifest: Manifest,
    blocks: Sequence[int],
    notify: Notify,
) -> Generator[Entry, None, None]:
    """Compute blocks on Ray actors, which commit them themselves."""
    from headwater.extractor.cluster.pool import RayPool

    with RayPool(config, run, manifest, checkpoint, notify) as pool:
        yield from pool.run(blocks)


def _finished(manifest: Manifest, run: Place) -> bool:
    """Say whether every block is committed; raise LedgerError for an entry that cannot be trusted."""
    ledger = Ledger(run, manifest.fingerprint)
    n = manifest.n_blocks
    return len(ledger.committed()) >= n and ledger.trusted().keys() >= set(range(n))


def _check_before(config: RunConfig, checkpoint: Checkpoint, run: Place) -> None:
    """Refuse what is wrong with a request before a directory is made."""
    source = Source(config, checkpoint.config, checkpoint.tokenizer)
    check_resources(make_plan(config, checkpoint.config, source.geometry, 1), run, at_least=True)


class _threads:
    """Set torch's thread count for a while."""

    def __init__(self, n: int | None) -> None:
        self.n, self.before = n, torch.get_num_threads()

    def __enter__(self) -> None:
        if self.n:
            torch.set_num_threads(self.n)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


__all__ = ["Progress", "RequestError", "RunConfig", "extract", "plan_run"]
