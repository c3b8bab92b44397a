"""Turn text into token ids and back, with the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import tokenizers

from headwater.extractor.text.documents import Document
from headwater.store.place import PlaceLike, place_of
from headwater.store.reader import Run

T = TypeVar("T")

END_OF_TEXT = ("<|endoftext|>", "<eos>", "</s>")
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
LARGEST_FILE = 256 << 20
MOST_TOKENS = 10_000_000
# Pre-tokenizers that split before a space or line end, whatever stands around it.
DIVIDING = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BERT_DEFAULTS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# Classes of transformers whose files without a tokenizer.json are read, by their names without "Fast".
BYTE_LEVEL = ("GPT2", "Roberta", "Bart", "Longformer", "LED", "CodeGen", "PreTrained")
WORD_PIECES = ("Bert", "DistilBert", "Electra", "MobileBert", "PreTrained")
# Classes that take `add_prefix_space` from tokenizer_config.json, false where it is not there.
PREFIXING = ("GPT2", "Roberta", "Bart", "Longformer", "LED", "CodeGen")
FORMS = "tokenizer.json, or vocab.json and merges.txt, or vocab.txt"


class TokenizerError(ValueError):
    """A tokenizer cannot be read, or cannot take a text; the message says what to do next."""


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
        pieces = [list(self._pieces([text])) for text in texts]
        encoded = iter(self._encode([piece for parts in pieces for piece in parts]))
        return [np.concatenate([next(encoded) for _ in parts]) for parts in pieces]

    def iter_encode(self, text: str | Iterable[str]) -> Iterator[np.ndarray]:
        """Encode one long text, or its parts as they come, in growing steps; int32 arrays that make up its ids."""
        group: list[str] = []
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
        return str(_guarded(lambda: self._coder.decode(kept, skip_special_tokens=False), "decode"))

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
        encodings = _guarded(
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
            while self._divisible and (cut := CUT.search(rest, max(start + PIECE_CHARS, searched))):
                yield _bounded(rest[start : cut.start() + 1])
                start = cut.start() + 1
            rest = _bounded(rest[start:])
            searched = max(len(rest) - 1, 0)
        yield rest


def _bounded(piece: str) -> str:
    """Return a piece that the library can take at once; raise TokenizerError for a longer one."""
    if len(piece) > LONGEST_PIECE // 4 and len(piece.encode("utf-8", "replace")) > LONGEST_PIECE:
        raise TokenizerError(
            f"a stretch of {len(piece):,} characters or more ({piece[:20]!r} …) holds no place where this "
            f"tokenizer can cut it; expected at most {LONGEST_PIECE >> 20} MiB at once. Divide the document, "
            "for example into JSON lines, or put spaces or line ends into it."
        )
    return piece


def _guarded(call: Callable[[], T], what: str) -> T:
    """Call the library; its errors, and the panics of its Rust code, which are no Exceptions, become TokenizerError."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TokenizerError(
            f"the tokenizer cannot {what} this ({reason}). Its tokenizer.json is at fault, or the text is not "
            "valid Unicode; use the files that came with the model."
        ) from error


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
    folder = path.parent
    if path.is_dir():
        folder = path
    settings = _settings(folder)
    file, raw = _read_form(path, folder, settings)
    raw |= {"truncation": None, "padding": None}
    if isinstance(raw.get("model"), dict) and "dropout" in raw["model"]:
        raw["model"]["dropout"] = None
    check_work(raw, file)
    text = json.dumps(raw, ensure_ascii=False)
    try:
        coder = _guarded(lambda: tokenizers.Tokenizer.from_str(text), "be read")
    except TokenizerError as error:
        raise TokenizerError(
            f"{file} is not a tokenizer ({error.__cause__}); expected the format of the `tokenizers` library. "
            "Name the tokenizer.json itself, or download it again."
        ) from error
    if _add_declared(coder, settings, folder):
        text = str(coder.to_str())

    def find(names: Iterable[Any]) -> int | None:
        ids = (coder.token_to_id(name) for name in names if isinstance(name, str))
        return next((i for i in ids if i is not None), None)

    eos = find([_content(settings.get("eos_token")), *END_OF_TEXT])
    of_gpt2 = file.name == "vocab.json" or str(settings.get("tokenizer_class")).startswith("GPT2")
    bos = find([_content(settings.get("bos_token")), END_OF_TEXT[0] if of_gpt2 else None])
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


