"""Every token of every document lies in the rows once, in order, and can be traced to where it stood."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from headwater.benchmarks.breaking import faults
from headwater.extractor import tokenizer as tokenizer_module
from headwater.extractor.text import rows as tokens_module
from headwater.extractor.text.documents import Document
from headwater.extractor.text.rows import Packing, iter_rows, iter_token_rows
from headwater.extractor.text.table import DocumentWriter, sequence_labels
from headwater.extractor.tokenizer import CONTINUED, Tokenizer, TokenizerError, load_tokenizer

TEXTS = st.lists(st.text("ab \n\tthe'sé🤗1!\u3000\x1c", max_size=40), max_size=12)


def train() -> str:
    coder = tokenizers.Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    coder.train_from_iterator(["the the that ab abba it's  theé"] * 5, trainer)
    return coder.to_str()


CODER = Tokenizer(train(), 0)
DEMO = load_tokenizer(str(Path(__file__).parents[2] / "extractor/demo"))


def make_documents(texts: list[str], **labels: list[object]) -> list[Document]:
    return [
        Document("file", 10 * i, text, {name: values[i] for name, values in labels.items()})
        for i, text in enumerate(texts)
    ]


@settings(max_examples=300, deadline=None)
@given(
    TEXTS,
    st.integers(2, 12),
    st.sampled_from(["pack", "document"]),
    st.booleans(),
    st.sampled_from([None, 3]),
    st.sampled_from([None, 0]),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 60),
    st.integers(1, 4),
)
def test_rows_hold_every_token_once_and_trace_to_it(
    tmp_path_factory,
    texts,
    seq_len,
    mode,
    across,
    bos,
    eot,
    max_sequences,
    max_tokens,
    rows_per_batch,
):
    packing = Packing(seq_len, mode, across, bos, eot)
    path = tmp_path_factory.mktemp("run") / "documents.parquet"
    with pytest.MonkeyPatch.context() as patch, DocumentWriter(path) as table:
        patch.setattr(tokens_module, "ROWS_PER_BATCH", rows_per_batch)
        for module in (tokens_module, tokenizer_module):
            patch.setattr(module, "GROUP_CHARS", 20)
            patch.setattr(module, "PIECE_CHARS", 5)
        batches = list(
            iter_rows(
                make_documents(texts),
                CODER,
                packing,
                max_sequences=max_sequences,
                max_tokens=max_tokens,
                table=table,
            )
        )
    assert all(len(b.tokens) <= rows_per_batch for b in batches)
    got = [
        row
        for b in batches
        for row in zip(b.tokens, b.length, b.row_start, b.document, b.offset, strict=True)
    ]
    documents, trace = pq.read_table(path), tokens_module.trace

    kept = [(10 * i, ids) for i, ids in enumerate(CODER.encode_batch(texts)) if ids]
    row_lead, lead = packing.row_lead, [bos] if packing.document_lead else []
    tail = [eot] if packing.document_tail else []
    stretches = [
        [(d, o, row, token) for o, token in enumerate([*lead, *ids, *tail], -len(lead))]
        for d, (row, ids) in enumerate(kept)
    ]
    stream, width = [cell for stretch in stretches for cell in stretch], seq_len - row_lead
    rows = (
        [stretch[:seq_len] for stretch in stretches]
        if mode == "document"
        else [stream[i : i + width] for i in range(0, len(stream), width)]
    )[:max_sequences]
    left = max_tokens or 10**9
    for i, row in enumerate(rows):
        rows[i] = row[: max(left - row_lead, 0)]
        left -= len(rows[i]) + row_lead
    rows = [row for row in rows if len(row) > (len(lead) if mode == "document" else 0)]

    for (tokens, n, row_start, document, offset), row in zip(got, rows, strict=True):
        assert n == len(row) + row_lead and (document, offset) == row[0][:2]
        assert tokens.tolist() == [bos] * row_lead + [cell[3] for cell in row] + [-1] * (
            seq_len - n
        )
        starts = [next(j for j, cell in enumerate(row) if cell[0] == d) for d, *_ in row]
        seen = starts if mode == "pack" and not across else [0] * n
        assert row_start.tolist() == [*seen, *range(n + 1, seq_len + 1)]
        for position, cell in enumerate(row, row_lead):
            assert trace(documents, packing, document, offset, position) == (
                cell[0],
                cell[1],
                "file",
                cell[2],
            )
        if row_lead:
            assert trace(documents, packing, document, offset, 0)[:2] == (row[0][0], -1)
    own = [
        sum(cell[0] == d and 0 <= cell[1] < len(ids) for row in rows for cell in row)
        for d, (_, ids) in enumerate(kept)
    ]
    n_documents = len(documents)
    assert documents["n_tokens"].to_pylist() == own[:n_documents] and not any(own[n_documents:])
    whole = [n == len(ids) for n, (_, ids) in zip(own, kept, strict=True)]
    assert documents["complete"].to_pylist() == whole[:n_documents]


def test_only_what_the_limits_need_is_encoded(monkeypatch):
    encoded: list[str] = []
    encode = Tokenizer._encode
    monkeypatch.setattr(
        Tokenizer, "_encode", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    long = make_documents(["the abba " * 200_000, "the"])
    for packing in (Packing(64, "document"), Packing(64)):
        encoded.clear()
        assert next(iter(iter_rows(long, CODER, packing, max_sequences=1))).length.tolist() == [64]
        assert sum(map(len, encoded)) < 300_000


def test_labels_become_typed_columns_of_the_rows(tmp_path):
    documents = make_documents(
        ["ab", "the", "it", "a"],
        year=[None, 1, True, 3],
        score=[1, 2.5, None, float("inf")],
        who=["b", None, "a", "b"],
        nothing=[None] * 4,
    )
    with DocumentWriter(tmp_path / "d.parquet", ["year", "score", "who", "nothing"]) as table:
        list(iter_rows(documents, CODER, Packing(4), table=table))
    assert [p.name for p in tmp_path.iterdir()] == ["d.parquet"]
    labels = sequence_labels(tmp_path / "d.parquet", np.array([0, 0, 1, 2, 3, 3]))
    assert (
        labels["year"].values.tolist() == [-1, -1, 1, 1, 3, 3]
        and labels["year"].values.dtype == np.int64
    )
    np.testing.assert_array_equal(labels["score"].values, [1, 1, 2.5, np.nan, np.inf, np.inf])
    assert labels["who"].values.tolist() == [0, 0, -1, 1, 0, 0] and list(
        labels["who"].categories
    ) == ["b", "a"]
    assert np.isnan(labels["nothing"].values).all()
    with (
        pytest.raises(
            ValueError,
            match=r"file, row 10: label 'x' is 'n/a', a string, where earlier documents have a "
            "int64",
        ),
        DocumentWriter(tmp_path / "e.parquet", ["x"]) as table,
    ):
        list(iter_rows(make_documents(["a", "b"], x=[1, "n/a"]), CODER, Packing(4), table=table))
    assert not (tmp_path / "e.parquet").exists()


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint16])
def test_ready_ids_are_taken_as_they_are_with_padding_on_both_sides(tmp_path, dtype):
    np.save(tmp_path / "ids.npy", (np.arange(600 * 5) % 7).reshape(600, 5).astype(dtype))
    ids = np.load(tmp_path / "ids.npy", mmap_mode="r")
    first, second = iter_token_rows(ids, 7, 500)
    assert (
        second.tokens.dtype == np.int32
        and (np.concatenate([first.tokens, second.tokens]) == ids[:500]).all()
    )
    assert (second.length == 5).all() and not second.row_start.any() and not second.offset.any()
    assert [*first.document, *second.document] == list(range(500))
    got = next(iter_token_rows(np.array([[-1, -1, 5, 6], [5, 6, 0, -1], [-1, 3, -1, -1]]), 7))
    assert got.length.tolist() == [4, 3, 2]
    assert got.row_start.tolist() == [[1, 2, 2, 2], [0, 0, 0, 4], [1, 1, 3, 4]]
    assert got.tokens[0].tolist() == [-1, -1, 5, 6]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 2)), r"dtype float64 and shape \[2, 2\]"),
        (np.zeros(3, int), r"shape \[3\]"),
        (
            np.array([[1, 2], [3, 7]]),
            "token id 7 at row 1, position 1 is outside the model's ids, 0 to 6",
        ),
        (np.array([[1, -1, 2]]), "token id -1 at row 0, position 1"),
        (np.array([[1, -2]]), "token id -2 at row 0, position 1"),
        (np.array([[1, 1], [-1, -1]]), "row 1 of the token ids is all padding"),
    ],
)
def test_wrong_ids_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        list(iter_token_rows(ids, 7))


@pytest.mark.parametrize(
    ("packing", "limits", "message"),
    [
        ({"mode": "rows"}, {}, "mode is 'rows'; expected 'pack' or 'document'"),
        ({"seq_len": 1, "bos": 0}, {}, "seq_len is 1; expected at least 2"),
        ({}, {"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ({"bos": 900}, {}, "bos is 900; expected an id of the model, 0 to 271"),
        ({}, {"d_vocab": 50}, r"gives id \d+ .* ids\), but the model's d_vocab is 50"),
    ],
)
def test_impossible_requests_are_refused(packing, limits, message):
    with pytest.raises(ValueError, match=message):
        list(
            iter_rows(make_documents(["the"]), CODER, Packing(**{"seq_len": 4} | packing), **limits)
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab \n\r\tthe'sé🤗1!\u00a0\u2028\u3000\x1c\x85", max_size=60), max_size=5))
def test_pieces_give_the_ids_of_the_whole_text(texts):
    whole = [
        encoding.ids for encoding in CODER._coder.encode_batch(texts, add_special_tokens=False)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARS", 3)
        assert CODER.encode_batch(texts) == whole
        assert [np.concatenate(list(CODER.iter_encode(text))).tolist() for text in texts] == whole
    assert [CODER.decode(ids) for ids in whole] == texts


def test_a_tokenizer_loads_from_all_its_forms(tmp_path):
    raw = json.loads(CODER.json) | {
        "truncation": {
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        }
    }
    raw["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (old := tmp_path / "old").mkdir()
    tokenizers.Tokenizer.from_str(CODER.json).model.save(str(old))
    texts = ["the that's <|endoftext|> abba", "é\n\n the"]
    for source in (tmp_path, tmp_path / "tokenizer.json", str(old)):
        loaded = load_tokenizer(source)
        assert (
            loaded.encode_batch(texts) == CODER.encode_batch(texts)
            and 0 in loaded.encode_batch(texts)[0]
            and 0 not in load_tokenizer(source, "text").encode_batch(texts)[0]
        )
        assert (loaded.end_of_text, loaded.d_vocab) == (0, CODER.d_vocab)
    strings = CODER.token_strings([0, -1, *CODER.encode_batch(["the 🤗"])[0][:3], 9999])
    assert strings == ["<|endoftext|>", "", "the", " ", "ð", "<9999>"]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    assert load_tokenizer(tmp_path).end_of_text == CODER.encode_batch(["a"])[0][0]


@pytest.mark.parametrize("text", ["naïve café × – 日本 🙂 ok", "नमस्ते 👩‍👧!", "def f():\n    pass"])
def test_characters_are_whole_where_their_first_piece_is(text):
    (ids,) = DEMO.encode_batch([text])
    strings = DEMO.text_strings(ids)
    assert len(strings) == len(ids) and "".join(s for s in strings if s != CONTINUED) == text
    assert DEMO.text_strings([-1, *ids, 10**6]) == ["", *strings, f"<{10**6}>"]
    for low in range(len(ids)):  # cut anywhere, what is not cut stays whole
        tail = DEMO.text_strings(ids[low:])
        assert tail[8:] == strings[low + 8 :] and (
            strings[low] == CONTINUED or tail == strings[low:]
        )
        assert len(tail) == len(ids) - low


def test_a_piece_that_ends_one_character_and_begins_another():
    vocabulary = {"æ": 0, "Ĺ¥æ": 1, "ľ¬": 2, "Ġ": 3, "Ġæ": 4, "ľ¬a": 5}
    coder = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    coder.decoder = decoders.ByteLevel()
    pieces = Tokenizer(coder.to_str(), None)
    assert pieces.text_strings([0, 1, 2]) == ["日", "本", CONTINUED]
    assert pieces.text_strings([4, 1, 5, 3]) == [" 日", "本", "a", " "]
    assert pieces.text_strings([1, 2]) == ["\ufffd", "\ufffd"] and pieces.text_strings([0]) == [
        "\ufffd"
    ]


def test_missing_and_damaged_tokenizers_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"has no tokenizer; expected tokenizer.json, or vocab.json"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "snapshot")
    )
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer("nobody/nothing")


@pytest.mark.parametrize("number", [2**31, -1, 1.5, {}, True])
def test_ids_that_no_vocabulary_has_are_refused(number, tmp_path):
    home = faults.make_model(tmp_path / "model")
    document = json.loads((home / "tokenizer.json").read_text())
    words = document["model"]["vocab"]
    words["a"] = number
    (home / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match="whole number from 0"):
        load_tokenizer(str(home))
    (home / "tokenizer.json").unlink()
    (home / "vocab.json").write_text(json.dumps(words))
    (home / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match="whole number from 0"):
        load_tokenizer(str(home))


def test_a_tokenizer_may_leave_members_out(tmp_path):
    home = faults.make_model(tmp_path / "model")
    document = json.loads((home / "tokenizer.json").read_text())
    for name in ("added_tokens", "normalizer", "post_processor", "version"):
        document.pop(name, None)
    (home / "tokenizer.json").write_text(json.dumps(document))
    assert [ids.tolist() for ids in load_tokenizer(str(home)).iter_encode("ab")] == [[64, 65]]
