"""Spoil valid inputs: bytes, JSON documents and lists of words, by a seeded generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from random import Random
from typing import Any, TypeAlias

Json: TypeAlias = Any  # what json.loads gives

# Numbers that overflow, words that leave a folder or name code, and values of the wrong kind.
EXTREMES: tuple[Json, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**30,
    -(2**63),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\x00b",
    "\ud800",
    "NaN",
    "x" * 5000,
    [],
    {},
    [[]],
    [None, "x", 1],
    {"x": {"x": 1}},
)
WORDS = (
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\xef\xbb\xbf",
    b"\xf0\x9f",
    b"{",
    b'"',
    b"\n",
    b",",
    b"9" * 40,
    b"[" * 2000,
)
DEEP = 3000  # nested lists: past Python's own recursion limit


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Return bytes with one to four places flipped, cut, doubled, overwritten or filled with hostile words."""
    spoiled = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(spoiled) + 1)
        length = min(random.choice((1, 2, 8, 64, 1024)), len(spoiled) - at)
        way = random.randrange(6)
        if way == 0 and at < len(spoiled):
            spoiled[at] ^= 1 << random.randrange(8)
        elif way == 1:
            del spoiled[at:]
        elif way == 2:
            del spoiled[at : at + length]
        elif way == 3:
            spoiled[at:at] = spoiled[at : at + length]
        elif way == 4:
            word = random.choice(WORDS)
            spoiled[at : at + len(word)] = word
        else:
            spoiled[at:at] = random.choice(WORDS)
    return bytes(spoiled)


def mutate_json(document: Json, random: Random) -> Json:
    """Return a copy of a document in which one to three members are replaced, removed, added or exchanged."""
    spoiled = json.loads(json.dumps(document))
    for _ in range(random.randint(1, 3)):
        holders = _holders(spoiled)
        if not holders:
            return deepcopy(random.choice(EXTREMES))
        holder = random.choice(holders)
        key = random.choice(_keys(holder))
        way = random.randrange(8)
        if way == 0:
            del holder[key]
        elif way == 1:
            other = random.choice(_keys(holder))
            holder[key], holder[other] = holder[other], holder[key]
        elif way == 2 and isinstance(holder, dict):
            holder["unknown"] = deepcopy(random.choice(EXTREMES))
        elif way == 3:
            holder[key] = _number_near(holder[key], random)
        elif way == 4:
            holder[key] = deepcopy(random.choice(holders))
        else:
            holder[key] = deepcopy(random.choice(EXTREMES))
    return spoiled


def json_bytes(document: Json, random: Random) -> bytes:
    """Write a document as JSON; now and then as text that a parser may not survive."""
    text = json.dumps(document)
    way = random.randrange(20)
    if way == 0:
        return mutate_bytes(text.encode(), random)
    if way == 1:
        return b"[" * DEEP + b"]" * DEEP
    return text.encode()


def mutate_words(words: Sequence[str], random: Random) -> list[str]:
    """Return a command line with words removed, doubled, exchanged or replaced; no NUL, which no shell can pass."""
    spoiled = list(words)
    for _ in range(random.choice((1, 1, 2))):
        at = 0
        if spoiled:
            at = random.randrange(len(spoiled))
        way = random.randrange(5)
        if way == 0:
            del spoiled[at : at + 1]
        elif way == 1:
            spoiled[at:at] = spoiled[at : at + 1]
        elif way == 2 and spoiled:
            spoiled[at] = mutate_text(spoiled[at], random)
        elif spoiled:
            spoiled[at] = str(random.choice(EXTREMES))
    return [word.replace("\0", "") for word in spoiled]


def mutate_text(text: str, random: Random) -> str:
    """Return text with a few characters replaced, by such as a grammar gives a meaning to."""
    characters = list(text)
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(characters) + 1)
        characters[at : at + random.randrange(3)] = random.choice(
            (
                "",
                "-",
                ":",
                ",",
                "=",
                "[",
                "]",
                " ",
                "'",
                '"',
                "\\",
                "9999999999",
                "-1",
                ".",
                "é",
                "\n",
            )
        )
    return "".join(characters)


def _holders(node: Json) -> list[Json]:
    """List every dict and list of a document that holds something."""
    found = []
    if isinstance(node, dict | list) and node:
        found.append(node)
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        found += _holders(child)
    return found


def _keys(holder: Json) -> list[Any]:
    if isinstance(holder, dict):
        return list(holder)
    return list(range(len(holder)))


def _number_near(value: Json, random: Random) -> Json:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return random.choice(EXTREMES)
    return random.choice((value + 1, value - 1, -value, value * 2**20, value * 2**40, float(value)))
