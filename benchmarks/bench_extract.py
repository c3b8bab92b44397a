"""Extraction to disk against forward passes that capture nothing: ours, and transformers' with SDPA.

Every figure is a ratio within one run. Extraction counts everything from token ids to the ledger entry: compute,
cast, write, fsync, rename. What has the loss is compared with transformers' forward with its unembedding, `head`; all
else without it. `error` is the relative RMS error of the stored residual stream at the last depth against
the forward in float64; float16, in which it is stored, has 2e-4 of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.benchmarks.lib.measure import gemm_rate, interleave, ratio, write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.extractor.block import Worker
from headwater.extractor.in_memory import capture
from headwater.extractor.model.batch import make_batch
from headwater.extractor.model.forward import COMPUTE, Model
from headwater.extractor.model.tap import NoTap
from headwater.extractor.model.weights import Checkpoint, load_checkpoint
from headwater.extractor.plan import make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.sites import PRESETS
from headwater.extractor.text.commit import commit_text
from headwater.extractor.text.source import Source
from headwater.store.ledger import Ledger
from headwater.store.place import place_of
from headwater.store.reader import Run, open_run

SIZES = {"tiny": (2, 4, 128, 1000), "small": (12, 12, 768, 50257), "medium": (24, 16, 1024, 50257)}
STATISTICS = tuple(s for s in PRESETS["statistics"] if s.startswith("attn_"))
VARIANTS = {
    "residual": ("resid",),
    "statistics": ("resid", *STATISTICS),
    "patterns": ("resid", "pattern"),
    "loss": ("resid", *STATISTICS, "loss"),
}
FORWARDS = ("transformers", "transformers, head", "plain")


def make_model(folder: Path, size: str, n_ctx: int) -> Any:
    """Save a random GPT-2 of a size and return transformers' model of it."""
    import transformers

    n_layer, n_head, n_embd, vocab = SIZES[size]
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab, n_positions=n_ctx
    )
    model: Any = transformers.GPT2LMHeadModel(config)
    model.train(False)
    model.save_pretrained(folder)
    return model


def extraction(
    folder: Path, checkpoint: Checkpoint, ids: Path, sites: tuple[str, ...], n: int, compute: str
) -> Callable[[], None]:
    """Return a function that extracts one block of `n` sequences and commits it."""
    config = RunConfig(
        out=str(folder),
        model=str(checkpoint.name),
        tokens=str(ids),
        sites=sites,
        block=n,
        compute=compute,
    )
    folder.mkdir()
    source = Source(config, checkpoint.config, None)
    plan = make_plan(config, checkpoint.config, source.geometry)
    manifest = commit_text(place_of(folder), source, plan, checkpoint)
    plan = plan.sized(manifest.n_sequences)
    worker = Worker(folder, manifest, plan, Model(checkpoint, compute))
    ledger = Ledger(folder, manifest.fingerprint)
    attempts = iter(range(1, 1000))
    return lambda: void(ledger.commit(worker.extract_block(0, next(attempts))))


def void(_: object) -> None:
    """Take a value and return nothing."""


def flops_per_token(checkpoint: Checkpoint, seq_len: int, head: bool) -> float:
    """Return the floating-point operations of the forward pass a token, causal attention counted once."""
    c = checkpoint.config
    weights = c.n_layer * (4 * c.d_model * c.d_model + 2 * c.d_model * c.d_mlp)
    weights += c.d_model * c.d_vocab if head else 0
    return 2 * weights + c.n_layer * 2 * c.d_model * (seq_len + 1)


def peak_memory(
    model: Path, ids: Path, out: Path, sites: tuple[str, ...], n: int, compute: str
) -> tuple[int, int]:
    """Return the peak resident bytes of a real `headwater extract`, and what its plan projected."""
    flags = [
        "--model",
        str(model),
        "--tokens",
        str(ids),
        "--sites",
        ",".join(sites),
        "--block",
        str(n),
        "--compute",
        compute,
        "--out",
        str(out),
    ]
    command = [sys.executable, "-m", "headwater"]
    plan = subprocess.run(
        [*command, "plan", *flags, "--json"], check=True, capture_output=True, text=True
    ).stdout
    code = "import sys; from headwater.benchmarks.lib.measure import peak_bytes; from headwater.cli.entry import main; "
    code += "assert main(sys.argv[1:]) == 0; print(peak_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", code, "extract", *flags], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1]), int(json.loads(plan)["host_bytes"])


