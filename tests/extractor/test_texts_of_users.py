"""Texts, labels and ids in the forms that people have them in are read as they expect, or refused with the remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import headwater
from headwater.extractor.text import documents as texts
from headwater.extractor.text import ids as ids_module
from headwater.extractor.text.documents import TextError, iter_documents
from headwater.extractor.text.paths import expand_paths
from headwater.store.reader import open_run

ROWS = [{"text": "the quick fox", "n": 1}, {"text": "jumps over", "n": -1}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WANTED = [row["text"] for row in ROWS]


def read(*arguments, column=None, labels=(), **more):
    paths = expand_paths([str(argument) for argument in arguments])
    return list(iter_documents(paths, column, labels, **more))


def zipped(data, *names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, data)
    return buffer.getvalue()


def zstandard(data):
    return pa.compress(data, "zstd", asbytes=True)


HALVES = LINES[:20], LINES[20:]
PACKED = {
    "a.jsonl.gz": gzip.compress(HALVES[0]) + gzip.compress(HALVES[1]),
    "a.jsonl.bz2": bz2.compress(HALVES[0]) + bz2.compress(HALVES[1]),
    "a.jsonl.xz": lzma.compress(HALVES[0]) + bytes(4) + lzma.compress(HALVES[1]),
    "a.jsonl.zst": zstandard(HALVES[0]) + zstandard(HALVES[1]),
    "a.jsonl.zip": zipped(LINES, "a.jsonl"),
    "b.zip": zipped(LINES, "__MACOSX/._a.jsonl", "inner/a.jsonl"),
    "c.jsonl": gzip.compress(LINES),
    "d.jsonl": zstandard(LINES),
    "a.csv.gz": gzip.compress(b"n,text\n1,the quick fox\n-1,jumps over\n"),
    "a.tsv.zip": zipped(b"n\ttext\n1\tthe quick fox\n-1\tjumps over\n", "a.tsv"),
    "windows.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "windows.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
}


@pytest.mark.parametrize("name", PACKED)
def test_compressed_and_windows_lines_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name])
    assert [d.text for d in read(tmp_path / name)] == WANTED
    if name != "b.zip":  # whose name does not say that there is text in it
        assert [d.text for d in read(tmp_path)] == WANTED
    if name.endswith((".gz", ".bz2", ".xz", ".zst")):
        (tmp_path / name).write_bytes(PACKED[name][:-9])
        with pytest.raises(TextError, match="It is cut short, damaged"):
            read(tmp_path / name)


def test_what_unpacks_to_more_than_is_allowed_is_refused_as_it_comes(tmp_path):
    for name, data in (
        ("a.txt.gz", gzip.compress(bytes(1 << 22))),
        ("b.txt.bz2", bz2.compress(bytes(1 << 22))),
        ("c.txt.xz", lzma.compress(bytes(1 << 22))),
        ("d.txt.zst", zstandard(bytes(1 << 22))),
        ("e.txt.zip", zipped(bytes(1 << 22), "a.txt")),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TextError, match=f"{name} unpacks to more than 2,000,000 bytes"):
            read(tmp_path / name, max_unpacked=2_000_000)
    (tmp_path / "two.zip").write_bytes(zipped(b"a", "a.txt", "b.txt"))
    with pytest.raises(TextError, match=r"two.zip holds 2 files; .* Unpack it"):
        read(tmp_path / "two.zip")


def test_a_long_line_and_a_long_text_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_bytes(LINES + b'"' + b"a" * 200 + b'"')
    with pytest.raises(TextError, match=r"a.jsonl:3 is longer than 0 MiB"):
        read(tmp_path / "a.jsonl")
    monkeypatch.setattr(texts, "TEXT_CHUNK", 5)
    text = "naïve 🤗 " * 50
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    [document] = iter_documents([tmp_path / "a.txt"], None, ())
    assert len(document.text) < 6
    for document in iter_documents([tmp_path / "a.txt"], None, ()):
        assert document.text + "".join(document.more) == text
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xf0\x9f")
    with pytest.raises(TextError, match=f"not UTF-8: byte 0xf0 at offset {len(text.encode())}"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_other_encodings_are_named(tmp_path, suffix, encoding):
    head = "text\n" if suffix == "csv" else ""
    (tmp_path / f"a.{suffix}").write_text(head + '"caf\xe9 au lait"\n', encoding=encoding)
    name = {"utf-16": "It is UTF-16.* -f UTF-16", "cp1252": "-f WINDOWS-1252"}[encoding]
    with pytest.raises(TextError, match=f"not UTF-8.*{name} -t UTF-8"):
        read(tmp_path / f"a.{suffix}")


def test_a_dataset_folder_gives_its_tables_and_not_its_card(tmp_path):
    (corpus := tmp_path / "corpus" / "data").mkdir(parents=True)
    table = pa.table({"text": WANTED, "n": [1, -1]})
    pa.parquet.write_table(table, corpus / "train-00000-of-00001.parquet")
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "dataset_dict.json"):
        (tmp_path / "corpus" / name).write_text("{\n}")
    (tmp_path / "corpus" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "corpus" / "script.py").write_text("import datasets")
    assert [d.text for d in read(tmp_path / "corpus", labels=("n",))] == WANTED
    (tmp_path / "corpus" / "README.md").write_text("# code")
    assert len(read(tmp_path / "corpus")) == len(WANTED) + 1  # a program among tables is a text
    (notes := tmp_path / "notes").mkdir()
    (notes / "README.md").write_text("a card that is the text")
    assert len(read(notes)) == 1  # without tables beside it, it is a document


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    for split, text in (("test", "b"), ("train", "a")):
        (folder := tmp_path / "saved" / split).mkdir(parents=True)
        table = pa.table({"text": [text]})
        for name in ("data-00000-of-00001.arrow", "cache-0123.arrow"):
            with pa.ipc.new_stream(folder / name, table.schema) as writer:
                writer.write_table(table)
        files = [{"filename": "data-00000-of-00001.arrow"}]
        (folder / "state.json").write_text(json.dumps({"_data_files": files}, indent=2))
        (folder / "dataset_info.json").write_text('{\n "features": {}\n}')
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [d.text for d in read(tmp_path / "saved")] == ["b", "a"]
    assert [d.text for d in read(tmp_path / "saved" / "train")] == ["a"]


def test_pipes_are_read_once(cli, tiny_gpt2, tmp_path):
    flags = ["--model", tiny_gpt2, "--jsonl", "--mode", "document", "--seq-len", 8]
    reader, writer = os.pipe()  # as bash makes for <(…)
    os.write(writer, LINES)
    os.close(writer)
    text = f"/dev/fd/{reader}"
    assert cli("extract", *flags, "--text", text, "--out", tmp_path / "run").code == 0
    os.close(reader)
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(gzip.compress(LINES),))
    thread.start()
    assert cli("extract", *flags, "--text", tmp_path / "pipe", "--out", tmp_path / "two").code == 0
    thread.join()
    one, two = open_run(tmp_path / "run"), open_run(tmp_path / "two")
    assert (one.tokens == two.tokens).all() and len(one.tokens) == 2
    assert [s["size"] for s in one.manifest.text["sources"]] == [len(LINES)]
    assert cli("extract", "--out", tmp_path / "two").code == 0


def test_labels_tell_minus_one_from_none_and_dates_are_text(cli, tiny_gpt2, tmp_path):
    rows = [{"text": "the", "s": s, "t": t} for s, t in ((-1, 0), (0, 1), (1, None), (None, 2))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", tiny_gpt2, "--mode", "document", "--seq-len", 8]
    run = tmp_path / "run"
    assert (
        cli("extract", *flags, "--text", tmp_path / "a.jsonl", "--labels", "s,t", "--out", run).code
        == 0
    )
    assert open_run(run).plain("label_s").tolist() == [-1, 0, 1, -(2**63)]
    assert open_run(run).plain("label_t").tolist() == [0, 1, -1, 2]
    attributes = json.loads((run / "label_s" / "zarr.json").read_text())
    assert attributes["attributes"]["missing"] == attributes["fill_value"] == -(2**63)
    (tmp_path / "a.csv").write_text(
        "text,day,at\nthe,2020-01-02,12:30:00\nfox,2021-10-03,09:00:00\n"
    )
    assert read(tmp_path / "a.csv", labels=("day", "at"))[0].labels == {
        "day": "2020-01-02",
        "at": "12:30:00",
    }
    table = pa.table({"text": ["a"], "at": pa.array([0], pa.timestamp("s"))})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", labels=("at",))[0].labels == {
        "at": "1970-01-01 00:00:00.000"
    }


TURNS = [{"role": "user", "content": "the fox"}, {"role": "bot", "content": [{"text": "jumps"}]}]


def test_turns_of_a_conversation_are_joined(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}))
    assert read(tmp_path / "a.jsonl", column="messages")[0].text == "user: the fox\nbot: jumps"
    plain = pa.table({"messages": [[{"from": "human", "value": "the fox"}]]})
    pa.parquet.write_table(plain, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", column="messages")[0].text == "human: the fox"
    (tmp_path / "a.jsonl").write_text('{"messages": [{"speaker": "a"}]}')
    with pytest.raises(TextError, match="expected token ids, or turns with role and content"):
        read(tmp_path / "a.jsonl", column="messages")


@pytest.mark.parametrize("url", ["s3://b/a.jsonl", "https://h/a", "hf://datasets/x", "file:///a"])
def test_addresses_are_refused_with_the_way_to_fetch_them(cli, tiny_gpt2, tmp_path, url):
    for flag in ("--text", "--tokens"):
        answer = cli("extract", "--model", tiny_gpt2, flag, url, "--out", tmp_path / "run")
        answer.error(2, "is an address", "this machine only")


def columns_of_ids(path, rows, mask):
    data = {"input_ids": rows} | ({} if mask is None else {"attention_mask": mask})
    if path.suffix == ".jsonl":
        lines = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, lines)))
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, pa.table(data).schema) as writer:
            writer.write_table(pa.table(data))
    else:
        pa.parquet.write_table(pa.table(data), path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_a_column_of_ids_is_taken_as_ids(cli, tiny_gpt2, tmp_path, name):
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "model.safetensors"):  # no tokenizer is needed
        (model / file).symlink_to(tiny_gpt2 / file)
    columns_of_ids(tmp_path / name, [[3, 4, 5], [6, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    flags = ["extract", "--model", model, "--text", tmp_path / name, "--column", "input_ids"]
    assert cli(*flags, "--mode", "document", "--seq-len", 4, "--out", tmp_path / "run").code == 0
    assert open_run(tmp_path / "run").tokens.tolist() == [[3, 4, 5, -1], [6, -1, -1, -1]]
    assert cli(*flags, "--seq-len", 4, "--out", tmp_path / "packed").code == 0
    assert open_run(tmp_path / "packed").tokens.tolist() == [[3, 4, 5, 6]]
    columns_of_ids(tmp_path / name, [[3, 4], [6, -100]], None)
    cli(*flags, "--out", tmp_path / "bad").error(2, "row 1 holds the token id -100", "0 to ")


def megatron(path):
    path.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x04")
    np.arange(64, dtype=np.int32).tofile(path)


def llm_c(path):
    header = np.zeros(256, np.int32)
    header[:2] = 20240520, 1
    path.write_bytes(header.tobytes() + np.arange(64, dtype=np.uint16).tobytes())


FLAT = {
    "train.bin": lambda p: np.arange(64, dtype=np.uint16).tofile(p),
    "llm.bin": llm_c,
    "megatron.bin": megatron,
    "ids.npz": lambda p: np.savez_compressed(p, np.arange(64)),
    "ids.pt": lambda p: torch.save(torch.arange(64), p),
    "old.pt": lambda p: torch.save(torch.arange(64), p, _use_new_zipfile_serialization=False),
    "flat.npy": lambda p: np.save(p, np.arange(64)),
    "square.npy": lambda p: np.save(p, np.arange(64).reshape(4, 16)),
}


@pytest.mark.parametrize("name", FLAT)
def test_files_of_ids_are_read(tmp_path, name):
    FLAT[name](tmp_path / name)
    assert np.asarray(ids_module.load_ids(str(tmp_path / name))).ravel().tolist() == list(range(64))


def save_object(path):
    np.save(path, np.array([{}]), allow_pickle=True)


NO_IDS = {
    "a.npy": (save_object, "it holds Python objects, which Headwater does not load"),
    "b.npy": (lambda p: p.write_bytes(b""), "it is empty"),
    "c.npy": (lambda p: p.write_bytes(b"\x93NUMPY\1\0\x10\0{'descr': '<i4', 0"), "cannot be read"),
    "d.npy": (lambda p: p.write_bytes(b"\x93NUMPY\1\0\x06\0'''\x00\n\n"), "cannot be read"),
    "e.npz": (lambda p: np.savez(p, a=np.arange(3), b=np.arange(3)), "it holds 2 arrays"),
    "f.npy": (lambda p: np.save(p, np.zeros((2, 2, 2), int)), "has shape [2, 2, 2]"),
    "g.pt": (lambda p: torch.save([1, 2], p), "holds 0 tensors, expected one"),
    "h.parquet": (lambda p: p.write_bytes(b"PAR1PAR1PAR1"), "--column input_ids"),
    "i.npy": (lambda p: np.save(p, np.zeros(4)), "dtype float64"),
}


@pytest.mark.parametrize("name", NO_IDS)
def test_what_holds_no_ids_is_named(cli, tiny_gpt2, tmp_path, name):
    write, message = NO_IDS[name]
    write(tmp_path / name)
    answer = cli(
        "extract", "--model", tiny_gpt2, "--tokens", tmp_path / name, "--out", tmp_path / "r"
    )
    answer.error(2, message)
    assert "pickle" not in answer.err


def test_long_rows_of_ids_become_windows(cli, tiny_gpt2, tmp_path):
    ids = np.arange(1, 81).reshape(2, 40)
    np.save(tmp_path / "ids.npy", ids)
    flags = ["extract", "--model", tiny_gpt2, "--tokens", tmp_path / "ids.npy", "--out"]
    cli(*flags, tmp_path / "r").error(
        2, "have 40 positions", "make windows over them with --stride 32"
    )
    cli(*flags, tmp_path / "r", "--seq-len", 8).error(2, "more than --seq-len 8", "--stride 8")
    cli(*flags, tmp_path / "r", "--stride", 33).error(2, "--stride is 33; expected 1 to 32")
    assert cli(*flags, tmp_path / "run", "--stride", 20).code == 0
    run = open_run(tmp_path / "run")
    assert run.plain("document").tolist() == [0, 0, 1, 1]
    assert run.plain("offset").tolist() == [0, 20, 0, 20]
    assert run.tokens[1].tolist() == [*range(21, 41), *[-1] * 12]
    assert cli("extract", "--out", tmp_path / "run").code == 0
    np.save(tmp_path / "ids.npy", np.array([-1, -1, *range(9), -1]))
    assert cli(*flags, tmp_path / "flat", "--seq-len", 4).code == 0
    flat = open_run(tmp_path / "flat")
    assert flat.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, -1, -1, -1]]
    assert flat.plain("offset").tolist() == [2, 6, 10]


def test_cut_documents_are_counted_and_windows_leave_nothing_out(cli, tiny_gpt2, tmp_path):
    long = " ".join(["the quick brown fox"] * 12)
    (tmp_path / "a.jsonl").write_text(json.dumps(long) + '\n"the"\n')
    flags = ["--model", tiny_gpt2, "--text", tmp_path / "a.jsonl", "--mode", "document", "--bos"]
    note = "1 of 2 documents cut: the rest of each is in no sequence"
    assert note in cli("plan", *flags, "--seq-len", 16).out
    assert note in cli("extract", *flags, "--seq-len", 16, "--out", tmp_path / "cut").out
    assert note in cli("info", tmp_path / "cut").out
    assert json.loads(cli("info", tmp_path / "cut", "--json").out)["text"]["documents"]["cut"] == 1
    run = tmp_path / "run"
    assert " cut:" not in cli("extract", *flags, "--seq-len", 16, "--stride", 10, "--out", run).out
    opened = open_run(run)
    rows, offsets = opened.tokens, opened.plain("offset")
    whole = load(tiny_gpt2).encode_batch([long])[0]
    assert (rows[:, 0] == 0).all() and opened.plain("document").tolist() == [0] * (
        len(rows) - 1
    ) + [1]
    for row, offset in zip(rows[:-1], offsets[:-1], strict=True):
        real = row[1:][row[1:] >= 0].tolist()
        assert whole[offset + 1 : offset + 1 + len(real)] == real and (offset + 1) % 10 == 0
    assert offsets[-2] + 1 + len(real) == len(whole)
    cli("plan", *flags[:4], "--stride", 4).error(2, "--stride makes several sequences", "document")


def load(folder):
    from headwater.extractor.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def test_special_tokens_in_the_text_are_ids_or_text_and_old_runs_go_on(cli, tiny_gpt2, tmp_path):
    (tmp_path / "a.txt").write_text("the<|endoftext|>fox")
    flags = ["--model", tiny_gpt2, "--text", tmp_path / "a.txt", "--seq-len", 16]
    for mode, n in (("ids", 2), ("text", 1)):
        run = tmp_path / mode
        more = [] if mode == "ids" else ["--special-tokens", "text"]
        assert cli("extract", *flags, *more, "--out", run).code == 0
        assert (open_run(run).tokens == 0).sum() == n
        assert ("are ids" if mode == "ids" else "as text") in cli("info", run).out
    cli("extract", *flags, "--out", tmp_path / "text").error(
        2, "special_tokens is 'text' in the run"
    )
    manifest = tmp_path / "text" / "headwater" / "manifest.json"
    raw = json.loads(manifest.read_text())
    for name in ("special_tokens", "stride"):
        del raw["text"]["request"][name]
    raw.pop("crc32c")
    from headwater.store.files import json_sum

    manifest.write_text(json.dumps(raw | {"crc32c": json_sum(raw)}))
    assert cli("extract", *flags, "--out", tmp_path / "text").code == 0
    assert cli("extract", "--out", tmp_path / "text").code == 0
    assert "as text" in cli("info", tmp_path / "text").out


def test_a_beginning_of_text_token_is_the_tokenizers_own_and_never_a_word(cli, tiny_gpt2, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(tiny_gpt2 / "model.safetensors")
    config = json.loads((tiny_gpt2 / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"bos_token_id": 270, "eos_token_id": 270})
    )
    raw = json.loads((tiny_gpt2 / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    first, second = (next(k for k, v in vocabulary.items() if v == i) for i in (0, 1))
    vocabulary["<s>"], vocabulary["</s>"] = vocabulary.pop(first), vocabulary.pop(second)
    raw["added_tokens"] = [raw["added_tokens"][0] | {"content": "<s>", "id": 0}]
    (model / "tokenizer.json").write_text(json.dumps(raw))
    (model / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (tmp_path / "a.txt").write_text("fox")
    config = headwater.RunConfig(
        model=str(model), text=str(tmp_path / "a.txt"), out=str(tmp_path / "run"), bos=True
    )
    tokens = headwater.extract(config).tokens[0]
    assert tokens[0] == 0 and tokens[tokens >= 0][-1] == 1
    assert headwater.capture(str(model), "fox", bos=True).token[0, 0] == 0
    vocabulary["x</s>"] = vocabulary.pop("</s>")
    (model / "tokenizer.json").write_text(json.dumps(raw))
    (model / "tokenizer_config.json").unlink()
    flags = ["--model", model, "--text", tmp_path / "a.txt", "--out", tmp_path / "no"]
    cli("extract", *flags, "--bos").error(2, "the model's (270) is its ordinary word", "bos_token")
    assert cli("extract", *flags).code == 0


def test_a_silent_hub_ends_in_an_error(tmp_path):
    """The tokenizer of a hub id is fetched as a model is: the hub is asked once, with a time limit."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = "from headwater.extractor.tokenizer import load_tokenizer; load_tokenizer('a/b')"
        limits = {
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | limits,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert "the tokenizer of a hub model of that name cannot be fetched" in done.stderr


def test_a_damaged_arrow_file_is_refused_and_shows_no_other_memory(tmp_path):
    table = pa.table({"text": ["the quick fox", "jumps"]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    data = bytearray((tmp_path / "a.arrow").read_bytes())
    at = data.index(np.array([0, 13, 18], np.int32).tobytes())
    for offsets in ([0, 13, 1 << 30], [1 << 28, (1 << 28) + 64, (1 << 28) + 99], [0, -5, 18]):
        data[at : at + 12] = np.array(offsets, np.int32).tobytes()
        (tmp_path / "a.arrow").write_bytes(data)
        with pytest.raises(TextError, match="cannot be read as arrow"):
            read(tmp_path / "a.arrow")


FUZZ = """
import random, sys
from pathlib import Path
from headwater.extractor.text.documents import TextError, iter_documents
path = Path(sys.argv[1])
data = path.read_bytes()
rng = random.Random(int(sys.argv[2]))
for _ in range(150):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        changed[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    bad = path.with_name("bad" + path.suffix)
    bad.write_bytes(changed[: rng.choice((len(data), rng.randrange(len(data))))])
    try:
        for document in iter_documents([bad], None, ("n",)):
            sum(map(len, document.more))
    except TextError:
        pass
"""


@pytest.mark.parametrize(
    "kind", ["arrow", "stream.arrow", "parquet", "csv", "jsonl.xz", "jsonl.zst"]
)
def test_mutated_files_end_in_an_error_or_a_text(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    table = pa.table(
        {"text": pa.array(["the quick fox", None, "x"]).dictionary_encode(), "n": [1, 2, None]}
    )
    if kind.endswith("arrow"):
        make = pa.ipc.new_stream if kind.startswith("stream") else pa.ipc.new_file
        with make(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "parquet":
        pa.parquet.write_table(table, path)
    else:
        path.write_bytes(PACKED.get(f"a.{kind}", b"text,n\nthe,1\nfox,2\n"))
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(path), "0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
