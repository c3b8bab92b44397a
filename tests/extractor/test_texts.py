"""Every format gives the same documents, in memory of one batch, and what cannot be read is named."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from headwater.extractor.text import documents as texts
from headwater.extractor.text.documents import (
    STDIN,
    Document,
    Tally,
    TextError,
    describe_sources,
    iter_documents,
)
from headwater.extractor.text.paths import expand_paths, kind_of

TEXTS = ["naïve 🤗\r\n two lines", None, "b,\"c\"\t'd'", "", "last"] + [
    f"row {i}" for i in range(5, 200)
]
YEARS = [1900, 1901, None, *range(3, 200)]
TABLE = pa.table(
    {"text": TEXTS, "year": YEARS, "flag": [i % 2 == 0 for i in range(200)], "tags": [["x"]] * 200}
)


def write_jsonl(path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in TABLE.to_pylist())
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=70)


def write_dictionary(path: Path) -> None:
    encoded = TABLE.set_column(0, "text", TABLE["text"].dictionary_encode())
    pa.parquet.write_table(encoded, path, row_group_size=90)


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_jsonl,
    "a.json": write_jsonl,
    "a.parquet": lambda path: pa.parquet.write_table(TABLE, path, row_group_size=33),
    "b.parquet": write_dictionary,
    "a.feather": lambda path: pa.feather.write_feather(TABLE, path, chunksize=33),
    "a.arrow": write_stream,
    "a.csv": lambda path: pa.csv.write_csv(TABLE.drop_columns("tags"), path),
    "a.tsv": lambda path: pa.csv.write_csv(
        TABLE.drop_columns("tags"), path, pa.csv.WriteOptions(delimiter="\t")
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables_and_lines_give_the_same_documents(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    tally = Tally()
    got = list(iter_documents([path], None, ["year", "flag"], tally=tally))
    assert got == [
        Document(str(path), i, text, {"year": YEARS[i], "flag": i % 2 == 0})
        for i, text in enumerate(TEXTS)
        if text
    ]
    assert (tally.documents, tally.skipped, tally.streams) == (198, 2, [])
    with pytest.raises(TextError, match=r"no (column )?'body'.*there are 'text', 'year', 'flag'"):
        list(iter_documents([path], "body", []))
    with pytest.raises(TextError, match=r"no (column )?'yaer'.*'year'"):
        list(iter_documents([path], None, ["yaer"]))
    if kind_of(path) != "csv":
        with pytest.raises(TextError, match=r"'flag' holds bool, expected (a )?string"):
            list(iter_documents([path], "flag", []))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.txt.gz", "noname"])
def test_a_plain_file_is_one_document_as_it_stands(tmp_path, name):
    path, text = tmp_path / name, "one\r\ntwo\n\n naïve"
    data = b"\xef\xbb\xbf" + text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert list(iter_documents([path], None, [])) == [Document(str(path), 0, text, {})]
    with pytest.raises(TextError, match="plain text, which has no columns, so label 'year'"):
        list(iter_documents([path], None, ["year"]))


def test_json_lines_may_be_strings_blank_or_lack_a_label(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": 1.5}\n\n"bare"\n{"text": null}\n{"text": "\\ud83e\\udd17"}')
    got = list(iter_documents([path], None, ["n"]))
    assert [(d.row, d.text, d.labels["n"]) for d in got] == [
        (0, "a", 1.5),
        (2, "bare", None),
        (4, "🤗", None),
    ]


def test_standard_input_is_text_or_lines_and_is_hashed(monkeypatch):
    data = b'{"text": "a"}\n{"text": "b"}\n'
    for kind, expected in (("jsonl", ["a", "b"]), (None, [data.decode()])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        tally = Tally()
        assert [
            d.text for d in iter_documents(expand_paths(["-"]), None, [], kind, tally)
        ] == expected
        assert [stream.describe() for stream in tally.streams] == [
            {"path": "-", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        ]
    with pytest.raises(TextError, match="standard input cannot be read as parquet"):
        list(iter_documents([STDIN], None, [], "parquet"))


BAD_LINES = {
    '{"text": "a"}\n{"text": ': r"a.jsonl:2 is not valid JSON \(.*\); expected one object or string a line",
    "[1]": "a.jsonl:1 holds a JSON list; expected an object with 'text'",
    '{"text": 3}': "a.jsonl:1: 'text' holds int, expected a string or null",
    '{"body": "a"}': "a.jsonl:1 has no 'text'; there are 'body'",
    '"\\ud83e"': "a.jsonl:1: 'text' holds half of a surrogate pair",
}


@pytest.mark.parametrize("content", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(TextError, match=BAD_LINES[content]):
        list(iter_documents([tmp_path / "a.jsonl"], None, []))


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "CSV_BLOCK", 4096)

    def read(name: str, data: bytes, *labels: str, kind: str | None = None) -> None:
        (tmp_path / name).write_bytes(data)
        list(iter_documents([tmp_path / name], None, labels, kind))

    with pytest.raises(TextError, match=r"a.txt is not UTF-8: byte 0xff at offset 3"):
        read("a.txt", b"abc\xff")
    with pytest.raises(TextError, match=r"a.jsonl is not UTF-8: byte 0xff at offset 6"):
        read("a.jsonl", b'"ab"\n"\xff"')
    with pytest.raises(
        TextError, match=r"a.parquet cannot be read as parquet: Parquet magic bytes not found"
    ):
        read("a.parquet", b"not a table")
    for name in ("a.arrow", "b.arrow", "a.csv", "a.jsonl.gz"):
        with pytest.raises(
            TextError, match=f"{name} cannot be read as .*: .* It is cut short, damaged"
        ):
            read(name, b"" if name == "b.arrow" else b"\x1f\x8bnot a table")
    with pytest.raises(
        TextError,
        match=r"cannot be read as csv: .*CSV conversion error to int64: invalid value 'x'",
    ):
        read("b.csv", b"text,n\n" + b"a,1\n" * 2000 + b"b,x\n", "n")
    with pytest.raises(
        TextError, match="A row is longer than 4096 bytes; write the table as Parquet or JSON lines"
    ):
        read("c.csv", b"text,n\n" + b"a" * 20_000 + b",1\n")
    with pytest.raises(
        TextError, match="'pdf' is not a format of text; expected one of text, jsonl"
    ):
        read("a.txt", b"a", kind="pdf")
    pa.parquet.write_table(TABLE, tmp_path / "t.parquet")
    with pytest.raises(
        TextError,
        match=r"column 'tags' holds list<.*>, expected numbers, strings, dates or booleans",
    ):
        list(iter_documents([tmp_path / "t.parquet"], None, ["tags"]))


def test_paths_expand_in_order_without_hidden_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "d/b.txt",
        "d/a.jsonl.gz",
        "d/e/c.PARQUET",
        "d/.hidden.txt",
        "d/.git/x.txt",
        "d/i.png",
        "x[1].txt",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    names = ["d/a.jsonl.gz", "d/b.txt", "d/e/c.PARQUET"]
    assert [str(p) for p in expand_paths(["d"])] == names
    assert [str(p) for p in expand_paths(["d/**/*.[tj]*", "x[1].txt", "-", "d"])] == [
        "d/a.jsonl.gz",
        "d/b.txt",
        "x[1].txt",
        "-",
        "d/e/c.PARQUET",
    ]
    assert [kind_of(Path(name)) for name in names] == ["jsonl", "text", "parquet"]
    for wrong in ("none.txt", "none/*.txt", ""):
        with pytest.raises(TextError, match=f"there is no file {wrong!r}".replace("*", r"\*")):
            expand_paths(["d", wrong])
    Path("empty").mkdir()
    with pytest.raises(TextError, match=r"directory 'empty' holds no file ending in .txt, "):
        expand_paths(["empty"])


def test_sources_are_described_by_size_and_content(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert describe_sources([tmp_path / "a.txt", STDIN]) == [
        {"path": str(tmp_path / "a.txt"), "size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    ]


def test_documents_are_read_as_they_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('"a"\n' * 3 + "broken")
    pa.parquet.write_table(TABLE, tmp_path / "a.parquet")
    monkeypatch.setattr(texts, "ROWS_PER_BATCH", 7)
    documents = iter_documents([tmp_path / "a.jsonl"], None, [])
    assert [next(documents).text for _ in range(3)] == ["a"] * 3
    assert sum(1 for _ in iter_documents([tmp_path / "a.parquet"], None, [])) == 198


def test_tokenising_needs_no_torch():
    code = "import sys, headwater.extractor.text.rows; assert not {'torch', 'ray', 'zarr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
