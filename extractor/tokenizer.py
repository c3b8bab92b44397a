"""Turn text into token ids and back, with the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tokenizers

from headwater.extractor.texts import Document
from headwater.store.objects import ObjectPath
from headwater.store.place import Place

END_OF_TEXT = ("<|endoftext|>", "<eos>", "</s>")
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
PIECE_CHARS = 1 << 16
PIECES_PER_BATCH = 16
GROUP_CHARS = PIECE_CHARS * PIECES_PER_BATCH
CUT = re.compile(r"\S[ \n]")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as the text of its tokenizer.json, and the id of its end-of-text token, if it has one.

    No special tokens are added, and special tokens are not recognised inside text: "<|endoftext|>" in a document is
    encoded as those 13 characters, so that text cannot forge a document border. Decoding does show them.
    """

    json: str = field(repr=False)
    end_of_text: int | None

    @cached_property
    def _coder(self) -> Any:
        coder = tokenizers.Tokenizer.from_str(self.json)
        coder.encode_special_tokens = True
        return coder

    @cached_property
    def d_vocab(self) -> int:
        """Return the highest id plus one, added tokens included."""
        return int(max(self._coder.get_vocab(with_added_tokens=True).values(), default=-1)) + 1

    @cached_property
    def _divisible(self) -> bool:
        """Tell whether encoding the pieces of `_pieces` one by one gives the ids of the whole text.

        GPT-2's pre-tokenizer never joins a space or line end to the character before it.
        """
        raw = json.loads(self.json)
        split = raw.get("pre_tokenizer") or {}
        return (raw.get("normalizer") is None and split.get("type") == "ByteLevel" and split.get("use_regex", True)
                and not split.get("add_prefix_space") and all(token["special"] for token in raw["added_tokens"]))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts in parallel."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts in parallel, long ones in pieces; int32 [n_tokens] for each."""
        pieces = [list(self._pieces(text)) for text in texts]
        encoded = iter(self._encode([piece for parts in pieces for piece in parts]))
        return [np.concatenate([next(encoded) for _ in parts]) for parts in pieces]

    def iter_encode(self, text: str) -> Iterator[np.ndarray]:
        """Encode one long text bit by bit, in growing steps; int32 arrays that make up its ids in order."""
        pieces, n = self._pieces(text), 1
        while group := list(islice(pieces, n)):
            yield np.concatenate(self._encode(group))
            n = min(2 * n, PIECES_PER_BATCH)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; negative ones, which are padding, are left out."""
        return str(self._coder.decode([int(i) for i in ids if i >= 0], skip_special_tokens=False))

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Return one string for each id: its text, or its vocabulary entry where its bytes are part of a character.

        Padding (negative) gives "", an id outside the vocabulary "<id>".
        """
        return [self._token_string(int(i)) for i in ids]

    def _token_string(self, token: int) -> str:
        entry = self._coder.id_to_token(token) if token >= 0 else ""
        if not entry:
            return f"<{token}>" if entry is None else ""
        text = self.decode([token])
        return entry if not text or "\ufffd" in text else text

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._coder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while self._divisible and (cut := CUT.search(text, start + PIECE_CHARS)):
            yield text[start : cut.start() + 1]
            start = cut.start() + 1
        yield text[start:]


