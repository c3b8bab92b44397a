"""The text of a request: which files or ids, how they become rows, and what is known of where they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater.extractor.config import RunConfig
from headwater.extractor.document_table import DocumentWriter
from headwater.extractor.plan import geometry
from headwater.extractor.sites import RequestError
from headwater.extractor.texts import STDIN, Tally, describe_sources, expand_paths, iter_documents
from headwater.extractor.tokenizer import Tokenizer, load_tokenizer
from headwater.extractor.tokens import Packing, RowBatch, iter_rows, iter_token_rows
from headwater.extractor.units import count
from headwater.extractor.weights import ModelConfig


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
        self.config, self.model = config, model
        self.tokenizer: Tokenizer | None = None
        self.packing: Packing | None = None
        self.tally = Tally()
        if config.tokens:
            self.ids = _load_ids(config.tokens)
            self.geometry = geometry(config, model, self.ids.shape[1])
            self.paths = [Path(config.tokens)]
            return
        self.geometry = geometry(config, model)
        home = config.tokenizer or tokenizer_home
        if home is None:
            raise RequestError(
                f"the model {config.model!r} comes without a tokenizer. Name one with --tokenizer (a "
                "tokenizer.json, its directory, or a hub id such as gpt2)."
            )
        self.tokenizer = load_tokenizer(home)
        self.packing = self._packing(self.tokenizer)
        self.paths = outside(Path(config.out), expand_paths(config.text))

    def rows(self, table: DocumentWriter | None = None) -> Iterator[RowBatch]:
        """Yield the rows in order, checked against the model's vocabulary."""
        c = self.config
        if self.tokenizer is None or self.packing is None:
            return iter_token_rows(self.ids, self.model.d_vocab, c.max_sequences)
        documents = iter_documents(self.paths, c.column, c.labels, "jsonl" if c.jsonl else None, tally=self.tally)
        return iter_rows(
            documents,
            self.tokenizer,
            self.packing,
            d_vocab=self.model.d_vocab,
            max_sequences=c.max_sequences,
            max_tokens=c.max_tokens,
            table=table,
        )

    def describe(self) -> dict[str, Any]:
        """Return what the manifest keeps of the text's origin: files with size and sha256, and how rows were made."""
        files = [path for path in self.paths if path != STDIN]
        sources = describe_sources(files) + ([self.tally.stdin] if self.tally.stdin else [])
        packing = None
        if self.packing is not None:
            p = self.packing
            packing = {"mode": p.mode, "across_documents": p.across_documents, "bos": p.bos, "eot": p.eot}
        return {"sources": sources, "packing": packing, "request": text_request(self.config)}

    def _packing(self, tokenizer: Tokenizer) -> Packing:
        eot = tokenizer.end_of_text if tokenizer.end_of_text is not None else self.model.eos_token_id
        bos = self.model.bos_token_id if self.model.bos_token_id is not None else eot
        if self.config.bos and bos is None:
            raise RequestError(
                "--bos: neither the model nor the tokenizer names a beginning-of-text token. Leave it out."
            )
        return Packing(
            self.geometry.seq_len,
            self.config.mode,
            not self.config.within_documents,
            bos if self.config.bos else None,
            eot,
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


def _load_ids(path: str) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RequestError(
            f"--tokens {path} cannot be read ({error}). Expected a .npy file of whole numbers "
            "[sequence, position], as numpy.save writes it."
        ) from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2:
        raise RequestError(f"--tokens {path} has shape {list(getattr(ids, 'shape', []))}; expected 2 dimensions.")
    return ids
