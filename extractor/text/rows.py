"""Lay the tokens of documents into rows of equal length, so that every token can be traced to where it stood.

Position t sees the keys row_start[t] to t, and its position embedding is t - row_start[t]. At padding, left or right,
the token is -1 and row_start[t] is t + 1: an empty attention row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from headwater.extractor.text.documents import Document
from headwater.extractor.text.table import DocumentCount
from headwater.extractor.tokenizer import GROUP_CHARS, PIECE_CHARS, Tokenizer, encode_documents

PADDING = -1
ROWS_PER_BATCH = 256
PADDING_CHUNK = 1 << 20


@dataclass(frozen=True)
class RowBatch:
    """At most 256 rows of T positions.

    tokens int32 [n, T], -1 at padding; length int32 [n], the index after the last real token; row_start int32 [n, T];
    document int64 [n], the number of the row's first document; offset int64 [n], the index in that document of the
    row's first token after `Packing.row_lead`, -1 where that is the document's own beginning-of-text token.
    """

    tokens: np.ndarray
    length: np.ndarray
    row_start: np.ndarray
    document: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class Packing:
    """How documents become rows of `seq_len` tokens.

    "pack" joins documents, each followed by `eot`, which belongs to it, and cuts rows of exactly `seq_len`; only the
    last one may be shorter. With `across_documents`, attention and positions run through the row and `bos` stands at
    the start of each row; without, they begin anew with each document and `bos` stands at the start of each document
    (a row that continues a document has none). "document" gives each document one row, `bos` first, cut at `seq_len`,
    without `eot`; with `stride` a longer one gets several, each `stride` of its tokens after the one before, each
    with `bos`, and every row stands for itself. Raises ValueError for what cannot be laid out.
    """

    seq_len: int
    mode: str = "pack"
    across_documents: bool = True
    bos: int | None = None
    eot: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("pack", "document"):
            raise ValueError(f"mode is {self.mode!r}; expected 'pack' or 'document'.")
        if self.seq_len < (least := 1 if self.bos is None else 2):
            raise ValueError(
                f"seq_len is {self.seq_len}; expected at least {least}, room for a token"
                f"{' after the beginning-of-text token' if least == 2 else ''}."
            )

        if self.stride is not None:
            if self.mode != "document":
                raise ValueError(
                    "--stride makes several sequences of a long document, with --mode document; pack leaves nothing "
                    "out. Leave one of them out."
                )
            check_stride(self.stride, self.seq_len - self.document_lead)

    @property
    def row_lead(self) -> int:
        """Count the tokens in a row before those of documents."""
        return int(self.bos is not None and self.mode == "pack" and self.across_documents)

    @property
    def document_lead(self) -> int:
        """Count the tokens before a document's own."""
        return int(self.bos is not None) - self.row_lead

    @property
    def document_tail(self) -> int:
        """Count the tokens after a document's own."""
        return int(self.eot is not None and self.mode == "pack")


def check_stride(stride: int, width: int) -> None:
    """Refuse a stride that would leave tokens out."""
    if not 1 <= stride <= width:
        raise ValueError(
            f"--stride is {stride}; expected 1 to {width}, the tokens of a sequence, so that none is left out between "
            "two of them."
        )


class Origin(NamedTuple):
    """Where a token stood: document, index in it (-1 for `bos`, its n_tokens for `eot`), file and row of the file."""

    document: int
    offset: int
    source: str
    row: int


def trace(
    documents: pa.Table, packing: Packing, document: int, offset: int, position: int
) -> Origin:
    """Find the origin of the token at `position` of a row that starts at `offset` of `document`.

    `documents` is the table in a `DocumentWriter`'s file. Raises ValueError past the end of the text.
    """
    n_tokens = documents["n_tokens"]
    start = offset
    offset += position - packing.row_lead
    if position == 0 and (packing.row_lead or (packing.bos is not None and packing.stride)):
        offset = -1
    while document < len(n_tokens) and offset >= (
        end := n_tokens[document].as_py() + packing.document_tail
    ):
        offset -= end + packing.document_lead
        if packing.mode == "pack":
            document = document + 1
        else:
            document = len(n_tokens)
    if document >= len(n_tokens) or position < 0:
        raise ValueError(
            f"position {position} of a row that starts at token {start} of its document lies outside the "
            "text; expected a position from 0 to below the row's length."
        )
    return Origin(
        document, offset, documents["source"][document].as_py(), documents["row"][document].as_py()
    )


