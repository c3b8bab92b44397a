"""Reference corpora: the tokens of a run, or of a text that is tokenised with a model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from headwater.analysis.measures.sink_rows import segments
from headwater.analysis.weights.npmi import Corpus, join_pieces
from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.text.documents import iter_documents
from headwater.extractor.text.paths import expand_paths
from headwater.extractor.tokenizer import encode_documents, load_run_tokenizer, load_tokenizer
from headwater.store.manifest import RunError, manifest_path
from headwater.store.place import place_of
from headwater.store.reader import Run, open_run

MAX_TOKENS = 2_000_000


def open_corpus(
    source: Run | str | Path | Sequence[str | Path],
    checkpoint: Checkpoint,
    max_tokens: int = MAX_TOKENS,
) -> Corpus:
    """Read a run's tokens, or files, directories and globs of text, up to `max_tokens` tokens.

    Pieces are the stretches of a run's rows that see one another, or documents. Raises ValueError for a run whose ids
    mean other tokens than the model's, for text where the model has no tokenizer, and where there is no text.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 1.")
    run = _as_run(source)
    if run is not None:
        _same_vocabulary(run, checkpoint)
        pieces = _run_pieces(run)
        name = run.path.name
    else:
        paths = [source] if isinstance(source, str | Path) else list(source)
        pieces = _text_pieces([str(path) for path in paths], checkpoint)
        name = ", ".join(map(str, paths))
    kept = []
    room = max_tokens
    for piece in pieces:
        kept.append(piece[:room])
        room -= len(kept[-1])
        if room <= 0:
            break
    if room == max_tokens:
        raise ValueError(
            f"the reference corpus {name} has no tokens; name a text or a run that has some."
        )
    return join_pieces(name, kept)


def _as_run(source: Run | str | Path | Sequence[str | Path]) -> Run | None:
    if isinstance(source, Run):
        return source
    if isinstance(source, str | Path) and manifest_path(place_of(source)).is_file():
        return open_run(source)
    return None


def _same_vocabulary(run: Run, checkpoint: Checkpoint) -> None:
    """Refuse a run whose token ids are not the model's."""
    n = run.manifest.model["config"]["d_vocab"]
    size = checkpoint.config.d_vocab
    own = load_run_tokenizer(run)
    same = n == size
    if same and own is not None and checkpoint.tokenizer is not None:
        other = load_tokenizer(checkpoint.tokenizer)
        same = own.token_strings(range(size)) == other.token_strings(range(size))
    if not same:
        raise RunError(
            f"{run.path} was made with another vocabulary ({n} tokens) than that of {checkpoint.name} ({size} tokens). "
            "Name a run of this model, or a text."
        )


def _run_pieces(run: Run) -> Iterator[np.ndarray]:
    for tokens, row_start in zip(run.tokens, run.plain("row_start"), strict=True):
        for first, last in segments(row_start):
            yield tokens[first:last]


def _text_pieces(paths: list[str], checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"{checkpoint.name} has no tokenizer, so a text cannot be read with it. Name a run of this model as the "
            "reference corpus."
        )
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    for _, parts in encode_documents(iter_documents(expand_paths(paths), None, ()), tokenizer):
        yield np.concatenate(list(parts))
