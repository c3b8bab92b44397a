"""Extraction on a GPU to disk, against forward passes that capture nothing and against transformers' eager attention.

Every figure is a ratio within one run; extraction counts everything from token ids to the ledger entry. The limits are
measured in the same run: matrix products, the link from the device to pinned memory, and a file written with fsync.
`error` is the relative RMS error of the stored residual stream at the last depth against the forward in float64.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.benchmarks.bench_extract import (
    SIZES,
    STATISTICS,
    flops_per_token,
    make_model,
    stored_error,
)
from headwater.benchmarks.lib.measure import (
    gemm_rate,
    interleave,
    ratio,
    synchronize,
    timed,
    write_csv,
)
from headwater.benchmarks.lib.rows import Row
from headwater.extractor.block import Worker
from headwater.extractor.limits import device_bytes
from headwater.extractor.model.batch import make_batch
from headwater.extractor.model.forward import COMPUTE
from headwater.extractor.model.forward_device import KernelModel
from headwater.extractor.model.tap import NoTap
from headwater.extractor.model.weights import Checkpoint, load_checkpoint
from headwater.extractor.plan import GPU_MICRO_TOKENS, make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.text.commit import commit_text
from headwater.extractor.text.source import Source
from headwater.store.layout import tile_edge
from headwater.store.ledger import Entry, Ledger
from headwater.store.place import place_of
from headwater.store.reader import open_run

VARIANTS = {
    "residual": ("resid",),
    "statistics": STATISTICS,
    "residual + statistics": ("resid", *STATISTICS),
    "residual + patterns": ("resid", "pattern"),
}
KEYS = ("model", "compute", "seq_len", "sequences", "folder", "case")
LINK_BYTES = 256 << 20
DISK_BYTES = 1 << 30


class Extraction:
    """One block of a run, extracted again at every call."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, ids: Path, sites: tuple[str, ...], options: Any
    ) -> None:
        self.config = RunConfig(
            out=str(folder),
            model=checkpoint.name,
            tokens=str(ids),
            sites=sites,
            block=options.sequences,
            compute=options.compute,
            device=options.device,
        )
        folder.mkdir()
        source = Source(self.config, checkpoint.config, None)
        plan = make_plan(self.config, checkpoint.config, source.geometry)
        manifest = commit_text(place_of(folder), source, plan, checkpoint)
        self.plan = plan.sized(manifest.n_sequences)
        model = KernelModel(checkpoint, options.compute, options.device)
        self._worker, self._ledger = (
            Worker(folder, manifest, self.plan, model),
            Ledger(folder, manifest.fingerprint),
        )
        self.entries: list[Entry] = []

    def __call__(self) -> None:
        """Extract the block and commit it."""
        self.entries.append(self._worker.extract_block(0, len(self.entries) + 1))
        self._ledger.commit(self.entries[-1])

    def describe(self) -> Row:
        """Return what a block holds and where its seconds went, medians over the calls."""
        names = ("compute", "wait", "copy", "encode", "write", "finish")
        return {"MB": sum(self.plan.array_bytes().values()) >> 20} | {
            f"{name}_s": round(
                statistics.median(entry.seconds.get(name, 0.0) for entry in self.entries), 3
            )
            for name in names
        }


