"""Train the small GPT-2 that is packaged as the model "demo", on the text of Python's standard library."""

from __future__ import annotations

import argparse
import json
import math
import os
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
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy

END_OF_TEXT = "<|endoftext|>"
N_CTX, D_VOCAB = 256, 4096
SHAPE: dict[str, Any] = {"n_layer": 6, "n_head": 8, "n_embd": 256, "n_positions": N_CTX, "vocab_size": D_VOCAB}
EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "ensurepip", "encodings",
            "pydoc_data", "turtledemo", "lib-dynload", "__phello__"}
README = """# The demo model

A GPT-2 with {n_layer} layers, {n_head} heads and width {n_embd} ({parameters:,} parameters, stored as float16), a
context of {n_positions} tokens and its own byte-level BPE tokenizer of {vocab_size} tokens. Headwater loads it as
`demo`. It is here so that every command can be tried offline, on weights that were trained and not drawn at random.

- Trained by `benchmarks/train_demo.py` on the source text of the standard library of Python {python}: {files} files,
  {bytes:,} bytes. Every 20th file was held out. The text is under the PSF licence (PSF-2.0).
- Every training sequence begins with `<|endoftext|>` (id {end_of_text}), followed by 255 tokens of text.
- It saw {tokens:,} tokens in {minutes:.0f} minutes on a CPU ({processor}).
- Loss on held-out files: {val_loss:.3f} nats per token, {val_bits:.3f} bits per byte. On training files:
  {train_loss:.3f} nats per token.

Limits: it knows the look of Python source, not how to program, and no natural language beyond comments and
docstrings. It may repeat its training text word for word. Its activations are those of a real, but very small and
briefly trained, transformer: do not draw conclusions about GPT-2 from it.

`training.csv` has the course of the loss, `training.json` the settings, the results and what the weights show.
"""


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Return the texts of the modules below `root` in sorted order, split into training and held-out files."""
    texts = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if EXCLUDED.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            try:
                texts.append(path.read_text("utf-8"))
            except UnicodeDecodeError:
                continue
    texts = [text for text in texts if text.strip()]
    return [t for i, t in enumerate(texts) if i % 20 != 19], texts[19::20]


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer like GPT-2's, with the end-of-text token as id 0."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=D_VOCAB, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def to_stream(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> torch.Tensor:
    """Join the tokens of all texts, with an end-of-text token after each."""
    end = tokenizer.get_vocab()[END_OF_TEXT]
    ids = [torch.tensor([*encoding.ids, end], dtype=torch.int16) for encoding in tokenizer.encode_batch(texts)]
    return torch.cat(ids)


def to_windows(stream: torch.Tensor, end: int, offset: int = 0) -> torch.Tensor:
    """Cut a stream into rows of 256 tokens that all begin with the end-of-text token."""
    count = (len(stream) - N_CTX) // (N_CTX - 1)
    body = stream[offset : offset + count * (N_CTX - 1)].view(count, N_CTX - 1).long()
    return torch.nn.functional.pad(body, (1, 0), value=end)


def batch_at(stream: torch.Tensor, end: int, step: int, size: int, seed: int) -> torch.Tensor:
    """Return the batch of a step; every epoch has its own offset and order, fixed by the seed."""
    per_epoch = (len(stream) - N_CTX) // (N_CTX - 1) // size
    epoch, place = divmod(step, per_epoch)
    random = torch.Generator().manual_seed(seed * 100_003 + epoch)
    windows = to_windows(stream, end, int(torch.randint(N_CTX - 1, (), generator=random)))
    order = torch.randperm(len(windows), generator=random)
    return windows[order[place * size : (place + 1) * size]]


def token_losses(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Return the loss in nats for every token of a batch but the first of each row."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")


@torch.inference_mode()
def evaluate(model: Any, windows: torch.Tensor, size: int = 16) -> float:
    """Return the mean loss over windows in nats per token."""
    return float(torch.cat([token_losses(model, batch) for batch in torch.split(windows, size)]).mean())


def spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """Pick evenly spaced windows."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def bytes_per_token(tokenizer: tokenizers.Tokenizer, windows: torch.Tensor) -> float:
    """Return how many bytes of text a predicted token of the windows stands for; end-of-text stands for none."""
    vocabulary = tokenizer.get_vocab()
    sizes = torch.tensor([len(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)])
    sizes[vocabulary[END_OF_TEXT]] = 0
    return float(sizes[windows[:, 1:]].double().mean())


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def save_model(folder: Path, model: Any, tokenizer: tokenizers.Tokenizer, rows: list[dict[str, Any]]) -> None:
    """Write configuration, float16 weights, tokenizer and the course of training."""
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()
               if name != "lm_head.weight"}
    config = model.config.to_diff_dict() | {"architectures": ["GPT2LMHeadModel"], "dtype": "float16"}
    write(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    write(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    write(folder / "tokenizer.json", tokenizer.to_str().encode())
    lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    write(folder / "training.csv", ("\n".join(lines) + "\n").encode())


def make_model(end: int, seed: int) -> Any:
    """Return the untrained model."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**SHAPE, activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0,
                                     attn_pdrop=0.0, bos_token_id=end, eos_token_id=end)
    return transformers.GPT2LMHeadModel(config)


def make_optimizer(model: Any, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(args: argparse.Namespace, tokenizer: tokenizers.Tokenizer, stream: torch.Tensor,
          val: torch.Tensor) -> tuple[Any, list[dict[str, Any]]]:
    """Train until the steps or the minutes are used up; the learning rate follows whichever is further along."""
    end = tokenizer.get_vocab()[END_OF_TEXT]
    model = make_model(end, args.seed)
    optimizer = make_optimizer(model, args.weight_decay)
    compiled = torch.compile(model) if args.compile else model
    step, before = 0, 0.0
    rows: list[dict[str, Any]] = []
    recent: list[float] = []
    if args.resume:
        state = torch.load(args.resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, before, rows = state["step"], state["seconds"], state["rows"]
    start = time.monotonic() - before
    while True:
        seconds = time.monotonic() - start
        progress = min(1.0, max(step / args.steps, seconds / (60 * args.minutes)))
        lr = args.lr * min(1.0, (step + 1) / args.warmup) * (1 + math.cos(math.pi * progress)) / 2
        if progress == 1 or (step and step % args.validate_every == 0):
            rows.append({"step": step, "tokens": step * args.batch * N_CTX, "seconds": round(seconds, 1),
                         "lr": round(lr, 7), "train_loss": round(sum(recent) / max(1, len(recent)), 4),
                         "val_loss": round(evaluate(model, spread(val, 64)), 4)})
            print(*(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            recent = []
            save_model(args.checkpoint_dir / "latest", model, tokenizer, rows)
        if step % args.checkpoint_every == 0 or progress == 1:
            args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            part = args.checkpoint_dir / "checkpoint.part"
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                        "seconds": seconds, "rows": rows, "rng": torch.get_rng_state()}, part)
            os.replace(part, args.checkpoint_dir / f"step-{step}.pt")
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


@torch.inference_mode()
def describe(folder: Path, windows: torch.Tensor) -> dict[str, Any]:
    """Return what the saved weights show: attention to the first token, and the largest residual values by depth."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    residuals: list[torch.Tensor] = []

    def keep(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        residuals.append(inputs[0].clone())

    for module in [*model.transformer.h, model.transformer.ln_f]:
        module.register_forward_pre_hook(keep)
    attentions = model(input_ids=windows, output_attentions=True, use_cache=False).attentions
    largest = []
    for depth, residual in enumerate(residuals):
        _, position, dimension = torch.unravel_index(residual.abs().argmax(), residual.shape)
        largest.append({"depth": depth, "max_abs": round(float(residual.abs().max()), 3),
                        "dimension": int(dimension), "position": int(position),
                        "median_abs": round(float(residual.abs().median()), 4)})
    return {"windows": len(windows),
            "first_token_attention_by_layer": [round(float(a[..., 0].mean()), 4) for a in attentions],
            "largest_residual_by_depth": largest}


def processor_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "extractor" / "demo",
                        help="folder for the finished model")
    parser.add_argument("--checkpoint-dir", type=Path, required=True,
                        help="folder for checkpoints and, in latest/, the current weights")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps at most")
    parser.add_argument("--minutes", type=float, default=50, help="time limit; the learning rate reaches 0 by then")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="weight decay of the matrices")
    parser.add_argument("--validate-every", type=int, default=100, help="steps between validations")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and the order of the text")
    parser.add_argument("--float32", action="store_true", help="train in float32, without bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile, which needs a C++ compiler")
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
    print(f"{len(train_texts) + len(val_texts)} files, {size} bytes, {len(stream)} training tokens, "
          f"{len(val)} validation windows", flush=True)
    model, rows = train(args, tokenizer, stream, val)
    save_model(args.out, model, tokenizer, rows)

    saved = transformers.GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)
    val_loss, train_loss = evaluate(saved, val), evaluate(saved, spread(to_windows(stream, end), len(val)))
    settings = {name: getattr(args, name) for name in ("steps", "minutes", "batch", "lr", "warmup", "weight_decay",
                                                       "threads", "seed", "float32", "compile")}
    facts = SHAPE | {
        "settings": settings | {"betas": [0.9, 0.95], "gradient_clip": 1.0, "dropout": 0.0},
        "parameters": sum(p.numel() for p in saved.parameters()), "end_of_text": end,
        "files": len(train_texts) + len(val_texts), "held_out_files": len(val_texts), "bytes": size,
        "training_stream_tokens": len(stream), "steps_done": rows[-1]["step"], "tokens": rows[-1]["tokens"],
        "seconds": rows[-1]["seconds"], "train_loss": round(train_loss, 4), "val_loss": round(val_loss, 4),
        "train_bits_per_byte": round(train_loss / math.log(2) / bytes_per_token(tokenizer, to_windows(stream, end)), 4),
        "val_bits_per_byte": round(val_loss / math.log(2) / bytes_per_token(tokenizer, val), 4),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "processor": processor_name(), "date": datetime.now(UTC).date().isoformat(),
        "weights_show": describe(args.out, spread(val, 32)),
    }
    text = json.dumps(facts, indent=2)
    write(args.out / "training.json", (text + "\n").encode())
    write(args.out / "README.md", README.format(
        **facts, minutes=facts["seconds"] / 60, val_bits=facts["val_bits_per_byte"]).encode())
    print(text, flush=True)


if __name__ == "__main__":
    main()
