"""Pairs of prompts from JSON lines: text, or token ids, under two names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Pair:
    """Two prompts as ids, what they were called, and the other fields of their line."""

    a: list[int]
    b: list[int]
    label: str
    more: Mapping[str, Any]


def read_pairs(
    source: str | Path | Sequence[Any], names: tuple[str, str], reader: Reader
) -> list[Pair]:
    """Read pairs from a file of JSON lines, or from mappings or tuples; ValueError names the line that is wrong.

    Each has two prompts under `names`, text or lists of ids; other fields are kept.
    """
    if isinstance(source, str | Path):
        try:
            lines = Path(source).expanduser().read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--pairs {source} cannot be read ({error}); expected a file of JSON lines."
            ) from None
        numbered = [(i, text) for i, text in enumerate(lines, 1) if text.strip()]
        items = [(f"--pairs {source}, line {i}", _line(text, source, i)) for i, text in numbered]
    else:
        items = [(f"pair {i}", item) for i, item in enumerate(source)]
    if not items:
        raise ValueError(
            f"--pairs {source} holds no pairs; expected lines such as {_example(names)}."
        )
    pairs = []
    for where, item in items:
        if not isinstance(item, Mapping) and isinstance(item, Sequence) and len(item) == 2:
            item = dict(zip(names, item, strict=True))
        if not isinstance(item, Mapping) or not set(names) <= set(item):
            raise ValueError(
                f"{where} has no {' and '.join(map(repr, names))}; expected {_example(names)}."
            )
        a, b = (reader.ids(item[name], f"{where}, {name}") for name in names)
        more = {name: value for name, value in item.items() if name not in names}
        pairs.append(
            Pair(a, b, str(more.get("label", _label(item[names[0]], item[names[1]]))), more)
        )
    return pairs


def first_token(checkpoint: Checkpoint, coder: Tokenizer | None = None) -> int:
    """Return the id that --bos puts in front, as `headwater extract` does (`Tokenizer.beginning`).

    Raises ValueError where there is none; a config may name an id outside the vocabulary, which counts as none.
    """
    config = checkpoint.config
    first = config.bos_token_id
    if coder is not None:
        first = coder.beginning(config.bos_token_id, config.eos_token_id)
    if first is None:
        raise ValueError(
            f"--bos: {checkpoint.name} names no beginning-of-text token inside its vocabulary of "
            f"{checkpoint.config.d_vocab}, and no tokenizer has one. Leave --bos out, or write the id into the prompts."
        )
    return int(first)


class Reader:
    """Turn a prompt into ids, with the tokenizer of a model where it is text."""

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: str | None = None, bos: bool = False
    ) -> None:
        self._home = tokenizer or checkpoint.tokenizer
        self._config, self._coder = (
            checkpoint.config,
            None if self._home is None else load_tokenizer(self._home),
        )
        self._start = [first_token(checkpoint, self._coder)] if bos else []

    @property
    def coder(self) -> Tokenizer | None:
        """The tokenizer, where there is one."""
        return self._coder

    def ids(self, prompt: Any, where: str) -> list[int]:
        """Return the ids of text or of a list of ids; ValueError says where something is wrong."""
        if isinstance(prompt, str):
            if self._coder is None:
                raise ValueError(
                    f"{where} is text, but the model comes without a tokenizer. Name one with "
                    "--tokenizer, or write token ids."
                )
            found = self._coder.encode_batch([prompt])[0]
        elif isinstance(prompt, Sequence) and all(type(i) is int for i in prompt):
            found = list(prompt)
        else:
            raise ValueError(f"{where} is {prompt!r}; expected text or a list of token ids.")
        ids = [*self._start, *found]
        c = self._config
        if not ids or len(ids) > c.n_ctx or not all(0 <= i < c.d_vocab for i in ids):
            raise ValueError(
                f"{where} has {len(ids)} tokens; expected 1 to {c.n_ctx}, with ids from 0 to "
                f"{c.d_vocab - 1}."
            )
        return ids

    def one(self, prompt: Any, where: str) -> int:
        """Return the one token of an answer such as ' Paris'."""
        ids = [prompt] if type(prompt) is int else self.ids(prompt, where)[len(self._start) :]
        if len(ids) != 1:
            raise ValueError(
                f"{where} is {prompt!r}, {len(ids)} tokens; expected exactly one (mind the space in front)."
            )
        if not 0 <= ids[0] < self._config.d_vocab:
            raise ValueError(
                f"{where} is {ids[0]}; expected a token id from 0 to {self._config.d_vocab - 1}."
            )
        return ids[0]


def _line(text: str, source: str | Path, number: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--pairs {source}, line {number} is not JSON ({error}).") from None


def _example(names: tuple[str, str]) -> str:
    return json.dumps({names[0]: "The capital of France is", names[1]: "The capital of Italy is"})


def _label(a: Any, b: Any) -> str:
    short = [str(x) if len(str(x)) <= 24 else "…" + str(x)[-23:] for x in (a, b)]
    return f"{short[0]} → {short[1]}"