def check_d_vocab(ids: np.ndarray, tokenizer: Tokenizer, d_vocab: int) -> None:
    """Refuse ids of a tokenizer that the model has no embedding for."""
    if len(ids) and (highest := int(ids.max())) >= d_vocab:
        raise ValueError(
            f"the tokenizer gives id {highest} ({tokenizer.token_strings([highest])[0]!r}; its vocabulary "
            f"has {tokenizer.d_vocab} ids), but the model's d_vocab is {d_vocab}. Use the tokenizer that "
            "belongs to the model."
        )


def iter_rows(
    documents: Iterable[Document],
    tokenizer: Tokenizer | None,
    packing: Packing,
    *,
    d_vocab: int | None = None,
    max_sequences: int | None = None,
    max_tokens: int | None = None,
    table: DocumentCount | None = None,
) -> Iterator[RowBatch]:
    """Tokenise documents and yield their rows; documents without tokens get none and no number.

    `max_tokens` counts everything up to `length`; the last row is cut to meet it exactly (but a row is never `bos`
    alone). Documents that reach the rows are added to `table`. With `d_vocab`, ids are checked against the model.
    Documents of ready ids need no tokenizer, but then `d_vocab`.
    """
    _check_limit("max_sequences", max_sequences)
    _check_limit("max_tokens", max_tokens)
    n_ids = d_vocab or (tokenizer.d_vocab if tokenizer is not None else 0)
    for name, token in (("bos", packing.bos), ("eot", packing.eot)):
        if token is not None and not 0 <= token < n_ids:
            raise ValueError(
                f"{name} is {token}; expected an id of the model, 0 to {n_ids - 1}, or None for none."
            )
    lay, long_chars = (_pack, GROUP_CHARS) if packing.mode == "pack" else (_one_each, PIECE_CHARS)
    encoded = (
        (document, _checked(document, parts, tokenizer, n_ids))
        for document, parts in _encode(documents, tokenizer, long_chars)
    )
    return lay(encoded, packing, max_sequences or sys.maxsize, max_tokens or sys.maxsize, table)


def iter_token_rows(
    ids: np.ndarray,
    d_vocab: int,
    max_sequences: int | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
) -> Iterator[RowBatch]:
    """Yield rows of ready token ids, an integer array [n, T] that may be memory-mapped; row i is document i.

    -1 at the left or right end of a row is padding. With `seq_len` each row is cut into windows of that length, each
    `stride` after the one before, the last one padded. Raises ValueError for another dtype or shape, for ids outside
    0 to d_vocab - 1 and for -1 between tokens, naming the first and where it is.
    """
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        raise ValueError(
            f"token ids have dtype {ids.dtype} and shape {list(ids.shape)}; expected integers of shape "
            "[sequence, position], at least one of each. Save the array so."
        )
    _check_limit("max_sequences", max_sequences)
    if seq_len is not None:
        check_stride(stride or seq_len, seq_len)
        return _windows_of_rows(
            ids, d_vocab, max_sequences or sys.maxsize, seq_len, stride or seq_len
        )
    if max_sequences is None:
        n_rows = len(ids)
    else:
        n_rows = min(len(ids), max_sequences)
    return (
        _token_batch(
            np.asarray(ids[first : first + ROWS_PER_BATCH][: n_rows - first]),
            d_vocab,
            np.arange(first, min(first + ROWS_PER_BATCH, n_rows)),
            np.zeros(min(ROWS_PER_BATCH, n_rows - first), np.int64),
        )
        for first in range(0, n_rows, ROWS_PER_BATCH)
    )


def _windows_of_rows(
    ids: np.ndarray, d_vocab: int, max_sequences: int, seq_len: int, stride: int
) -> Iterator[RowBatch]:
    """Cut long rows, of which memory holds one batch of windows at a time."""
    places = islice(_window_places(ids, seq_len, stride), max_sequences)
    while group := list(islice(places, ROWS_PER_BATCH)):
        # int64: the array may hold ids beyond int32, which must be refused and not wrapped.
        part = np.full((len(group), seq_len), PADDING, np.int64)
        for window, (row, first, stop) in zip(part, group, strict=True):
            window[: stop - first] = ids[row, first:stop]
        document, offset, _ = np.array(group, np.int64).T
        yield _token_batch(part, d_vocab, document, offset)