def stored_error(run: Run, checkpoint: Checkpoint) -> float:
    """Return the relative RMS error of a run's first sequence at the last depth, against the forward in float64."""
    depth = checkpoint.config.n_layer
    right = capture(Model(checkpoint, "fp64"), run.tokens[:1], ["resid"], depths=str(depth))
    right = right["resid"].values[0, 0]
    wrong = run["resid"][depth, 0].astype(np.float64) - right
    return float(np.sqrt((wrong**2).mean() / (right**2).mean()))


def run(
    size: str, seq_len: int, n: int, rounds: int, folder: Path, compute: str = "fp32"
) -> list[Row]:
    """Measure everything in `folder` and return the rows of the results."""
    with_head = make_model(folder / "model", size, seq_len).to(COMPUTE[compute])
    checkpoint = load_checkpoint(str(folder / "model"))
    ids = np.random.default_rng(0).integers(
        0, checkpoint.config.d_vocab, (n, seq_len), dtype=np.int32
    )
    np.save(folder / "ids.npy", ids)
    model = Model(checkpoint, compute)
    micro = max(2048 // seq_len, 1)
    batches = [
        make_batch(ids[i : i + micro], np.zeros_like(ids[i : i + micro]))
        for i in range(0, n, micro)
    ]

    def transformers_forward(hf: Any) -> None:
        with torch.inference_mode():
            for i in range(0, n, micro):
                hf(torch.from_numpy(ids[i : i + micro]).long(), use_cache=False)

    cases: dict[str, Callable[[], Any]] = {
        "transformers": lambda: transformers_forward(with_head.transformer),
        "transformers, head": lambda: transformers_forward(with_head),
        "plain": lambda: [model.run(batch, NoTap()) for batch in batches],
    }
    for name, sites in VARIANTS.items():
        cases[name] = extraction(folder / name, checkpoint, folder / "ids.npy", sites, n, compute)
    seconds = interleave(cases, rounds)
    limit = gemm_rate(
        micro * seq_len, checkpoint.config.d_model, checkpoint.config.d_mlp, COMPUTE[compute]
    )
    rows: list[Row] = []
    for name in cases:
        best = min(seconds[name])
        head = name in ("loss", "transformers, head")
        against = "transformers"
        if head:
            against = "transformers, head"
        row = {
            "model": size,
            "compute": compute,
            "seq_len": seq_len,
            "sequences": n,
            "rounds": rounds,
            "case": name,
            "tokens_per_second": round(n * seq_len / best, 1),
            "against": against,
            "x_transformers": round(ratio(seconds, name, against), 3),
            "x_plain": round(ratio(seconds, name, "plain"), 3),
            "of_gemm_rate": round(
                flops_per_token(checkpoint, seq_len, head) * n * seq_len / best / limit, 3
            ),
            "error": "",
            "peak_MB": "",
            "projected_MB": "",
        }
        if name in VARIANTS:
            row["error"] = f"{stored_error(open_run(folder / name), checkpoint):.1e}"
            memory = folder / f"{name}-memory"
            used, projected = peak_memory(
                folder / "model", folder / "ids.npy", memory, VARIANTS[name], n, compute
            )
            row |= {"peak_MB": used >> 20, "projected_MB": projected >> 20}
            shutil.rmtree(memory)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks extract", description=__doc__
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--compute", choices=("fp32", "bf16"), default="fp32", help="of ours and of transformers'"
    )
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=16, help="one block; a power of two")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write the runs (default: a temporary folder)")
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = run(
            options.size,
            options.seq_len,
            options.sequences,
            options.rounds,
            Path(folder),
            options.compute,
        )
    head = (
        "case",
        "tokens/s",
        "× transformers",
        "× plain",
        "of GEMM rate",
        "error",
        "peak",
        "projected",
    )
    print("{:18}{:>10}{:>16}{:>9}{:>14}{:>10}{:>9}{:>11}".format(*head))
    for r in rows:
        memory = ""
        if r["peak_MB"] != "":
            memory = f"{r['peak_MB']:>6} MB{r['projected_MB']:>8} MB"
        speeds = f"{r['tokens_per_second']:>10}{r['x_transformers']:>16}{r['x_plain']:>9}{r['of_gemm_rate']:>14}"
        print(f"{r['case']:18}{speeds}{r['error']:>10}{memory}")
    if options.save:
        print(write_csv("extract", rows, keys=("compute",)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
