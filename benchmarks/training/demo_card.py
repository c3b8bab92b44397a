"""Say what the demo model is and what its weights show: training.json and the card beside the weights.

Run as a program, it measures the packaged weights again, on the held-out files of this machine's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.training.demo_text import (
    END_OF_TEXT,
    read_corpus,
    spread,
    to_stream,
    to_windows,
)

DEMO = Path(__file__).resolve().parents[2] / "extractor" / "demo"
N_WINDOWS = 32
SINK = 0.3
CARD = """# The demo model

A GPT-2 with {n_layer} layers, {n_head} heads and width {n_embd} ({parameters:,} parameters, stored as float16), a
context of {n_positions} tokens and its own byte-level BPE tokenizer of {vocab_size} tokens. Headwater loads it as
`demo`. It is here so that every command can be tried offline, on weights that were trained and not drawn at random.

- Trained by `benchmarks/training/train_demo.py` on the source text of the standard library of Python {python}:
  {files} files, {bytes:,} bytes. Every 20th file was held out. The text is under the PSF licence (PSF-2.0).
- Every training sequence begins with `<|endoftext|>` (id {end_of_text}), followed by 255 tokens of text.
- It saw {tokens:,} tokens in {minutes:.0f} minutes on a CPU ({processor}).
- Loss on held-out files: {val_loss:.3f} nats per token, {val_bits_per_byte:.3f} bits per byte. On training files:
  {train_loss:.3f} nats per token.

## What its attention shows

On {windows} held-out windows, queries of the second half; line breaks are tokens that begin with one, {line_breaks:.1%}
of the keys:

| layer | on the first token | its strongest head | on line breaks | its strongest head | length of values there |
|---|---|---|---|---|---|
{attention}

The last column compares that head's value vectors at line breaks with those elsewhere: ratio of mean lengths.

{verdict}

Largest |x| of the residual stream at each depth, as a multiple of the median: {ratios}.

Limits: it knows the look of Python source, not how to program, and no natural language beyond comments and
docstrings. It may repeat its training text word for word. Its activations are those of a real, but very small and
briefly trained, transformer: do not draw conclusions about GPT-2 from it.

`training.csv` has the course of the loss, `training.json` the settings, the results and what the weights show.
"""
NO_SINK = """**The first token is no attention sink here, and there is no massive activation.** What models that were
trained for longer give to their first token, this one gives to line breaks: whole heads look at little else, and their
values are shorter there. Part of that is use (the last line break tells the indentation), part may be parking; these
figures do not tell the two apart. `benchmarks/training/train_dynamics.py` trains a model whose first token is
a sink."""
SINK_THERE = "**Its first token is an attention sink**: the strongest head gives it {share:.0%} of its attention."


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


@torch.inference_mode()
def describe(folder: Path, windows: torch.Tensor) -> Row:
    """Return what saved weights show on windows: where the second half's queries look, and the largest residuals.

    By layer: the mean share of all heads, and the strongest head with its share. value_length: mean length of that
    head's value vectors at line breaks over the mean elsewhere.
    """
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    residuals: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    width = model.config.n_embd
    n_head = model.config.n_head

    def keep_residual(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        residuals.append(inputs[0].clone())

    def keep_value(module: Any, inputs: tuple[torch.Tensor, ...], qkv: torch.Tensor) -> None:
        v_BTNH = qkv[..., 2 * width :].reshape(*qkv.shape[:2], n_head, -1)
        values.append(torch.linalg.vector_norm(v_BTNH, dim=-1))

    for module in [*model.transformer.h, model.transformer.ln_f]:
        module.register_forward_pre_hook(keep_residual)
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(keep_value)
    patterns = model(input_ids=windows, output_attentions=True, use_cache=False).attentions
    half = windows.shape[1] // 2
    breaks = _line_breaks(folder)[windows]
    visible = torch.ones(windows.shape[1], windows.shape[1]).tril()[half:]
    first = [pattern[:, :, half:, 0].mean((0, 2)) for pattern in patterns]
    parked = [
        (pattern[:, :, half:] * breaks[:, None, None]).sum(-1).mean((0, 2)) for pattern in patterns
    ]
    there = [value[breaks > 0].mean(0) / value[breaks == 0].mean(0) for value in values]
    return {
        "windows": len(windows),
        "queries": "second half",
        "first_token": [_by_head(share) for share in first],
        "line_breaks": [
            _by_head(share) | {"value_length": round(float(ratio[share.argmax()]), 3)}
            for share, ratio in zip(parked, there, strict=True)
        ],
        "line_breaks_among_visible_keys": round(
            float((visible * breaks[:, None]).sum() / visible.sum() / len(windows)), 4
        ),
        "largest_residual_by_depth": [_largest(depth, x) for depth, x in enumerate(residuals)],
    }


def _by_head(share_N: torch.Tensor) -> Row:
    """Return the mean share of a layer's heads, and the strongest head with its share."""
    return {
        "share": round(float(share_N.mean()), 4),
        "strongest_head": int(share_N.argmax()),
        "strongest_share": round(float(share_N.max()), 4),
    }


def _largest(depth: int, x_BTD: torch.Tensor) -> Row:
    """Return the largest activation of one depth."""
    _, position, dimension = torch.unravel_index(x_BTD.abs().argmax(), x_BTD.shape)
    return {
        "depth": depth,
        "max_abs": round(float(x_BTD.abs().max()), 3),
        "dimension": int(dimension),
        "position": int(position),
        "median_abs": round(float(x_BTD.abs().median()), 4),
    }


def _line_breaks(folder: Path) -> torch.Tensor:
    """Return which tokens begin with a line break, 0 or 1 by id."""
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    found = torch.zeros(len(vocabulary))
    found[[index for token, index in vocabulary.items() if token.startswith("Ċ")]] = 1
    return found


def write_card(folder: Path, facts: Row) -> None:
    """Write training.json and the card."""
    shown = facts["weights_show"]
    lines = [
        f"| {layer} | {first['share']:.3f} | head {first['strongest_head']}: {first['strongest_share']:.3f} | "
        f"{rest['share']:.3f} | head {rest['strongest_head']}: {rest['strongest_share']:.3f} | "
        f"{rest['value_length']:.2f} |"
        for layer, (first, rest) in enumerate(
            zip(shown["first_token"], shown["line_breaks"], strict=True)
        )
    ]
    share = max(first["strongest_share"] for first in shown["first_token"])
    ratios = ", ".join(
        f"{at['max_abs'] / at['median_abs']:.0f}" for at in shown["largest_residual_by_depth"]
    )
    text = CARD.format(
        **facts,
        minutes=facts["seconds"] / 60,
        windows=shown["windows"],
        attention="\n".join(lines),
        line_breaks=shown["line_breaks_among_visible_keys"],
        ratios=ratios,
        verdict=SINK_THERE.format(share=share) if share >= SINK else NO_SINK,
    )
    write(folder / "training.json", (json.dumps(facts, indent=2) + "\n").encode())
    write(folder / "README.md", text.encode())


def processor_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
    else:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main() -> None:
    """Measure weights again and write their card anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=DEMO, help="the model and its training.json")
    folder = parser.parse_args().folder
    facts = json.loads((folder / "training.json").read_text("utf-8"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    held_out = to_stream(tokenizer, read_corpus(Path(sysconfig.get_path("stdlib")))[1])
    windows = to_windows(held_out, tokenizer.get_vocab()[END_OF_TEXT])
    write_card(folder, facts | {"weights_show": describe(folder, spread(windows, N_WINDOWS))})


if __name__ == "__main__":
    main()