def _window_places(ids: np.ndarray, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield row, first and stop of every window over the tokens between a row's padding."""
    for row in range(len(ids)):
        first = _padding(ids[row], 1)
        stop = ids.shape[1] - _padding(ids[row], -1)
        if first > stop:
            raise ValueError(
                f"row {row} of the token ids is all padding (-1); expected a token. Leave it out."
            )
        yield row, first, min(first + seq_len, stop)
        while first + seq_len < stop:
            first += stride
            yield row, first, min(first + seq_len, stop)


def _padding(row: np.ndarray, step: int) -> int:
    """Count the padding at the left (step 1) or right (-1) end of a row."""
    ordered = row[::step]
    # The ids may be a memory map of gigabytes a row: the ends are looked at piece by piece.
    for first in range(0, len(ordered), PADDING_CHUNK):
        real = np.asarray(ordered[first : first + PADDING_CHUNK]) != PADDING
        if real.any():
            return first + int(real.argmax())
    return len(row)


def _check_limit(name: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"{name} is {limit}; expected at least 1, or None to take everything.")


def _token_batch(
    part: np.ndarray, d_vocab: int, document: np.ndarray, offset: np.ndarray
) -> RowBatch:
    """Check ids [n, T]; `document` and `offset` [n] say where each row stands."""
    columns = np.arange(part.shape[1], dtype=np.int32)
    # argmax of booleans is the first true one: from the left the row's start, from the right its end.
    real = part != PADDING
    start = real.argmax(1)
    length = part.shape[1] - real[:, ::-1].argmax(1)
    inside = (columns >= start[:, None]) & (columns < length[:, None])
    # A −1 between tokens is inside and negative, so it is refused together with ids out of range.
    wrong = inside & ((part < 0) | (part >= d_vocab)) | ~real.any(1)[:, None]
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        if not real[row].any():
            raise ValueError(
                f"row {document[row]} of the token ids is all padding (-1); expected a token. Leave it out."
            )
        raise ValueError(
            f"token id {part[row, column]} at row {document[row]}, position {offset[row] + column} is outside the "
            f"model's ids, 0 to {d_vocab - 1}; padding (-1) may stand at the ends of a row only. Use ids made by "
            "the model's own tokenizer."
        )
    # Left of the start and right of the end a position sees nothing.
    row_start = np.where(inside, start[:, None], columns + 1).astype(np.int32)
    return RowBatch(part.astype(np.int32), length.astype(np.int32), row_start, document, offset)


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer | None, long_chars: int
) -> Iterator[tuple[Document, Iterator[np.ndarray]]]:
    if tokenizer is not None:
        yield from encode_documents(documents, tokenizer, long_chars)
        return
    for document in documents:
        if document.ids is None:
            raise ValueError(f"{document.source} holds text, for which a tokenizer is needed.")
        yield document, iter([document.ids])


def _checked(
    document: Document, parts: Iterable[np.ndarray], tokenizer: Tokenizer | None, d_vocab: int
) -> Iterator[np.ndarray]:
    for ids in parts:
        if document.ids is None and tokenizer is not None:
            check_d_vocab(ids, tokenizer, d_vocab)
        elif ((ids < 0) | (ids >= d_vocab)).any():
            wrong = int(ids[(ids < 0) | (ids >= d_vocab)][0])
            raise ValueError(
                f"{document.source}, row {document.row} holds the token id {wrong}, which is outside the model's ids, "
                f"0 to {d_vocab - 1}. Use ids made by the model's own tokenizer; an attention_mask beside them leaves "
                "padding out."
            )
        yield ids.astype(np.int32, copy=False)