def load_tokenizer(source: Place | str) -> Tokenizer:
    """Load a tokenizer.json, a directory with that or with vocab.json and merges.txt, or the tokenizer of a hub id.

    Truncation, padding and BPE dropout are turned off. The end-of-text token is the `eos_token` of a
    tokenizer_config.json, else one of END_OF_TEXT. Raises ValueError for what is missing or unreadable.
    """
    if isinstance(source, ObjectPath):
        with TemporaryDirectory() as here:
            copy = Path(here) / "tokenizer.json"
            copy.write_bytes(source.read_bytes())
            return load_tokenizer(copy)
    path = Path(source).expanduser()
    if not path.exists():
        if not isinstance(source, str) or not HUB_ID.fullmatch(source) or path.suffix == ".json":
            raise ValueError(f"there is no tokenizer at {str(source)!r}; expected a tokenizer.json, a directory with "
                             "one, or a hub id such as 'gpt2'. Check the path.")
        path = _download(source)
    folder = path if path.is_dir() else path.parent
    config = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if path.is_file() or (folder / "tokenizer.json").is_file():
        file = folder / "tokenizer.json" if path.is_dir() else path
        raw = _read(file)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        file, raw = folder / "vocab.json", _from_vocabulary(folder, bool(config.get("add_prefix_space")))
    else:
        raise ValueError(f"{folder} has no tokenizer; expected tokenizer.json, or vocab.json and merges.txt. Copy them "
                         "there, or name another tokenizer.")
    raw |= {"truncation": None, "padding": None}
    if isinstance(raw.get("model"), dict) and "dropout" in raw["model"]:
        raw["model"]["dropout"] = None
    text = json.dumps(raw, ensure_ascii=False)
    try:
        coder = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a tokenizer ({error}); expected the format of the `tokenizers` library. Name "
                         "the tokenizer.json itself, or download it again.") from error
    eos = config.get("eos_token")
    names = (eos.get("content") if isinstance(eos, dict) else eos, *END_OF_TEXT)
    ids = (coder.token_to_id(name) for name in names if isinstance(name, str))
    return Tokenizer(text, next((i for i in ids if i is not None), None))


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, long_chars: int = GROUP_CHARS
) -> Iterator[tuple[Document, Iterator[np.ndarray]]]:
    """Yield each document that has tokens with its ids, as int32 arrays to be joined.

    Documents up to `long_chars` are encoded together, longer ones bit by bit as their ids are asked for.
    """
    for group in _groups(documents, long_chars):
        if len(group) == 1:
            encoded = [tokenizer.iter_encode(group[0].text)]
        else:
            encoded = [iter([ids]) for ids in tokenizer.encode_arrays([document.text for document in group])]
        for document, parts in zip(group, encoded, strict=True):
            if (first := next((ids for ids in parts if len(ids)), None)) is not None:
                yield document, chain([first], parts)


def _groups(documents: Iterable[Document], long_chars: int) -> Iterator[list[Document]]:
    """Gather short documents, GROUP_CHARS at most, for the tokenizer's threads; a long one comes alone."""
    group: list[Document] = []
    room = GROUP_CHARS
    for document in documents:
        size = len(document.text)
        if group and (size > room or size > long_chars):
            yield group
            group, room = [], GROUP_CHARS
        group.append(document)
        room = room - size if size <= long_chars else 0
    if group:
        yield group


def _from_vocabulary(folder: Path, add_prefix_space: bool) -> dict[str, Any]:
    """Build GPT-2's byte-level BPE from its two files, with the tokens of added_tokens.json where there is one."""
    from tokenizers import decoders, models, pre_tokenizers

    try:
        coder = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"vocab.json and merges.txt in {folder} are not a byte-level BPE ({error}); expected GPT-2's "
                         "format. Download both again.") from error
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    coder.decoder = decoders.ByteLevel()
    coder.add_special_tokens([name for name in END_OF_TEXT[:1] if coder.token_to_id(name) is not None])
    if (folder / "added_tokens.json").is_file():
        added = _read(folder / "added_tokens.json")
        coder.add_special_tokens(sorted(added, key=lambda name: int(added[name])))
    return dict(json.loads(coder.to_str()))


def _download(name: str) -> Path:
    """Fetch the tokenizer of a hub id into the hub's cache, or find it there; return its folder."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # network, access and naming errors of several libraries
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"there is no file or directory {name!r}, and the tokenizer of a hub model of that name "
                         f"cannot be fetched: {reason}. Check the name and the network.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a JSON {type(raw).__name__}, expected an object. Download it again.")
    return raw
