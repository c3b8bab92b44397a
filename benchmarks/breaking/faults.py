"""Break runs on purpose: a small run to break, hooks into a process's disk operations, and what must hold after."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from headwater.benchmarks.lib.rows import Row
from headwater.extractor.request import RunConfig
from headwater.store.manifest import manifest_path
from headwater.store.reader import open_run
from headwater.store.verify import verify
from headwater.store.writer import INTERNAL

CHANGES = (
    "write",
    "pwrite",
    "fsync",
    "ftruncate",
    "replace",
    "rename",
    "link",
    "mkdir",
    "unlink",
    "rmdir",
)
SITES = ("resid", "pattern", "attn_entropy", "attn_argmax", "loss")
ENDED = 77
SECONDS = 120
Hook = Callable[[str, Callable[..., Any], tuple[Any, ...], Row], Any]
T = TypeVar("T")
R = TypeVar("R")


def make_model(home: Path, n_positions: int = 64, **changes: Any) -> Path:
    """Write a random GPT-2 of 2 layers, 2 heads and 32 dimensions with a byte-level tokenizer; return its directory."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from headwater.extractor.model.weights import ModelConfig

    sizes = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "n_positions": n_positions,
    }
    config = sizes | {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256} | changes
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(0)
    shapes = ModelConfig.from_hf(config, str(home)).shapes()
    save_file(
        {name: torch.randn(s, generator=random) / 4 for name, s in shapes.items()},
        home / "model.safetensors",
    )
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(home / "tokenizer.json"))
    return home


def make_case(home: Path, preset: str | None = None) -> RunConfig:
    """Write a model and a labelled text; return the request of a run of 3 blocks, the last one shorter."""
    model = make_model(home / "model")
    words = np.random.default_rng(0).integers(97, 123, (9, 20)).astype(np.uint8)
    lines = [
        json.dumps({"text": bytes(w).decode(), "kind": "ab"[i % 2], "rank": i})
        for i, w in enumerate(words)
    ]
    (home / "text.jsonl").write_text("\n".join(lines) + "\n")
    return RunConfig(
        out=str(home / "run"),
        model=str(model),
        text=(str(home / "text.jsonl"),),
        labels=("kind", "rank"),
        seq_len=20,
        sites=() if preset else SITES,
        preset=preset or "residual",
        codec="none,pattern=zstd-1",
        block=4,
        threads=1,
    )


def small_shards() -> None:
    """Cut shards and chunks so small that every way of closing them is met by a small run."""
    from headwater.store import layout

    layout.LAYER_BYTES = 0
    layout.SHARD_BYTES = 8 << 10
    layout.CHUNK_BYTES = 3 << 10


@contextmanager
def hooked(hook: Hook, calls: Sequence[str] = CHANGES) -> Iterator[None]:
    """Put `hook(name, function, args, kwargs)` in place of functions of `os`, one call at a time."""
    lock = threading.RLock()
    before = {name: getattr(os, name) for name in calls}

    def replaced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return hook(name, function, args, kwargs)

        return call

    for name, function in before.items():
        setattr(os, name, replaced(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(os, name, function)


def end_at(n: int, torn: bool = False) -> Hook:
    """Return a hook that ends the process, as a crash does, before the n-th operation (or half-way through a write)."""
    count = iter(range(sys.maxsize))

    def hook(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Row) -> Any:
        if next(count) == n:
            if torn and "write" in name:
                function(args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
            os._exit(ENDED)
        return function(*args, **kwargs)

    return hook


def fail_at(n: int, number: int, once: bool) -> Hook:
    """Return a hook that raises OSError `number` at the n-th operation `once`, or at every write from it on."""
    count = iter(range(sys.maxsize))

    def hook(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Row) -> Any:
        at = next(count)
        if at == n if once else at >= n and name in ("write", "pwrite", "mkdir"):
            raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    return hook


def count_operations(action: Callable[[], object]) -> list[str]:
    """Run an action and return the names of its disk operations in order."""
    names: list[str] = []

    def hook(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Row) -> Any:
        names.append(name)
        return function(*args, **kwargs)

    with hooked(hook):
        action()
    return names


def in_child(action: Callable[[], object]) -> int:
    """Run an action in a fork of this process and return its exit code: 0, ENDED, 1 for an exception, −signal."""
    sys.stdout.flush()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(SECONDS)
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def spread(items: Sequence[T], work: Callable[[T], R], jobs: int) -> list[R]:
    """Apply `work` to every item in `jobs` forked processes; the results keep the order of the items."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for job in range(jobs):
            if not (child := os.fork()):
                try:
                    done = pickle.dumps([work(item) for item in items[job::jobs]])
                    Path(folder, str(job)).write_bytes(done)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        parts = [iter(pickle.loads(Path(folder, str(job)).read_bytes())) for job in range(jobs)]
    return [next(parts[i % jobs]) for i in range(len(items))]


def contents(run: Path) -> dict[str, bytes]:
    """Return what a run promises: path → bytes of every file outside its bookkeeping."""
    files = {p.relative_to(run).as_posix(): p for p in run.rglob("*") if p.is_file()}
    return {
        name: p.read_bytes()
        for name, p in sorted(files.items())
        if not name.startswith(f"{INTERNAL}/")
    }


def check_survivors(run: Path, expected: dict[str, bytes]) -> None:
    """Check what a crash left: once the text is committed no file is wrong, and nothing is claimed that is missing."""
    if not manifest_path(run).exists():
        return
    opened = open_run(run)
    found = contents(run)
    for name, data in found.items():
        assert data == expected[name], f"{name} is not as in an uninterrupted run"
    for name in found:
        if name.startswith("complete/c/"):
            first, last = opened.manifest.block_range(int(name.rpartition("/")[2]))
            missing = {
                p for s in opened.manifest.arrays for p in s.block_shards(first, last)
            } - found.keys()
            assert not missing, f"{name} is there, {sorted(missing)[0]} is not"
    problems = verify(opened).problems
    assert not problems, problems


def check_with_zarr(run: Path, expected: Path) -> int:
    """Read every array by zarr-python: complete sequences are right, the others right or missing; count the arrays."""
    import zarr

    if not manifest_path(run).exists():
        return 0
    here = zarr.open_group(run, mode="r")
    there = zarr.open_group(expected, mode="r")
    complete = np.asarray(here["complete"][...])  # type: ignore[index]
    arrays = dict(here.arrays())
    for name, array in arrays.items():
        if name == "complete":
            continue
        got = np.asarray(array[...])
        right = np.asarray(there[name][...])  # type: ignore[index]
        same = (got == right) | ((got != got) & (right != right))
        if "sequence" in (array.metadata.dimension_names or ()):  # type: ignore[union-attr]
            along = array.metadata.dimension_names.index("sequence")  # type: ignore[union-attr]
            missing = (got == array.fill_value) | (
                (got != got) & (array.fill_value != array.fill_value)
            )
            done = np.moveaxis(same, along, 0)[complete]
            assert done.all(), f"{name} is wrong where complete is true"
            same = same | missing
        assert same.all(), f"{name} has values that are neither right nor missing"
    return len(arrays)
