"""The text of a request: which files or ids, how they become rows, and what is known of where they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwater.extractor.model.weights import ModelConfig
from headwater.extractor.plan import geometry
from headwater.extractor.request import RunConfig
from headwater.extractor.sites import RequestError
from headwater.extractor.text.documents import Document, Tally, describe_sources, iter_documents
from headwater.extractor.text.ids import load_ids
from headwater.extractor.text.paths import expand_paths
from headwater.extractor.text.rows import Packing, RowBatch, iter_rows, iter_token_rows
from headwater.extractor.text.table import DocumentCount, DocumentWriter
from headwater.extractor.tokenizer import Tokenizer, load_tokenizer
from headwater.extractor.units import count


class Source:
    """The rows of a request, text or ready ids, and what is known of where they come from."""

    def __init__(self, config: RunConfig, model: ModelConfig, tokenizer_home: Path | None) -> None:
        if bool(config.text) == bool(config.tokens):
            raise RequestError(
                "expected either --text or --tokens, "
                f"{'not both' if config.text else 'but got neither'}. Name a text file, a directory, a "
                "glob or '-', or a .npy file of token ids."
            )
        for name in config.labels:
            if "/" in name or not name.isprintable():
                raise RequestError(
                    f"--labels {name!r}: a label becomes the name of an array, so it cannot have '/' or control "
                    "characters in it. Rename the column."
                )
        self.config = config
        self.model = model
        self.tokenizer: Tokenizer | None = None
        self.packing: Packing | None = None
        self.tally = Tally()
        self.count = DocumentCount()
        if config.tokens:
            self.ids = load_ids(config.tokens)
            self.seq_len = self._window()
            self.geometry = geometry(config, model, self.seq_len or self.ids.shape[1])
            self.paths = [Path(config.tokens)]
            return
        self.geometry = geometry(config, model)
        if home := config.tokenizer or tokenizer_home:
            self.tokenizer = load_tokenizer(home, config.special_tokens)
        self.packing = self._packing(self.tokenizer)
        self.paths = outside(Path(config.out), expand_paths(config.text))

    def rows(self, table: DocumentWriter | None = None) -> Iterator[RowBatch]:
        """Yield the rows in order, checked against the model's vocabulary; `count` counts their documents."""
        c = self.config
        if self.packing is None:
            return iter_token_rows(
                self.ids, self.model.d_vocab, c.max_sequences, self.seq_len, c.stride
            )
        self.count = table or DocumentCount()
        documents = iter_documents(
            self.paths,
            c.column,
            c.labels,
            "jsonl" if c.jsonl else None,
            tally=self.tally,
            max_unpacked=c.max_unpacked,
        )
        first = next(documents, None)
        if first is not None and first.ids is not None:
            self.packing = replace(self.packing, eot=None)  # ready ids are taken as they are
        return iter_rows(
            self._of_one_kind(first, documents),
            self.tokenizer,
            self.packing,
            d_vocab=self.model.d_vocab,
            max_sequences=c.max_sequences,
            max_tokens=c.max_tokens,
            table=self.count,
        )

    def describe(self) -> dict[str, Any]:
        """Return what the manifest keeps of the text's origin: files with size and sha256, and `layout`."""
        sources = describe_sources(self.paths)
        sources += [stream.describe() for stream in self.tally.streams]
        return {"sources": sources} | self.layout()

    def layout(self) -> dict[str, Any]:
        """Return how rows were made, and how many documents there were and were cut, once they are read."""
        if self.packing is None:
            return {"packing": None, "request": text_request(self.config)}
        p = self.packing
        packing = {
            "mode": p.mode,
            "across_documents": p.across_documents,
            "bos": p.bos,
            "eot": p.eot,
            "stride": p.stride,
        }
        return {
            "packing": packing,
            "request": text_request(self.config),
            "documents": {"n": self.count.n_documents, "cut": self.count.n_cut},
        }

    def _of_one_kind(
        self, first: Document | None, documents: Iterator[Document]
    ) -> Iterator[Document]:
        """Yield documents that are all texts, for which there must be a tokenizer, or all ready ids."""
        if first is None:
            return
        if first.ids is None and self.tokenizer is None:
            raise RequestError(
                f"the model {self.config.model!r} comes without a tokenizer. Name one with --tokenizer (a "
                "tokenizer.json, its directory, or a hub id such as gpt2)."
            )
        yield first
        for document in documents:
            if (document.ids is None) != (first.ids is None):
                raise RequestError(
                    f"{document.source}, row {document.row} holds {'text' if document.ids is None else 'token ids'}, "
                    f"{first.source}, row {first.row} the other: expected one of them. Make two runs."
                )
            yield document

    def _window(self) -> int | None:
        """Return the length of the windows that the rows of --tokens are cut into; None where they stay as they are."""
        c = self.config
        longest = geometry(c, self.model).seq_len
        if self.ids.ndim == 1:
            self.ids = self.ids[None]
        elif self.ids.shape[1] <= longest or (c.stride is None and c.seq_len is None):
            return None
        elif c.stride is None:
            raise RequestError(
                f"the rows of --tokens have {self.ids.shape[1]} positions, more than --seq-len {longest}. Cut them, or "
                f"make windows over them with --stride {longest}."
            )
        return min(longest, int(self.ids.shape[1]))

    def _packing(self, tokenizer: Tokenizer | None) -> Packing:
        c = self.config
        stated = self.model.bos_token_id
        end = self.model.eos_token_id
        eot = end if tokenizer is None else tokenizer.ending(end)
        bos = None
        if c.bos and tokenizer is None:
            bos = end if stated is None else stated
        elif c.bos and tokenizer is not None:
            bos = tokenizer.beginning(stated, end)
        if c.bos and bos is None:
            named = tokenizer.token_strings([stated]) if tokenizer and stated is not None else []
            raise RequestError(
                "--bos: the tokenizer declares no beginning-of-text token"
                + (
                    f", and the model's ({stated}) is its ordinary word {named[0]!r}"
                    if named
                    else ""
                )
                + ". Write bos_token into a tokenizer_config.json beside it, or leave --bos out."
            )
        return Packing(
            self.geometry.seq_len, c.mode, not c.within_documents, bos, eot, stride=c.stride
        )


def text_request(config: RunConfig) -> dict[str, Any]:
    """Return the settings that choose and lay out the text, as JSON values."""
    c = config
    return {
        "text": list(c.text),
        "tokens": c.tokens,
        "column": c.column,
        "labels": list(c.labels),
        "tokenizer": c.tokenizer,
        "mode": c.mode,
        "stride": c.stride,
        "special_tokens": c.special_tokens,
        "within_documents": c.within_documents,
        "bos": c.bos,
        "jsonl": c.jsonl,
        "max_sequences": c.max_sequences,
        "max_tokens": c.max_tokens,
    }


def count_rows(source: Source) -> int:
    """Count the rows of a request without keeping them; raise RequestError where there is none."""
    return check_rows(sum(len(batch.tokens) for batch in source.rows()), source)


def check_rows(n: int, source: Source) -> int:
    """Return n, the number of a source's rows; raise RequestError where there is none."""
    if n == 0:
        raise RequestError(
            f"the text holds no tokens ({count(source.tally.skipped, 'empty document')}). Name other files, or another "
            "--column."
        )
    return n


def outside(run: Path, paths: Sequence[Path]) -> list[Path]:
    """Leave out what lies in the run itself, so that a run can be made inside the directory of its text."""
    home = os.path.abspath(run) + os.sep
    return [path for path in paths if not os.path.abspath(path).startswith(home)]