def _pack(
    encoded: Iterable[tuple[Document, Iterator[np.ndarray]]],
    packing: Packing,
    max_sequences: int,
    max_tokens: int,
    table: DocumentCount | None,
) -> Iterator[RowBatch]:
    """Fill a buffer of 256 rows without their leads, `begin` holding the index there where a document begins."""
    width = packing.seq_len - packing.row_lead
    # max_tokens counts the leads of rows, the buffer does not hold them: whole rows give `width` tokens each, and
    # the last, cut row what is left behind its lead.
    rows, rest = divmod(max_tokens, packing.seq_len)
    left = min(max_sequences * width, rows * width + max(rest - packing.row_lead, 0))
    size = ROWS_PER_BATCH * width
    # Memory: 256 rows of tokens (4 bytes), begins (8 bytes), and the few rows' own columns; a document of any
    # length passes through in parts.
    flat = np.empty(size, np.int32)
    begin = np.empty(size, np.int64)
    first = np.empty(ROWS_PER_BATCH, np.int64)
    offset = np.empty(ROWS_PER_BATCH, np.int64)
    lead = np.array([packing.bos] if packing.document_lead else [], np.int32)
    tail = np.array([packing.eot] if packing.document_tail else [], np.int32)
    fill = 0
    for number, (document, parts) in enumerate(encoded if left else ()):
        n_tokens = 0
        placed = -len(lead)
        complete = True
        # `placed` counts the document's own tokens before this part, so its lead stands at −len(lead).
        for ids in chain([lead], parts, [tail]):
            taken = ids[:left]
            complete &= ids is tail or len(taken) == len(ids)
            n_tokens += 0 if ids is lead or ids is tail else len(taken)
            left -= len(taken)
            while len(taken):
                n = min(len(taken), size - fill)
                # A document that began in an earlier buffer has a negative begin; `_packed` takes the row's start then.
                flat[fill : fill + n], begin[fill : fill + n] = taken[:n], fill - placed - len(lead)
                # The rows that begin within this stretch: at multiples of `width` from fill on. Each notes to which
                # document its first token belongs, and how far into it that is.
                starts = np.arange(-(-fill // width), -(-(fill + n) // width))
                first[starts], offset[starts] = number, starts * width - fill + placed
                fill = fill + n
                placed = placed + n
                taken = taken[n:]
                if fill == size:
                    yield _packed(packing, flat, begin, first, offset)
                    fill = 0
            if not left and not complete:
                break
        if table is not None:
            table.add(document, n_tokens, complete)
        if not left:
            break
    if fill:
        yield _packed(packing, flat[:fill], begin[:fill], first, offset)


def _packed(
    packing: Packing, flat: np.ndarray, begin: np.ndarray, first: np.ndarray, offset: np.ndarray
) -> RowBatch:
    width = packing.seq_len - packing.row_lead
    lead = packing.row_lead
    n = -(-len(flat) // width)
    tokens = np.full((n, packing.seq_len), PADDING, np.int32)
    row_start = np.zeros((n, packing.seq_len), np.int32)
    length = np.full(n, packing.seq_len, np.int32)
    length[-1] = lead + len(flat) - (n - 1) * width
    # The buffer cut into rows; every row then begins with its own lead, which is no token of a document.
    row, column = np.divmod(np.arange(len(flat)), width)
    tokens[row, column + lead] = flat
    if packing.bos is not None and lead:
        tokens[:, 0] = packing.bos
    if not packing.across_documents:
        # A token sees its document from where that begins in this row. Padding behind the end sees nothing: a start
        # behind itself.
        row_start[row, column] = np.maximum(begin - row * width, 0)
    row_start[-1, length[-1] :] = np.arange(length[-1], packing.seq_len) + 1
    return RowBatch(tokens, length, row_start, first[:n].copy(), offset[:n].copy())


def _one_each(
    encoded: Iterable[tuple[Document, Iterator[np.ndarray]]],
    packing: Packing,
    max_sequences: int,
    max_tokens: int,
    table: DocumentCount | None,
) -> Iterator[RowBatch]:
    lead = np.array([packing.bos] if packing.document_lead else [], np.int32)
    width = packing.seq_len - len(lead)
    rows: list[tuple[np.ndarray, int, int]] = []
    n_rows = 0
    full = max_tokens <= len(lead)
    for number, (document, parts) in enumerate(() if full else encoded):
        placed = 0
        complete = False
        for offset, ids, ends in _windows(parts, width, packing.stride):
            taken = ids[: max_tokens - len(lead)]
            rows.append((np.concatenate([lead, taken]), number, offset - len(lead)))
            n_rows += 1
            max_tokens -= len(rows[-1][0])
            placed = offset + len(taken)
            complete = ends and len(taken) == len(ids)
            if len(rows) == ROWS_PER_BATCH:
                yield _padded(packing, rows)
                rows = []
            full = n_rows == max_sequences or max_tokens <= len(lead)
            if full:
                break
        if table is not None:
            table.add(document, placed, complete)
        if full:
            break
    if rows:
        yield _padded(packing, rows)


def _windows(
    parts: Iterable[np.ndarray], width: int, stride: int | None
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Yield where each window over a document's ids begins, its ids, and whether it reaches their end.

    Without a stride there is one window. Each window holds ids that none before it does.
    """
    held = np.empty(0, np.int32)
    offset = 0
    for ids in parts:
        # Strictly more than a window: only then is it certain that the next window holds an id of its own.
        held = np.concatenate([held, ids])
        while len(held) > width:
            yield offset, held[:width], False
            if stride is None:
                return
            held = held[stride:]
            offset += stride
    yield offset, held, True


def _padded(packing: Packing, rows: list[tuple[np.ndarray, int, int]]) -> RowBatch:
    """Pad rows at the right; each comes with its document and its offset there."""
    length = np.array([len(ids) for ids, _, _ in rows], np.int32)
    columns = np.arange(packing.seq_len, dtype=np.int32)
    real = columns < length[:, None]
    tokens = np.full(real.shape, PADDING, np.int32)
    # Boolean assignment goes by rows, as the concatenated ids do.
    tokens[real] = np.concatenate([ids for ids, _, _ in rows])
    row_start = np.where(real, 0, columns + 1).astype(np.int32)
    document = np.array([number for _, number, _ in rows], np.int64)
    offset = np.array([offset for _, _, offset in rows], np.int64)
    return RowBatch(tokens, length, row_start, document, offset)