def _read_form(path: Path, folder: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the file that holds a tokenizer and its contents as a tokenizer.json."""
    if path.is_file() or (folder / "tokenizer.json").is_file():
        file = path
        if path.is_dir():
            file = folder / "tokenizer.json"
        return file, _prefixed(_read(file), settings)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        _check_class(folder / "vocab.json", settings, BYTE_LEVEL)
        prefix = bool(settings.get("add_prefix_space"))
        return folder / "vocab.json", _from_vocabulary(folder, prefix, _class(settings))
    if (folder / "vocab.txt").is_file():
        _check_class(folder / "vocab.txt", settings, WORD_PIECES)
        return folder / "vocab.txt", _from_word_pieces(folder / "vocab.txt", settings)
    raise TokenizerError(
        f"{folder} has no tokenizer; expected {FORMS}. Copy them there, or name another tokenizer."
    )


def _class(settings: dict[str, Any]) -> str:
    """Return the class that tokenizer_config.json names, without its ending; "" where it names none."""
    name = settings.get("tokenizer_class")
    if isinstance(name, str):
        return name.removesuffix("Fast").removesuffix("Tokenizer")
    return ""


def _check_class(file: Path, settings: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse the files of a class that makes other ids of them."""
    if (name := _class(settings)) and name not in known:
        raise TokenizerError(
            f"{file} belongs to a {settings['tokenizer_class']}, whose rules Headwater does not know; expected "
            f"one of {', '.join(known)}, or a tokenizer.json. Make one where transformers is installed: "
            "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)."
        )


def _prefixed(raw: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json with the `add_prefix_space` of its class, which transformers puts before its own."""
    split = raw.get("pre_tokenizer")
    if (
        _class(settings) in PREFIXING
        and isinstance(split, dict)
        and split.get("type") == "ByteLevel"
    ):
        raw["pre_tokenizer"] = split | {"add_prefix_space": bool(settings.get("add_prefix_space"))}
    return raw


def _settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, completed as transformers does where it lists no `added_tokens_decoder`."""
    settings = _read_beside(folder / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return settings
    settings |= _read_beside(folder / "special_tokens_map.json")
    special = {_content(token) for token in _declared(settings)}
    found: dict[str, Any] = {}
    for name, token in _read_beside(folder / "added_tokens.json").items():
        found[str(token)] = {
            "content": name,
            "special": name in special,
            "normalized": name not in special,
        }
    return settings | {"added_tokens_decoder": found}


def _declared(settings: dict[str, Any]) -> list[Any]:
    """List the special tokens that a tokenizer's settings name, as strings or as objects with `content`."""
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    own = [key for key in settings if key.endswith("_token") and key not in NAMED]
    named = [settings[key] for key in (*NAMED, *own) if settings.get(key)]
    listed = named + (extra if isinstance(extra, list) else [])
    return [token for token in listed if isinstance(_content(token), str) and _content(token)]


def _content(token: Any) -> Any:
    if isinstance(token, dict):
        return token.get("content")
    return token


def _add_declared(coder: Any, settings: dict[str, Any], folder: Path) -> bool:
    """Add what the settings declare and the tokenizer lacks; tell whether there was anything."""
    known = {str(token.content) for token in coder.get_added_tokens_decoder().values()}
    places: dict[str, int] = {}
    tokens: list[Any] = []
    try:
        listed = settings["added_tokens_decoder"].items()
        for token_id, raw in sorted(
            (int(i), raw) for i, raw in listed if _content(raw) not in known
        ):
            places[raw["content"]] = token_id
            tokens.append(_added(raw, False))
        names = known | places.keys()
        for raw in _declared(settings):
            if _content(raw) not in names:
                names.add(_content(raw))
                tokens.append(_added(raw, True))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TokenizerError(
            f"the added tokens that {folder} declares cannot be read ({error}); expected ids with objects "
            "that have `content`. Download the tokenizer's files again."
        ) from error
    if tokens:
        _guarded(lambda: coder.add_tokens(tokens), "take its added tokens")
    for name, token_id in places.items():
        if (found := coder.token_to_id(name)) != token_id:
            raise TokenizerError(
                f"{folder} gives {name!r} the id {token_id}, but it would get {found}: the ids of added tokens "
                "must follow the vocabulary without gaps. Save the tokenizer again with transformers."
            )
    return bool(tokens)


def _added(raw: Any, special: bool) -> Any:
    if not isinstance(raw, dict):
        return tokenizers.AddedToken(raw, special=True, normalized=False)
    flags = {
        name: bool(raw[name])
        for name in ("single_word", "lstrip", "rstrip", "normalized")
        if name in raw
    }
    special = special or bool(raw.get("special"))
    return tokenizers.AddedToken(raw["content"], special=special, **flags)


# What a step of a normalizer or pre-tokenizer may multiply a text's length by: by far more than trained ones do.
LONGEST_LITERAL = 64
MOST_GROWTH = 1 << 10
GROWTH = {"ByteLevel": 2, "NFD": 2, "NFKD": 4, "NFKC": 4, "Metaspace": 2}


def check_work(raw: dict[str, Any], file: Path) -> None:
    """Refuse a tokenizer whose ids or steps ask for memory or work without a bound."""
    if isinstance(raw.get("model"), dict):
        vocabulary = raw["model"].get("vocab")
    else:
        vocabulary = None
    if isinstance(vocabulary, dict):
        _check_ids(vocabulary, file)
    growth = 1
    waiting = [raw.get("normalizer"), raw.get("pre_tokenizer")]
    while waiting:
        step = waiting.pop()
        if isinstance(step, list):
            waiting += step
        if not isinstance(step, dict):
            continue
        waiting += [step.get("normalizers"), step.get("pretokenizers")]
        kind = step.get("type")
        literals = [step.get(name) for name in ("prepend", "content", "replacement")]
        size = max((len(text) for text in literals if isinstance(text, str)), default=1)
        growth *= max(size, 1) if kind == "Replace" else GROWTH.get(str(kind), 1)
        if size > LONGEST_LITERAL or growth > MOST_GROWTH:
            raise TokenizerError(
                f"{file} is not a tokenizer to encode with: its {kind} step inserts so much text that the work "
                "would have no bound. Use the tokenizer that came with the model."
            )


def _check_ids(vocabulary: dict[str, Any], file: Path) -> None:
    """Refuse ids for which the library would make a table of gigabytes: it is as long as the largest id."""
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MOST_TOKENS:
            raise TokenizerError(
                f"{file} gives the token {token[:40]!r} the id {str(number)[:40]}; expected a whole number from 0 to "
                f"{MOST_TOKENS - 1:,}. It is damaged, or no vocabulary; download it again."
            )


def _from_vocabulary(folder: Path, add_prefix_space: bool, kind: str) -> dict[str, Any]:
    """Build GPT-2's byte-level BPE from its two files; only GPT-2's own classes know `<|endoftext|>` unasked."""
    from tokenizers import decoders, models, pre_tokenizers

    paths = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    _check_ids(_read(folder / "vocab.json"), folder / "vocab.json")
    try:
        coder = _guarded(lambda: tokenizers.Tokenizer(models.BPE.from_file(*paths)), "be read")
    except TokenizerError as error:
        raise TokenizerError(
            f"vocab.json and merges.txt in {folder} are not a byte-level BPE ({error.__cause__}); expected "
            "GPT-2's format. Download both again."
        ) from error
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    coder.decoder = decoders.ByteLevel()
    if kind in ("", "GPT2", "CodeGen", "PreTrained"):
        coder.add_special_tokens(
            [name for name in END_OF_TEXT[:1] if coder.token_to_id(name) is not None]
        )
    return dict(json.loads(coder.to_str()))


def _from_word_pieces(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Build BERT's tokenizer from its list of word pieces, one a line; the special ones are those that it holds."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    lines = _read_text(path).removesuffix("\n").split("\n")
    vocabulary = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    named = BERT_DEFAULTS | {
        name: _content(settings[name]) for name in BERT_DEFAULTS if settings.get(name)
    }
    if named["unk_token"] not in vocabulary:
        raise TokenizerError(
            f"{path} does not hold {named['unk_token']!r}, which a word that it lacks becomes; expected BERT's "
            "format, one word piece a line. Name the unk_token in tokenizer_config.json."
        )
    coder = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=named["unk_token"]))
    accents = settings.get("strip_accents")
    coder.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=None if accents is None else bool(accents),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    coder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    coder.decoder = decoders.WordPiece(prefix="##")
    coder.add_special_tokens([name for name in named.values() if name in vocabulary])
    return dict(json.loads(coder.to_str()))


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


def _read_beside(path: Path) -> dict[str, Any]:
    if path.is_file():
        return _read(path)
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{path} cannot be read as JSON ({error}). Download it again."
        ) from error
    if not isinstance(raw, dict):
        raise TokenizerError(
            f"{path} holds a JSON {type(raw).__name__}, expected an object. Download it again."
        )
    return raw


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE >> 20} MiB")
        return path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read ({error}). Download it again.") from error
