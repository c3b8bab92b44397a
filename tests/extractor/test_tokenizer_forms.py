"""A tokenizer of any form gives the ids that transformers gives, special tokens and added words included."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from headwater.extractor import tokenizer as tokenizer_module
from headwater.extractor.text.documents import Document
from headwater.extractor.tokenizer import Tokenizer, encode_documents, load_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(ALPHABET)} | {"th": 257, "the": 258}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"天地玄黄", "the", "cat", "##s", "e", "E"]
TEXTS = [
    "the BRCA1 cat",
    "<user>the cat [EOS]\n<bot> the",
    "x <|endoftext|> the",
    "天地 The cats [MASK] [SEP]É",
    "[HEAVY][HUMAN]EVQ",
    " <pad>  <user>  the<sep>",
    "the  <user>",
]


def byte_level(folder, **settings):
    """Write GPT-2's two files, and `settings` as the files beside them."""
    (folder / "vocab.json").write_text(json.dumps(WORDS))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def whole(folder, special=(), added=(), words=None, **settings):
    """Write a tokenizer.json, of bytes or of whole `words`, with special and added tokens."""
    if words is None:
        coder = tokenizers.Tokenizer(models.BPE(vocab=WORDS, merges=[("t", "h"), ("th", "e")]))
        coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        coder.decoder = decoders.ByteLevel()
    else:
        coder = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        coder.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    coder.add_special_tokens(list(special))
    coder.add_tokens(list(added))
    coder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    )


def pieces(folder, **settings):
    """Write BERT's vocab.txt."""
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    config = {"tokenizer_class": "BertTokenizer"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
MAP = {"eos_token": "[EOS]", "bos_token": "[EOS]", "additional_special_tokens": ["<user>", "<bot>"]}
ADDED = {"BRCA1": 259, "<user>": 260, "<bot>": 261, "[EOS]": 262}
DECODER = {
    "259": {"content": "BRCA1", "special": False, "normalized": True},
    "260": {"content": "<user>", "special": True, "rstrip": True, "normalized": False},
    "261": {"content": "<bot>", "special": True, "lstrip": True, "normalized": False},
}
PROTEIN = {name: i for i, name in enumerate(["[UNK]", "[CLS]", "[SEP]", *"EVQLHAY", "[HEAVY]"])}
FORMS = {
    "prefixed": lambda d: whole(
        d, eos_token="<|endoftext|>", tokenizer_class="GPT2Tokenizer", add_prefix_space=True
    ),
    "roberta": lambda d: byte_level(
        d,
        tokenizer_config=dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|x|>")
        | {"tokenizer_class": "RobertaTokenizer"},
    ),
    "added words": lambda d: byte_level(
        d, added_tokens=ADDED, special_tokens_map=MAP, tokenizer_config=GPT2
    ),
    "added words, undeclared": lambda d: byte_level(
        d, added_tokens=ADDED, tokenizer_config=GPT2
    ),
    "decoder": lambda d: byte_level(
        d, tokenizer_config=GPT2 | {"added_tokens_decoder": DECODER, "eos_token": "<bot>"}
    ),
    "new tokens": lambda d: byte_level(
        d, tokenizer_config=GPT2 | {"pad_token": "<pad>", "sep_token": {"content": "<sep>", "__type": "AddedToken"}}
    ),
    "whole": lambda d: whole(
        d, ["<user>", "[EOS]"], ["BRCA1"], eos_token="[EOS]", bos_token="<user>"
    ),
    "whole, declared beside": lambda d: whole(d, eos_token="<|endoftext|>", pad_token="<pad>"),
    "whole, decoder": lambda d: whole(d, added_tokens_decoder=DECODER, eos_token="<bot>"),
    "protein": lambda d: whole(
        d, ["[UNK]", "[CLS]", "[SEP]", "[HEAVY]", "[HUMAN]"], words=PROTEIN,
        eos_token="[SEP]", bos_token="[CLS]", unk_token="[UNK]",
    ),
    "word pieces": pieces,
    "word pieces, cased": lambda d: pieces(d, do_lower_case=False, strip_accents=False),
    "word pieces, own end": lambda d: pieces(d, eos_token="[SEP]", bos_token="[CLS]"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_ids_are_those_of_transformers(tmp_path, name):
    from transformers import AutoTokenizer

    FORMS[name](tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 300}))
    want = AutoTokenizer.from_pretrained(tmp_path)
    # transformers 5 does not take special_tokens_map.json's additional tokens for special ones
    for mode, split in (("ids", False), ("text", True))[: 1 if name == "added words" else 2]:
        got = load_tokenizer(str(tmp_path), mode)
        for text in TEXTS:
            ids = want(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
            assert got.encode_batch([text])[0] == ids, text
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tokenizer_module, "PIECE_CHARS", 2)
                assert np.concatenate(list(got.iter_encode(list(text)))).tolist() == ids, text
        assert (got.end_of_text, got.beginning_of_text) == (want.eos_token_id, want.bos_token_id)
        copy = tmp_path / f"{mode}.json"
        copy.write_text(got.json)
        assert load_tokenizer(copy).token_strings(range(270)) == got.token_strings(range(270))


BAD = {
    "gap": (lambda d: byte_level(d, added_tokens={"x y": 400}), "gives 'x y' the id 400, but it would get 259"),
    "no unk": (lambda d: (d / "vocab.txt").write_text("a\nb"), "does not hold '\\[UNK\\]'"),
    "CLIP": (
        lambda d: byte_level(d, tokenizer_config={"tokenizer_class": "CLIPTokenizerFast"}),
        "belongs to a CLIPTokenizerFast, whose rules .*save_pretrained",
    ),
    "Japanese": (
        lambda d: pieces(d, tokenizer_class="BertJapaneseTokenizer"),
        "belongs to a BertJapaneseTokenizer",
    ),
    "deep": (lambda d: (d / "tokenizer.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "added": (
        lambda d: byte_level(d, tokenizer_config={"added_tokens_decoder": {"a": 3}}),
        "added tokens that .* declares cannot be read",
    ),
    "growth": (
        lambda d: (d / "tokenizer.json").write_text(
            json.dumps({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}, "model": {}})
        ),
        "its Prepend step inserts so much text that the work would have no bound",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_tokenizer_is_named(tmp_path, name):
    write, message = BAD[name]
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_an_error_that_names_the_document(capfd):
    coder = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    coder.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    documents = [Document("file", 7, "a" * 40 + "!", {})]
    with pytest.raises(ValueError, match="file, row 7: the tokenizer cannot encode this"):
        list(encode_documents(documents, Tokenizer(coder.to_str(), None)))
    with pytest.raises(ValueError, match="the tokenizer cannot encode this"):
        Tokenizer(coder.to_str(), None).encode_batch(["half a pair: \ud83e"])


def test_one_endless_word_is_refused_before_the_library_sees_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "LONGEST_PIECE", 1 << 22)
    byte_level(tmp_path)
    endless = Document("file", 0, "a" * 100, {}, ("a" * (1 << 20) for _ in range(400)))
    with pytest.raises(ValueError, match=r"file, row 0: a stretch of 4,194,404 characters or more"):
        [list(parts) for _, parts in encode_documents([endless], load_tokenizer(tmp_path))]
