"""The text of Python's standard library as tokens for the demo model: files, tokenizer, windows."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
N_CTX = 256
D_VOCAB = 4096
EXCLUDED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "turtledemo",
    "lib-dynload",
    "__phello__",
}


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
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=D_VOCAB,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer


def to_stream(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> torch.Tensor:
    """Join the tokens of all texts, with an end-of-text token after each."""
    end = tokenizer.get_vocab()[END_OF_TEXT]
    ids = [
        torch.tensor([*encoding.ids, end], dtype=torch.int16)
        for encoding in tokenizer.encode_batch(texts)
    ]
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


def spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """Pick evenly spaced windows."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def bytes_per_token(tokenizer: tokenizers.Tokenizer, windows: torch.Tensor) -> float:
    """Return how many bytes of text a predicted token of the windows stands for; end-of-text stands for none."""
    vocabulary = tokenizer.get_vocab()
    sizes = torch.tensor([len(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)])
    sizes[vocabulary[END_OF_TEXT]] = 0
    return float(sizes[windows[:, 1:]].double().mean())
