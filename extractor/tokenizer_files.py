"""The forms in which tokenizers come: tokenizer.json, and the older files of GPT-2's and BERT's classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

T = TypeVar("T")
END_OF_TEXT = ("<|endoftext|>", "<eos>", "</s>")
LARGEST_FILE = 256 << 20
MOST_TOKENS = 10_000_000
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


def guarded(call: Callable[[], T], what: str) -> T:
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


def read_form(path: Path, folder: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
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


def read_settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, completed as transformers does where it lists no `added_tokens_decoder`."""
    settings = _read_beside(folder / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return settings
    # The order of transformers: special_tokens_map.json first, then the words of added_tokens.json.
    settings |= _read_beside(folder / "special_tokens_map.json")
    special = {content_of(token) for token in _declared(settings)}
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
    return [token for token in listed if isinstance(content_of(token), str) and content_of(token)]


def content_of(token: Any) -> Any:
    if isinstance(token, dict):
        return token.get("content")
    return token


def add_declared(coder: Any, settings: dict[str, Any], folder: Path) -> bool:
    """Add what the settings declare and the tokenizer lacks; tell whether there was anything."""
    known = {str(token.content) for token in coder.get_added_tokens_decoder().values()}
    places: dict[str, int] = {}
    tokens: list[Any] = []
    try:
        listed = settings["added_tokens_decoder"].items()
        # By id, since the library numbers added tokens in the order in which they come.
        for token_id, raw in sorted(
            (int(i), raw) for i, raw in listed if content_of(raw) not in known
        ):
            places[raw["content"]] = token_id
            tokens.append(_added(raw, False))
        names = known | places.keys()
        for raw in _declared(settings):
            if content_of(raw) not in names:
                names.add(content_of(raw))
                tokens.append(_added(raw, True))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TokenizerError(
            f"the added tokens that {folder} declares cannot be read ({error}); expected ids with objects "
            "that have `content`. Download the tokenizer's files again."
        ) from error
    if tokens:
        guarded(lambda: coder.add_tokens(tokens), "take its added tokens")
    # Asked afterwards: a gap in the ids would shift all that follow, and with them every capture.
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
    # Steps run one after the other, so that their factors multiply: a bound for all of them together.
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
        coder = guarded(lambda: tokenizers.Tokenizer(models.BPE.from_file(*paths)), "be read")
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
        name: content_of(settings[name]) for name in BERT_DEFAULTS if settings.get(name)
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