def eager_to_disk(model: Any, batches: list[torch.Tensor], folder: Path) -> Callable[[], None]:
    """Return a function that does what one does without Headwater: states and patterns to the host, numpy.save."""
    folder.mkdir()

    def capture() -> None:
        for i, ids in enumerate(batches):
            out = model(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
            for name, values in (("resid", out.hidden_states), ("pattern", out.attentions)):
                for depth, value in enumerate(values):
                    with open(folder / f"{name}-{depth}-{i}.npy", "wb") as file:
                        np.save(file, value.half().cpu().numpy())
                        os.fsync(file.fileno())

    return torch.inference_mode()(capture)


def told(name: str, case: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that calls a case and says how long it took."""
    return lambda: print(f"{name}: {timed(case):.2f} s", file=sys.stderr, flush=True)


def link_rate(device: str) -> float:
    """Return the bytes a second from the device to pinned memory, the best of five."""
    source = torch.ones(LINK_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=device != "cpu")

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        synchronize(device)

    return LINK_BYTES / min(timed(copy) for _ in range(5))


def disk_rate(folder: Path) -> float:
    """Return the bytes a second of a new file with its fsync, the best of three."""
    data = np.random.default_rng(0).integers(0, 256, DISK_BYTES // 16, dtype=np.uint8).tobytes()

    def write() -> None:
        with open(folder / "raw", "wb", buffering=0) as file:
            for _ in range(16):
                file.write(data)
            os.fsync(file.fileno())
        os.remove(folder / "raw")

    return DISK_BYTES / min(timed(write) for _ in range(3))


def run(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure everything in `folder` and return the rows of the results."""
    device = options.device
    compute = options.compute
    n = options.sequences
    length = options.seq_len
    made = make_model(folder / "model", options.size, length).transformer
    sdpa = made.to(device, COMPUTE[compute])
    checkpoint = load_checkpoint(str(folder / "model"))
    ids = np.random.default_rng(0).integers(
        0, checkpoint.config.d_vocab, (n, length), dtype=np.int32
    )
    np.save(folder / "ids.npy", ids)
    captures = {
        name: Extraction(folder / name, checkpoint, folder / "ids.npy", sites, options)
        for name, sites in VARIANTS.items()
        if name in options.cases
    }
    micro = max(options.micro // length, 1)
    parts = [ids[i : i + micro] for i in range(0, n, micro)]
    model = KernelModel(checkpoint, compute, device)
    edge = tile_edge(length)
    batches = [
        make_batch(part, np.zeros_like(part), edge).to(torch.device(device)) for part in parts
    ]
    tokens = [torch.from_numpy(part).long().to(device) for part in parts]

    def transformers_forward() -> None:
        with torch.inference_mode():
            for part in tokens:
                sdpa(part, use_cache=False)
        synchronize(device)

    def plain() -> None:
        for batch in batches:
            model.run(batch, NoTap())
        synchronize(device)

    cases: dict[str, Callable[[], Any]] = {
        "transformers": transformers_forward,
        "plain": plain,
        **captures,
    }
    if options.eager:
        eager = (
            type(made)
            .from_pretrained(folder / "model", attn_implementation="eager")
            .to(device, COMPUTE[compute])
        )
        cases["transformers eager"] = eager_to_disk(eager.train(False), tokens, folder / "eager")
    seconds = interleave({name: told(name, case) for name, case in cases.items()}, options.rounds)
    limits = {
        "gemm_TFLOPS": gemm_rate(
            micro * length,
            checkpoint.config.d_model,
            checkpoint.config.d_mlp,
            COMPUTE[compute],
            device=device,
        )
        / 1e12,
        "link_GB_s": link_rate(device) / 1e9,
        "disk_GB_s": disk_rate(folder) / 1e9,
    }
    per_token = flops_per_token(checkpoint, length, head=False)
    rows = []
    for name in cases:
        capture = captures.get(name)
        row = line(options, name, seconds, capture, per_token, limits)
        if capture is not None:
            row |= tell_memory(capture, device)
            if "resid" in VARIANTS[name]:
                row["error"] = f"{stored_error(open_run(folder / name), checkpoint):.1e}"
        rows.append(row)
    return rows


def line(
    options: argparse.Namespace,
    name: str,
    seconds: Mapping[str, list[float]],
    capture: Extraction | None,
    per_token: float,
    limits: Mapping[str, float],
) -> Row:
    """Return one row: speed, ratios, shares of the limits and where the time went."""
    rate = options.sequences * options.seq_len / statistics.median(seconds[name])
    row = {
        "model": options.size,
        "compute": options.compute,
        "seq_len": options.seq_len,
        "sequences": options.sequences,
        "rounds": options.rounds,
        "folder": options.folder or tempfile.gettempdir(),
        "case": name,
        "tokens_per_second": round(rate),
        "x_transformers": round(ratio(seconds, name, "transformers"), 3),
        "x_plain": round(ratio(seconds, name, "plain"), 3),
        "of_gemm_rate": round(rate * per_token / limits["gemm_TFLOPS"] / 1e12, 3),
        "of_link": "",
        "of_disk": "",
        **{name: round(value, 2) for name, value in limits.items()},
    }
    if capture is not None:
        speed = sum(capture.plan.array_bytes().values()) / 1e9 / statistics.median(seconds[name])
        row |= {
            "of_link": round(speed / limits["link_GB_s"], 3),
            "of_disk": round(speed / limits["disk_GB_s"], 3),
        }
        row |= capture.describe()
    return row


def tell_memory(capture: Extraction, device: str) -> dict[str, int]:
    """Return the device's peak memory over one more block, less what others hold, and what the plan projects."""
    if device == "cpu":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    capture()
    return {
        "device_MB": (torch.cuda.max_memory_allocated(device) - before) >> 20,
        "projected_device_MB": device_bytes(capture.config, capture.plan) >> 20,
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu to test this program (default: cuda)"
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--compute", choices=("fp32", "bf16", "fp16"), default="fp16")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=64, help="one block; a power of two")
    parser.add_argument(
        "--micro",
        type=int,
        default=GPU_MICRO_TOKENS,
        help="tokens of a batch of the plain forwards",
    )
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(VARIANTS))
    parser.add_argument(
        "--eager", action="store_true", help="transformers' eager attention to disk, too"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write the runs (default: a temporary folder)")
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "No CUDA device here, so nothing can be timed; --device cpu tests this program.",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = run(options, Path(folder))
    head = (
        "case",
        "tokens_per_second",
        "x_transformers",
        "x_plain",
        "of_gemm_rate",
        "of_link",
        "of_disk",
        "MB",
        "compute_s",
        "wait_s",
        "copy_s",
        "encode_s",
        "finish_s",
        "device_MB",
        "projected_device_MB",
        "error",
    )
    print(" ".join(f"{name[:12]:>{24 if name == 'case' else 12}}" for name in head))
    for row in rows:
        print(" ".join(f"{row.get(name, '')!s:>{24 if name == 'case' else 12}}" for name in head))
    print(
        f"limits: {rows[0]['gemm_TFLOPS']} TFLOP/s, link {rows[0]['link_GB_s']}, disk {rows[0]['disk_GB_s']} GB/s"
    )
    if options.save:
        print(write_csv("gpu", rows, keys=KEYS, device=options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
