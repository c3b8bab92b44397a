"""Turn text into token ids and back, with the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tokenizers

from headwater.extractor.text.documents import Document
from headwater.extractor.tokenizer_files import (
    END_OF_TEXT,
    TokenizerError,
    add_declared,
    check_work,
    content_of,
    guarded,
    read_form,
    read_settings,
)
from headwater.store.place import PlaceLike, place_of
from headwater.store.reader import Run

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
PIECE_CHARS = 1 << 16
PIECES_PER_BATCH = 16
GROUP_CHARS = PIECE_CHARS * PIECES_PER_BATCH
CONTINUED = "·"  # shown for a token that only goes on with a character begun before it
BROKEN = "\ufffd"
MOST_PIECES = 8  # tokens that the characters begun in one of them may span
CUT = re.compile(r"\S[ \n]")
# The library keeps some 64 bytes for each byte of one piece: 16 MiB are 1 GB.
LONGEST_PIECE = 16 << 20
# Pre-tokenizers that split before a space or line end, whatever stands around it.
DIVIDING = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as the text of its tokenizer.json, and the ids of its end- and beginning-of-text tokens, if any.

    No special tokens are added around a text. One that stands inside it becomes its id where `special_tokens` is
    "ids", as in `transformers`; with "text", "<|endoftext|>" in a document is encoded as those 13 characters, so that
    text cannot forge a document border. Added words that are not special become their ids in both. Decoding shows them.
    """

    json: str = field(repr=False)
    end_of_text: int | None
    beginning_of_text: int | None = None
    special_tokens: str = "ids"

    @cached_property
    def _coder(self) -> Any:
        coder = tokenizers.Tokenizer.from_str(self.json)
        coder.encode_special_tokens = self.special_tokens == "text"
        return coder

    def declares(self, token: int) -> bool:
        """Tell whether an id is one of the tokenizer's special or added tokens, and no ordinary word."""
        return token in self._coder.get_added_tokens_decoder()

    def ending(self, stated: int | None) -> int | None:
        """Return the tokenizer's own end-of-text token, else the one that a model's configuration states.

        A configuration often keeps GPT-2's 50256 beside a tokenizer for which that is a word: what it states counts
        only where the tokenizer has it among its special or added tokens.
        """
        if self.end_of_text is not None:
            return self.end_of_text
        if stated is not None and self.declares(stated):
            return stated
        return None

    def beginning(self, stated: int | None, stated_end: int | None) -> int | None:
        """Return the tokenizer's own beginning-of-text token, else the stated one, as in `ending`, else the ending."""
        if self.beginning_of_text is not None:
            return self.beginning_of_text
        if stated is not None and self.declares(stated):
            return stated
        return self.ending(stated_end)

    @cached_property
    def d_vocab(self) -> int:
        """Return the highest id plus one, added tokens included."""
        return int(max(self._coder.get_vocab(with_added_tokens=True).values(), default=-1)) + 1

    @cached_property
    def _divisible(self) -> bool:
        """Tell whether encoding the pieces of `_pieces` one by one gives the ids of the whole text.

        GPT-2's pre-tokenizer never joins a space or line end to the character before it, nor do those of DIVIDING. An
        added token may be cut only where it holds such a place or takes the spaces behind it.
        """
        raw = json.loads(self._coder.to_str())  # whole, whatever members the file leaves out
        if any(token["rstrip"] or CUT.search(token["content"]) for token in raw["added_tokens"]):
            return False
        split = raw.get("pre_tokenizer") or {}
        normalizer = raw.get("normalizer") or {"type": None}
        if split.get("type") in DIVIDING:
            return normalizer["type"] in (None, "BertNormalizer")
        return bool(
            normalizer["type"] is None
            and split.get("type") == "ByteLevel"
            and split.get("use_regex", True)
            and not split.get("add_prefix_space")
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts in parallel."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts in parallel, long ones in pieces; int32 [n_tokens] for each."""
        # All pieces of all texts go to the library in one call, which shares them among its threads.
        pieces = [list(self._pieces([text])) for text in texts]
        encoded = iter(self._encode([piece for parts in pieces for piece in parts]))
        return [np.concatenate([next(encoded) for _ in parts]) for parts in pieces]

    def iter_encode(self, text: str | Iterable[str]) -> Iterator[np.ndarray]:
        """Encode one long text, or its parts as they come, in growing steps; int32 arrays that make up its ids."""
        group: list[str] = []
        # Groups of 1, 2, 4, … pieces: who wants only the beginning of a long text waits for one piece, who wants all of
        # it gets whole batches soon.
        n = 1
        for piece in self._pieces([text] if isinstance(text, str) else text):
            group.append(piece)
            if len(group) >= n or len(piece) > GROUP_CHARS:
                yield np.concatenate(self._encode(group))
                group = []
                n = min(2 * n, PIECES_PER_BATCH)
        if group:
            yield np.concatenate(self._encode(group))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; negative ones, which are padding, are left out."""
        kept = [int(i) for i in ids if i >= 0]
        return str(guarded(lambda: self._coder.decode(kept, skip_special_tokens=False), "decode"))

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Return one string for each id: its text, or its vocabulary entry where its bytes are part of a character.

        Padding (negative) gives "", an id outside the vocabulary "<id>".
        """
        return [self._token_string(int(i)) for i in ids]

    def _token_string(self, token: int) -> str:
        entry = ""
        if token >= 0:
            entry = self._coder.id_to_token(token)
        if not entry:
            if entry is None:
                return f"<{token}>"
            return ""
        text = self.decode([token])
        if not text or "\ufffd" in text:
            return entry
        return text

    def text_strings(self, ids: Iterable[int]) -> list[str]:
        """Return one string for each token of a text, in order: the characters that begin in it, whole.

        A token that begins none, being the rest of a character, gives CONTINUED; bytes that make no character with
        their neighbours, as at a cut, give U+FFFD. Padding and unknown ids are as in `token_strings`.
        """
        tokens = [int(i) for i in ids]
        alone = self.token_strings(tokens)
        strings: list[str] = []
        while len(strings) < len(tokens):
            at = len(strings)
            # Some bytes of a character are tokens of their own in a byte-level vocabulary; together they decode to it.
            strings += self._joined(tokens[at : at + MOST_PIECES]) or [
                BROKEN if self.is_piece(tokens[at]) else alone[at]
            ]
        return strings

    def is_piece(self, token: int) -> bool:
        """Tell whether a token is a part of a character by itself."""
        known = token >= 0 and self._coder.id_to_token(token) is not None
        return known and BROKEN in self.decode([token])

    def _joined(self, tokens: Sequence[int]) -> list[str]:
        """Return strings for the fewest of several pieces that make whole characters; none where no number does.

        The last character so far counts as begun while its bytes are not all there: they decode to one U+FFFD.
        """
        begun: list[int] = []
        for n in range(1, len(tokens) + 1):
            if not self.is_piece(tokens[n - 1]):
                return []
            text = self.decode(tokens[:n])
            begun.append(len(text))
            if BROKEN not in text:
                edges = zip([0, *begun], begun, strict=False)
                return [text[low:high] or CONTINUED for low, high in edges]
        return []

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = guarded(
            lambda: self._coder.encode_batch_fast(texts, add_special_tokens=False), "encode"
        )
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _pieces(self, parts: Iterable[str]) -> Iterator[str]:
        """Cut the text that `parts` make up where that does not change its ids; at least one piece, even if empty."""
        rest = ""
        searched = 0
        for part in parts:
            rest += part
            start = 0
            # Cut at the first good place after PIECE_CHARS; what was searched in vain is not searched again when the
            # next part comes, or a text without such a place would take quadratic time.
            while self._divisible and (cut := CUT.search(rest, max(start + PIECE_CHARS, searched))):
                yield _bounded(rest[start : cut.start() + 1])
                start = cut.start() + 1
            rest = _bounded(rest[start:])
            # A place to cut is two characters, and the second may be the next part's first.
            searched = max(len(rest) - 1, 0)
        yield rest


def _bounded(piece: str) -> str:
    """Return a piece that the library can take at once; raise TokenizerError for a longer one."""
    # A character has at most four bytes, so that shorter pieces need no count.
    if len(piece) > LONGEST_PIECE // 4 and len(piece.encode("utf-8", "replace")) > LONGEST_PIECE:
        raise TokenizerError(
            f"a stretch of {len(piece):,} characters or more ({piece[:20]!r} …) holds no place where this "
            f"tokenizer can cut it; expected at most {LONGEST_PIECE >> 20} MiB at once. Divide the document, "
            "for example into JSON lines, or put spaces or line ends into it."
        )
    return piece


def load_tokenizer(source: PlaceLike, special_tokens: str = "ids") -> Tokenizer:
    """Load a tokenizer.json, a directory with one of FORMS, or the tokenizer of a hub id.

    Truncation, padding and BPE dropout are turned off. Special tokens and added words are those that transformers
    finds: in tokenizer.json, in tokenizer_config.json, and, where that lists no `added_tokens_decoder`, in
    special_tokens_map.json and added_tokens.json. The end-of-text token is the `eos_token` they declare, else one of
    END_OF_TEXT; the beginning-of-text token is their `bos_token`, else GPT-2's in a tokenizer of GPT-2's class. Raises
    TokenizerError for what is missing or unreadable, and for steps whose work would have no bound.
    """
    place = place_of(source)
    if place.local is None:
        with TemporaryDirectory() as here:
            copy = Path(here) / "tokenizer.json"
            copy.write_bytes(place.read_bytes())
            return load_tokenizer(copy, special_tokens)
    path = place.local.expanduser()
    if not path.exists():
        if not isinstance(source, str) or not HUB_ID.fullmatch(source) or path.suffix == ".json":
            raise TokenizerError(
                f"there is no tokenizer at {str(source)!r}; expected a tokenizer.json, a directory with "
                "one, or a hub id such as 'gpt2'. Check the path."
            )
        path = _download(source)
    # Settings lie beside a tokenizer.json, or in the directory that was named.
    folder = path.parent
    if path.is_dir():
        folder = path
    settings = read_settings(folder)
    file, raw = read_form(path, folder, settings)
    # Encoding must give every token of a text, the same ones each time.
    raw |= {"truncation": None, "padding": None}
    if isinstance(raw.get("model"), dict) and "dropout" in raw["model"]:
        raw["model"]["dropout"] = None
    check_work(raw, file)
    text = json.dumps(raw, ensure_ascii=False)
    try:
        coder = guarded(lambda: tokenizers.Tokenizer.from_str(text), "be read")
    except TokenizerError as error:
        raise TokenizerError(
            f"{file} is not a tokenizer ({error.__cause__}); expected the format of the `tokenizers` library. "
            "Name the tokenizer.json itself, or download it again."
        ) from error
    if add_declared(coder, settings, folder):
        text = str(coder.to_str())

    def find(names: Iterable[Any]) -> int | None:
        ids = (coder.token_to_id(name) for name in names if isinstance(name, str))
        return next((i for i in ids if i is not None), None)

    eos = find([content_of(settings.get("eos_token")), *END_OF_TEXT])
    of_gpt2 = file.name == "vocab.json" or str(settings.get("tokenizer_class")).startswith("GPT2")
    bos = find([content_of(settings.get("bos_token")), END_OF_TEXT[0] if of_gpt2 else None])
    return Tokenizer(text, eos, bos, special_tokens)


def load_run_tokenizer(run: Run) -> Tokenizer | None:
    """Load the tokenizer that a run holds, checked against its manifest; None where it has none."""
    text = run.read_text("tokenizer.json")
    if text is None:
        return None
    return parse_tokenizer(text)


def parse_tokenizer(text: str) -> Tokenizer:
    """Make a tokenizer of the text of a tokenizer.json."""
    with TemporaryDirectory() as here:
        copy = Path(here) / "tokenizer.json"
        copy.write_text(text, "utf-8")
        return load_tokenizer(copy)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, long_chars: int = GROUP_CHARS
) -> Iterator[tuple[Document, Iterator[np.ndarray]]]:
    """Yield each document that has tokens with its ids, as int32 arrays to be joined.

    Documents up to `long_chars` are encoded together, longer ones bit by bit as their ids are asked for. Raises
    TokenizerError, naming the document, for one that the tokenizer cannot take.
    """
    for group in _groups(documents, long_chars):
        first = group[0]
        last = group[-1]
        if len(group) == 1:
            encoded = [_encode_one(first, tokenizer)]
        else:
            with _naming(first, last):
                arrays = tokenizer.encode_arrays([document.text for document in group])
            encoded = [iter([ids]) for ids in arrays]
        for document, parts in zip(group, encoded, strict=True):
            if (head := next((ids for ids in parts if len(ids)), None)) is not None:
                yield document, chain([head], parts)


