"""Train a small GPT-2 until it has attention sinks, then go on with its optimizer's moments kept or reset.

The task is Bigram-Backcopy (Guo et al. 2024, arXiv 2410.13835): tokens follow a bigram chain, but after a trigger comes
the token before the trigger. Heads are needed after triggers only, so they learn to park on the first token elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.registry import RESULTS
from headwater.extractor.in_memory import capture
from headwater.extractor.model.forward import Model
from headwater.extractor.model.weights import Checkpoint, ModelConfig

BOS = 0
TRIGGERS = 3
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
RESETS = ("none", "first", "second", "both")
SITES = ("attn_sink", "resid_max", "resid_argmax")
N_ROWS = 32


@dataclass(frozen=True)
class Sizes:
    """The model and its training; lengths in tokens, `batch` in rows."""

    n_layer: int = 3
    n_head: int = 1
    n_embd: int = 64
    length: int = 32
    d_vocab: int = 32
    batch: int = 32
    lr: float = 3e-3
    steps: int = 600
    more: int = 100
    warmup: int = 40
    every: int = 5


class Task:
    """Bigram-Backcopy with a chain drawn from a seed; token 0 begins every row, tokens 1 to 3 are the triggers."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.random = sizes, torch.Generator().manual_seed(seed)
        draw = np.random.default_rng(seed).dirichlet(np.full(sizes.d_vocab, 0.2), sizes.d_vocab)
        draw[:, BOS] = 0
        draw[:, 1 : 1 + TRIGGERS] += 0.04
        draw[1 : 1 + TRIGGERS, 1 : 1 + TRIGGERS] = 0
        self.cumulated = torch.from_numpy((draw / draw.sum(1, keepdims=True)).cumsum(1)).float()

    def rows(self, n: int) -> torch.Tensor:
        """Draw rows, int64 [n, length]."""
        rows = torch.full((n, self.sizes.length), BOS)
        chance = torch.rand(n, self.sizes.length, generator=self.random)
        for t in range(1, self.sizes.length):
            last = rows[:, t - 1]
            drawn = torch.searchsorted(self.cumulated[last], chance[:, t, None].contiguous())[:, 0]
            drawn.clamp_(1, self.sizes.d_vocab - 1)
            copied = (last >= 1) & (last <= TRIGGERS) & (t >= 3)
            rows[:, t] = torch.where(copied, rows[:, max(t - 2, 0)], drawn)
        return rows


class Adam:
    """AdamW whose two moments have bias corrections of their own, so that either can be reset alone."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]
        self.ages = [0, 0]

    def reset(self, which: str) -> None:
        """Forget the "first" moment, the "second", "both" or "none"."""
        for at, (name, moments) in enumerate((("first", self.first), ("second", self.second))):
            if which in (name, "both"):
                self.ages[at] = 0
                for moment in moments:
                    moment.zero_()

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Update the parameters by their gradients; return the Euclidean norm of the update."""
        self.ages = [age + 1 for age in self.ages]
        first_scale, second_scale = (
            1 - beta**age for beta, age in zip(BETAS, self.ages, strict=True)
        )
        square = 0.0
        for p, m, v in zip(self.parameters, self.first, self.second, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
            update = (m / first_scale).div_((v / second_scale).sqrt_().add_(EPSILON))
            if p.ndim >= 2:
                update.add_(p, alpha=WEIGHT_DECAY)
            p.sub_(update, alpha=lr)
            square += float(update.square().sum())
        return lr * math.sqrt(square)


def make_model(sizes: Sizes, seed: int) -> Any:
    """Return the untrained model."""
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=sizes.n_layer,
            n_head=sizes.n_head,
            n_embd=sizes.n_embd,
            n_positions=sizes.length,
            vocab_size=sizes.d_vocab,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=BOS,
            eos_token_id=BOS,
        )
    )


def measure(model: Any, rows: np.ndarray) -> Row:
    """Return the largest |x| of the residual stream and the first-token share of the second-half queries."""
    config = ModelConfig.from_hf(model.config.to_dict(), "config")
    tensors = {
        name.removeprefix("transformer."): tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    checkpoint = Checkpoint("", config, {name: tensors[name] for name in config.shapes()}, "", None)
    got = capture(Model(checkpoint), rows, SITES)
    share = got.attn_sink.values[..., rows.shape[1] // 2 :].mean((1, 3))
    size = got.resid_max.values
    depth, row, position = np.unravel_index(size.argmax(), size.shape)
    return {
        "largest": float(size.max()),
        "largest_depth": int(depth),
        "largest_position": int(position),
        "largest_dimension": int(got.resid_argmax.values[depth, row, position]),
        "largest_first": float(size[:, :, 0].max()),
        "largest_rest": float(size[:, :, 1:].max()),
        "share": float(share.mean()),
        "share_max": float(share.max()),
    }


def train(
    model: Any, optimizer: Adam, task: Task, n_steps: int, warmup: int, test: torch.Tensor
) -> Iterator[Row]:
    """Train at a constant rate after a linear warm-up; yield figures every few steps, before the step is taken."""
    sizes = task.sizes
    rate = 0.0
    update = 0.0
    for step in range(n_steps + 1):
        if step % sizes.every == 0 or step == n_steps:
            with torch.no_grad():
                held_out = float(losses(model, test).mean())
            yield {"step": step, "lr": rate, "update": update, "loss": held_out} | measure(
                model, test.numpy()
            )
        if step == n_steps:
            return
        rate = sizes.lr
        if warmup:
            rate = sizes.lr * min(1.0, (step + 1) / warmup)
        loss = losses(model, task.rows(sizes.batch)).mean()
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update = optimizer.step(rate)


def losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the loss in nats of every token but the first of each row."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


def run_seed(sizes: Sizes, seed: int, write: Callable[[Row], None]) -> None:
    """Train one model from scratch, then go on from it in all eight ways, each with the same further rows."""
    task = Task(sizes, seed)
    test = task.rows(N_ROWS)
    model = make_model(sizes, seed)
    optimizer = Adam(list(model.parameters()))
    for figures in train(model, optimizer, task, sizes.steps, sizes.warmup, test):
        if figures["step"] % (4 * sizes.every) == 0 or figures["step"] == sizes.steps:
            write({"seed": seed, "reset": "scratch", "warmup": sizes.warmup} | figures)
    random = task.random.get_state()
    for reset, warmup in product(RESETS, (0, sizes.warmup)):
        task.random.set_state(random)
        again = copy.deepcopy(model)
        other = Adam(list(again.parameters()))
        other.first, other.second = (
            [m.clone() for m in moments] for moments in (optimizer.first, optimizer.second)
        )
        other.ages = list(optimizer.ages)
        other.reset(reset)
        for figures in train(again, other, task, sizes.more, warmup, test):
            write({"seed": seed, "reset": reset, "warmup": warmup} | figures)


def main(arguments: list[str] | None = None) -> None:
    """Run every seed and write one CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "train-dynamics.csv")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="one model for each"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads to compute with")
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    start = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer: Any = None

        def write(row: Row) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
            if row["step"] % 100 == 0:
                file.flush()
                print(
                    f"{time.monotonic() - start:.0f} s",
                    *(f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )

        for seed in args.seeds:
            run_seed(sizes, seed, write)


if __name__ == "__main__":
    main()
