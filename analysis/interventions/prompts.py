"""Pairs of prompts from JSON lines: text, or token ids, under two names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Pair:
    """Two prompts as ids, what they were called, and the other fields of their line."""

    a: list[int]
    b: list[int]
    label: str
    more: Mapping[str, object]


def read_pairs(
    source: str | Path | Sequence[object], names: tuple[str, str], reader: Reader
) -> list[Pair]:
    """Read pairs from a file of JSON lines, or from mappings or tuples; ValueError names the line that is wrong.

    Each has two prompts under `names`, text or lists of ids; other fields are kept.
    """
    if isinstance(source, str | Path):
        items = _read_lines(source)
    else:
        items = [(f"pair {i}", item) for i, item in enumerate(source)]
    if not items:
        raise ValueError(
            f"--pairs {source} holds no pairs; expected lines such as {_example(names)}."
        )
    return [_pair(item, where, names, reader) for where, item in items]


def _read_lines(file: str | Path) -> list[tuple[str, object]]:
    """Return what the lines of a file hold, each with where it stands."""
    try:
        lines = Path(file).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--pairs {file} cannot be read ({error}); expected a file of JSON lines."
        ) from None
    items = []
    for number, text in enumerate(lines, 1):
        if text.strip():
            items.append((f"--pairs {file}, line {number}", _line(text, file, number)))
    return items


def _pair(item: object, where: str, names: tuple[str, str], reader: Reader) -> Pair:
    """Read one pair: a mapping, or two prompts in a row."""
    if not isinstance(item, Mapping) and isinstance(item, Sequence) and len(item) == 2:
        item = dict(zip(names, item, strict=True))
    if not isinstance(item, Mapping) or not set(names) <= set(item):
        raise ValueError(
            f"{where} has no {' and '.join(map(repr, names))}; expected {_example(names)}."
        )
    first, second = names
    a = reader.ids(item[first], f"{where}, {first}")
    b = reader.ids(item[second], f"{where}, {second}")
    more = {name: value for name, value in item.items() if name not in names}
    label = more.get("label", f"{_short(item[first])} → {_short(item[second])}")
    return Pair(a, b, str(label), more)


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
        self._config = checkpoint.config
        self._coder: Tokenizer | None = None
        home = tokenizer or checkpoint.tokenizer
        if home is not None:
            self._coder = load_tokenizer(home)
        self._start: list[int] = []
        if bos:
            self._start = [first_token(checkpoint, self._coder)]

    @property
    def coder(self) -> Tokenizer | None:
        """The tokenizer, where there is one."""
        return self._coder

    def ids(self, prompt: object, where: str) -> list[int]:
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

    def one(self, prompt: object, where: str) -> int:
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


def _line(text: str, source: str | Path, number: int) -> object:
    try:
        found: object = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--pairs {source}, line {number} is not JSON ({error}).") from None
    return found


def _example(names: tuple[str, str]) -> str:
    return json.dumps({names[0]: "The capital of France is", names[1]: "The capital of Italy is"})


def _short(prompt: object) -> str:
    """Return a prompt, or its last 23 signs, which tell more prompts apart than the first ones do."""
    text = str(prompt)
    if len(text) <= 24:
        return text
    return "…" + text[-23:]
