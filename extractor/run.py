"""Drive a run: commit its text, compute the blocks that are missing, resume where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from headwater.extractor.budget import check_resources
from headwater.extractor.directory import make_directory, remove_directory
from headwater.extractor.edits.grammar import read_edits
from headwater.extractor.edits.places import encode_edits
from headwater.extractor.model import hub
from headwater.extractor.model.forward_device import check_device
from headwater.extractor.model.weights import (
    Checkpoint,
    describe_source,
    load_checkpoint,
    read_config,
)
from headwater.extractor.plan import Plan, make_plan, plan_of
from headwater.extractor.pool import open_pool
from headwater.extractor.progress import Observer, Progress, silent
from headwater.extractor.request import RunConfig
from headwater.extractor.resume import check_same, stored_request
from headwater.extractor.sites import RequestError
from headwater.extractor.text.commit import commit_text
from headwater.extractor.text.source import Source, count_rows
from headwater.extractor.tokenizer import load_tokenizer
from headwater.store.files import GONE, RunMoved
from headwater.store.ledger import COMPACT_AT, Ledger
from headwater.store.lock import hold, probe
from headwater.store.manifest import Manifest, check_target, manifest_path, read_manifest, settle
from headwater.store.place import Place, place_of
from headwater.store.reader import Run, open_run


def extract(config: RunConfig, observe: Observer | None = None) -> Run:
    """Make a run, or go on with the one at `config.out`; return it for reading.

    Blocks that are committed are not computed again, so a finished run is left as it is. Raises RequestError or
    RunError for a request that cannot be met, and leaves the run resumable on every other error.
    """
    observe = observe or silent
    run = place_of(config.out)
    check_target(run)
    check_device(config.device)
    manifest = read_manifest(run) if manifest_path(run).exists() else None
    if manifest is not None:
        config = stored_request(config, run, manifest)
    checkpoint = load_checkpoint(config.model, config.revision, config.activation)
    config = _encoded(config, checkpoint.tokenizer)

    # What is wrong with a request is refused before a directory is made.
    if manifest is not None:
        plan = check_same(config, checkpoint, run, manifest)
        if _finished(manifest, run):
            observe(Progress("blocks", manifest.n_blocks, manifest.n_blocks))
            return open_run(run, manifest=manifest)
    else:
        source = Source(config, checkpoint.config, checkpoint.tokenizer)
        plan = make_plan(config, checkpoint.config, source.geometry)
        check_resources(plan, run, at_least=True)

    made = make_directory(run)
    with hold(run) as check, _threads(config.threads):
        settle(run)
        probe(run)
        if manifest is None and manifest_path(run).exists():  # another was first to hold the lock
            manifest = read_manifest(run)
            plan = check_same(config, checkpoint, run, manifest)
        if manifest is None:
            try:
                manifest = commit_text(run, source, plan, checkpoint, observe, check)
            except ValueError:
                check()  # what lies there is another's, once the lock is
                remove_directory(run, made)
                raise
        _compute(run, manifest, plan.sized(manifest.n_sequences), checkpoint, observe, check)
    return open_run(run, manifest=manifest)


def plan_run(config: RunConfig) -> Plan:
    """Plan a run without writing anything: its text is tokenised and counted, the weights are not read."""
    model = read_config(config.model, config.revision, config.activation)
    place = hub.locate(config.model, config.revision)
    home = hub.find_tokenizer(place.parent if place.is_file() else place)
    config = _encoded(config, home)
    source = Source(config, model, home)
    plan = make_plan(config, model, source.geometry)
    plan = plan.sized(count_rows(source))
    notes = describe_source(place, model, config.activation)
    return replace(plan, notes=notes, text=source.layout())


def plan_rest(config: RunConfig) -> tuple[Plan, int]:
    """Plan a run whose text is committed, and count its committed blocks; its weights are not read."""
    run = place_of(config.out)
    manifest = read_manifest(run)
    config = stored_request(config, run, manifest)
    model = read_config(config.model, config.revision, config.activation)
    plan = plan_of(config, model, manifest)
    return plan, len(Ledger(run, manifest.fingerprint).committed())


def _encoded(config: RunConfig, home: Path | None) -> RunConfig:
    """Write the prompts of edits as ids."""
    edits = read_edits(config.edits)
    if not any(isinstance(edit.value, str) and edit.value.startswith("text:") for edit in edits):
        return config
    place = config.tokenizer or home
    coder = None if place is None else load_tokenizer(place)
    return replace(config, edits=encode_edits(edits, coder))


def _compute(
    run: Place,
    manifest: Manifest,
    plan: Plan,
    checkpoint: Checkpoint,
    observe: Observer,
    check: Callable[[], None],
) -> None:
    """Compute and commit the blocks that are missing; `check` raises once the run's lock is lost."""
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

    with open_pool(run, manifest, plan, checkpoint, notify) as pool:
        for n, entry in enumerate(pool.run(missing), 1):
            check()
            if n % COMPACT_AT == 0:
                ledger.compact()
            progress.add(entry)
            observe(progress)
    if lost := set(plan.blocks) - ledger.committed().keys():
        raise RunMoved(
            f"{len(lost)} blocks of {run} were computed, but their entries in the ledger are gone: {GONE}"
        )


def _finished(manifest: Manifest, run: Place) -> bool:
    """Say whether every block is committed; raise LedgerError for an entry that cannot be trusted."""
    ledger = Ledger(run, manifest.fingerprint)
    n = manifest.n_blocks
    return len(ledger.committed()) >= n and ledger.trusted().keys() >= set(range(n))


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """Set torch's thread count for a while."""
    before = torch.get_num_threads()
    if n:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["Progress", "RequestError", "RunConfig", "extract", "plan_run"]
