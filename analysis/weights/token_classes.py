"""What kind of thing a token is, by its string: the classes that the mix of a direction's top tokens is told in."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

CLASSES = ("word", "Word", "WORD", "piece", "number", "punctuation", "space", "other")
CONVENTIONS = (
    "token classes: word, Word, WORD: letters behind a space, by case; piece: letters without a space before them; "
    "number: digits, punctuation: ASCII signs, both with or without a space; space: whitespace alone; other: anything "
    "else, such as mixtures, special tokens and incomplete characters."
)
PATTERNS = (
    re.compile(r" [^\W\d_A-Z][^\W\d_]*"),
    re.compile(r" [A-Z][^\W\d_A-Z]*"),
    re.compile(r" [^\W\d_]+"),
    re.compile(r"[^\W\d_]+"),
    re.compile(r" ?\d+"),
    re.compile(r" ?[!-/:-@\[-`{-~]+"),
    re.compile(r"\s+"),
)
SPECIAL = re.compile(r"<\|.*\|>|<\w+>")


def classify(strings: Sequence[str]) -> np.ndarray:
    """Return the index into CLASSES of each token string: int8 [n]."""
    return np.array([_class_of(text) for text in strings], np.int8)


def _class_of(text: str) -> int:
    """Return the index of the first pattern that a string is, or that of `other`."""
    other = len(CLASSES) - 1
    # A replacement character stands for bytes that are no whole character.
    if SPECIAL.fullmatch(text) or "\ufffd" in text:
        return other
    for at, pattern in enumerate(PATTERNS):
        if pattern.fullmatch(text):
            return at
    return other


def class_shares(classes: np.ndarray) -> np.ndarray:
    """Return the share of each class over the last dimension: [..., class]."""
    shares = [(classes == i).mean(-1) for i in range(len(CLASSES))]
    return np.stack(shares, -1)