def _encode_one(document: Document, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    with _naming(document, document):
        if document.ids is not None:
            yield document.ids
        else:
            yield from tokenizer.iter_encode(chain([document.text], document.more))


@contextmanager
def _naming(first: Document, last: Document) -> Iterator[None]:
    """Name the documents in the tokenizer's errors."""
    try:
        yield
    except TokenizerError as error:
        where = f"{first.source}, row {first.row}"
        if last is not first:
            where += f", to {last.source}, row {last.row}"
        raise TokenizerError(f"{where}: {error}") from error


def _groups(documents: Iterable[Document], long_chars: int) -> Iterator[list[Document]]:
    """Gather short documents, GROUP_CHARS at most, for the tokenizer's threads; a long one comes alone.

    A long one is given out before the next is asked for, since the rest of its text may still lie in its file.
    """
    group: list[Document] = []
    room = GROUP_CHARS
    for document in documents:
        size = len(document.text)
        alone = size > long_chars or document.more != () or document.ids is not None
        if group and (size > room or alone):
            yield group
            group = []
            room = GROUP_CHARS
        if alone:
            yield [document]
        else:
            group.append(document)
            room -= size
    if group:
        yield group


def _download(name: str) -> Path:
    """Fetch the tokenizer of a hub id into the hub's cache, or find it there; return its folder."""
    from headwater.extractor.model import hub

    try:
        return hub.locate(name)
    except ValueError as error:
        raise TokenizerError(
            f"there is no file or directory {name!r}, and the tokenizer of a hub model of that name "
            f"cannot be fetched: {error}"
        ) from error
