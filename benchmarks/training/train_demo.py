"""Train the small GPT-2 that is packaged as the model "demo", on the text of Python's standard library."""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import sysconfig
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy

from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.training.demo_card import (
    DEMO,
    N_WINDOWS,
    describe,
    processor_name,
    write,
    write_card,
)
from headwater.benchmarks.training.demo_text import (
    D_VOCAB,
    END_OF_TEXT,
    N_CTX,
    batch_at,
    bytes_per_token,
    read_corpus,
    spread,
    to_stream,
    to_windows,
    train_tokenizer,
)

SHAPE: Row = {
    "n_layer": 6,
    "n_head": 8,
    "n_embd": 256,
    "n_positions": N_CTX,
    "vocab_size": D_VOCAB,
}


def token_losses(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Return the loss in nats for every token of a batch but the first of each row."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")


@torch.inference_mode()
def evaluate(model: Any, windows: torch.Tensor, size: int = 16) -> float:
    """Return the mean loss over windows in nats per token."""
    return float(
        torch.cat([token_losses(model, batch) for batch in torch.split(windows, size)]).mean()
    )


def save_model(
    folder: Path,
    model: Any,
    tokenizer: tokenizers.Tokenizer,
    rows: list[Row],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write configuration, weights, tokenizer and the course of training."""
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    config = model.config.to_diff_dict() | {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": str(dtype).split(".")[1],
    }
    write(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    write(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    write(folder / "tokenizer.json", tokenizer.to_str().encode())
    lines = [",".join(row) for row in rows[:1]] + [",".join(map(str, row.values())) for row in rows]
    write(folder / "training.csv", "".join(f"{line}\n" for line in lines).encode())


def save_checkpoint(
    folder: Path,
    model: Any,
    tokenizer: tokenizers.Tokenizer,
    rows: list[Row],
    optimizer: torch.optim.Optimizer,
    state: Row,
) -> None:
    """Write float32 weights, which `headwater dynamics` reads, and what is needed to go on; optimizer.pt comes last."""
    save_model(folder, model, tokenizer, rows, torch.float32)
    content = io.BytesIO()
    torch.save(state | {"optimizer": optimizer.state_dict(), "rows": rows}, content)
    write(folder / "optimizer.pt", content.getvalue())


def make_model(end: int, seed: int) -> Any:
    """Return the untrained model."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        **SHAPE,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    return transformers.GPT2LMHeadModel(config)


def make_optimizer(model: Any, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(
    args: argparse.Namespace,
    tokenizer: tokenizers.Tokenizer,
    stream: torch.Tensor,
    val: torch.Tensor,
) -> tuple[Any, list[Row]]:
    """Train until the steps, or the minutes, are used up; the learning rate follows whichever is further along."""
    end = tokenizer.get_vocab()[END_OF_TEXT]
    model = make_model(end, args.seed)
    optimizer = make_optimizer(model, args.weight_decay)
    compiled = model
    if args.compile:
        compiled = torch.compile(model)
    step = 0
    before = 0.0
    rows: list[Row] = []
    recent: list[float] = []
    if args.resume:
        state = torch.load(args.resume / "optimizer.pt", weights_only=True)
        tensors = safetensors.torch.load_file(args.resume / "model.safetensors")
        model.load_state_dict(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step = state["step"]
        before = state["seconds"]
        rows = state["rows"]
    start = time.monotonic() - before
    while True:
        seconds = time.monotonic() - start
        progress = min(
            1.0, max(step / args.steps, seconds / (60 * args.minutes) if args.minutes else 0)
        )
        lr = args.lr * min(1.0, (step + 1) / args.warmup) * (1 + math.cos(math.pi * progress)) / 2
        if progress == 1 or (step and step % args.validate_every == 0):
            rows.append(
                {
                    "step": step,
                    "tokens": step * args.batch * N_CTX,
                    "seconds": round(seconds, 1),
                    "lr": round(lr, 7),
                    "train_loss": round(sum(recent) / max(1, len(recent)), 4),
                    "val_loss": round(evaluate(model, spread(val, 64)), 4),
                }
            )
            print(*(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            recent = []
            save_model(args.checkpoint_dir / "latest", model, tokenizer, rows)
        if step % args.checkpoint_every == 0 or progress == 1:
            save_checkpoint(
                args.checkpoint_dir / f"step-{step}",
                model,
                tokenizer,
                rows,
                optimizer,
                {"step": step, "seconds": seconds, "rng": torch.get_rng_state()},
            )
        if progress == 1:
            return model, rows
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            loss = token_losses(compiled, batch_at(stream, end, step, args.batch, args.seed)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        step += 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for the finished model")
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        required=True,
        help="folder for checkpoints and, in latest/, the current weights",
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=200, help="steps between checkpoints"
    )
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from, a folder step-N")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument(
        "--minutes", type=float, help="time limit; the learning rate reaches 0 by then"
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument(
        "--weight-decay", type=float, default=0.1, help="weight decay of the matrices"
    )
    parser.add_argument("--validate-every", type=int, default=100, help="steps between validations")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the initial weights and the order of the text"
    )
    parser.add_argument(
        "--float32", action="store_true", help="train in float32, without bfloat16 autocast"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="train with torch.compile, which needs a C++ compiler",
    )
    return parser.parse_args()


def main() -> None:
    """Train, save and describe the model."""
    args = parse()
    torch.set_num_threads(args.threads)
    train_texts, val_texts = read_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(train_texts)
    end = tokenizer.get_vocab()[END_OF_TEXT]
    stream = to_stream(tokenizer, train_texts)
    val = to_windows(to_stream(tokenizer, val_texts), end)
    size = sum(len(text.encode()) for text in train_texts + val_texts)
    print(
        f"{len(train_texts) + len(val_texts)} files, {size} bytes, {len(stream)} training tokens, "
        f"{len(val)} validation windows",
        flush=True,
    )
    model, rows = train(args, tokenizer, stream, val)
    save_model(args.out, model, tokenizer, rows)

    saved = transformers.GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)
    val_loss = evaluate(saved, val)
    train_loss = evaluate(saved, spread(to_windows(stream, end), len(val)))
    settings = {
        name: getattr(args, name)
        for name in (
            "steps",
            "minutes",
            "batch",
            "lr",
            "warmup",
            "weight_decay",
            "threads",
            "seed",
            "float32",
            "compile",
        )
    }
    facts = SHAPE | {
        "settings": settings | {"betas": [0.9, 0.95], "gradient_clip": 1.0, "dropout": 0.0},
        "parameters": sum(p.numel() for p in saved.parameters()),
        "end_of_text": end,
        "files": len(train_texts) + len(val_texts),
        "held_out_files": len(val_texts),
        "bytes": size,
        "training_stream_tokens": len(stream),
        "steps_done": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "seconds": rows[-1]["seconds"],
        "train_loss": round(train_loss, 4),
        "val_loss": round(val_loss, 4),
        "train_bits_per_byte": round(
            train_loss / math.log(2) / bytes_per_token(tokenizer, to_windows(stream, end)), 4
        ),
        "val_bits_per_byte": round(val_loss / math.log(2) / bytes_per_token(tokenizer, val), 4),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "weights_show": describe(args.out, spread(val, N_WINDOWS)),
    }
    write_card(args.out, facts)
    print(json.dumps(facts, indent=2), flush=True)


if __name__ == "__main__":
    main()
