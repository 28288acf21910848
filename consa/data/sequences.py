"""Tokenise text into long sequences, each from one document, on all cores, and cache them by content."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from consa.data.documents import Document, Source, find_sources
from consa.errors import ConsaError
from consa.files import cache_dir as default_cache_dir
from consa.files import is_sealed, read_sealed, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["all", "train", "heldout"]

FORMAT_VERSION = 3
"""Part of every cache key: raise it when the same input should give other sequences or other files."""

PIECE_CHARS = 2**20
"""Documents of more than twice as many characters are tokenised in pieces, to save memory and use all cores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceSet:
    """Token sequences of one length, each from a single document.

    Attributes:
        tokens: (num_sequences, seq_len), read-only, uint16 where the vocabulary fits and int32 otherwise;
            memory-mapped when it comes from the cache. Convert a batch to int64 before embedding it.
        domains: (num_sequences,) the `domain` field of the document, or "", or the extension of a whole file.
        documents: (num_sequences,) int64, index of the source document among all documents of both splits: train and
            held-out sequences of the same data never share an index, unless the data is a single document.
        num_documents: documents of the split that were read.
        num_skipped: those that gave no sequence, because they are shorter than `seq_len` tokens or not text.
    """

    tokens: np.ndarray
    domains: tuple[str, ...]
    documents: np.ndarray
    num_documents: int
    num_skipped: int

    def spread(self, count: int) -> SequenceSet:
        """At most `count` sequences: the first of every document, then the second of every document, and so on."""
        _, first, place = np.unique(self.documents, return_index=True, return_inverse=True)
        rank = np.arange(len(self.documents)) - first[place]  # sequences of a document are contiguous
        rows = np.argsort(rank, kind="stable")[:count]
        return replace(
            self,
            tokens=self.tokens[rows],
            domains=tuple(self.domains[row] for row in rows),
            documents=self.documents[rows],
        )


def load_sequences(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    split: Split = "all",
    heldout_fraction: float = 0.1,
    max_tokens: int | None = None,
    text_field: str = "text",
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> SequenceSet:
    """Read text, tokenise it and cut it into sequences of exactly `seq_len` tokens.

    A document of n tokens gives floor(n / seq_len) consecutive sequences; its last n mod seq_len tokens are
    dropped. If the tokenizer puts a beginning-of-sequence token before text, every sequence starts with it and has
    `seq_len - 1` tokens of text. No end-of-sequence token is added.

    Args:
        data: A file, a folder (read recursively, without hidden files), a glob, `stdlib` (the sources of the
            running Python's standard library), `hf:owner/name[:config][:split]` (a Hugging Face dataset), or
            several of these separated by commas. Records of `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet` files
            are documents, any other file is one document. All but parquet may be compressed (`.zst`, `.gz`).
        tokenizer: A transformers tokenizer.
        seq_len: Tokens per sequence.
        split: `train` or `heldout` selects documents by a hash of their text, at least one each; the end of a single
            document is held out. `all` selects every document.
        heldout_fraction: Expected share of the documents that are held out.
        max_tokens: Maximum tokens of all sequences together, in reading order; None means no limit.
        text_field: Field of a JSONL record or dataset row that holds the text.
        cache_dir: Folder of the cache; by default `files.cache_dir()`.
        workers: Number of tokenising threads; by default one per CPU.
        progress: Show a progress bar on stderr if that is a terminal.

    Raises:
        ConsaError: the data cannot be read, or has no sequence of this length in this split.
    """
    for is_good, message in (
        (seq_len >= 2, f"seq_len is {seq_len}; it must be at least 2 tokens"),
        (split in get_args(Split), f"split is {split!r}; choose one of {', '.join(get_args(Split))}"),
        (0 < heldout_fraction < 1, f"heldout_fraction is {heldout_fraction}; it must lie between 0 and 1"),
        (max_tokens is None or max_tokens >= seq_len, f"max_tokens is {max_tokens}; allow at least {seq_len}"),
        (workers is None or workers >= 1, f"workers is {workers}; it must be at least 1"),
    ):
        if not is_good:
            raise ConsaError(message)
    encoder = _Encoder(tokenizer, workers or os.cpu_count() or 1)
    try:
        sources = find_sources(data, text_field)
        options = [FORMAT_VERSION, seq_len, split, heldout_fraction, max_tokens, text_field]
        identity = [encoder.identity, options, *(source.identity for source in sources)]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        entry = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "sequences" / key
        return _load_entry(entry) or _store_entry(
            entry, _cut(data, sources, encoder, seq_len, split, heldout_fraction, max_tokens, progress)
        )
    except OSError as error:
        raise ConsaError(f"cannot read {error.filename or data}: {error.strerror or error}") from error


def _cut(
    data: str,
    sources: list[Source],
    encoder: _Encoder,
    seq_len: int,
    split: Split,
    heldout_fraction: float,
    max_tokens: int | None,
    progress: bool,
) -> SequenceSet:
    from rich.console import Console
    from rich.progress import Progress

    limit = 0 if split == "all" else _limit(sources, heldout_fraction, seq_len)

    def in_split(document: Document) -> bool:
        return split == "all" or limit is None or (_place(document) < limit) == (split == "heldout")

    text_len = seq_len - len(encoder.prefix)
    max_sequences = sys.maxsize if max_tokens is None else max_tokens // seq_len
    buffer = bytearray()  # grows in place; a list of arrays would need twice the memory to join
    domains: list[str] = []
    indices: list[int] = []
    num_read = num_documents = num_skipped = longest = 0
    console = Console(stderr=True)
    console.quiet = not (progress and console.is_terminal)  # rich < 14.3 ends a disabled bar with a newline
    with Progress(console=console, transient=True, disable=console.quiet) as bar:
        task = bar.add_task("Tokenising", total=sum(source.size for source in sources))
        documents = (document for source in sources for document in source.read(partial(bar.advance, task)))
        with closing(_tokenize(documents, in_split, encoder)) as tokenised:
            for index, (document, pieces) in enumerate(tokenised):
                num_read += 1
                if pieces is None:
                    continue
                ids = np.concatenate([piece.result() for piece in pieces])
                longest = max(longest, len(ids))
                if limit is None:
                    ids = _part(ids, split, heldout_fraction, text_len)
                count = min(len(ids) // text_len, max_sequences - len(indices))
                num_documents += 1
                num_skipped += count == 0
                rows = np.empty((count, seq_len), encoder.dtype)
                rows[:, :-text_len] = encoder.prefix
                rows[:, -text_len:] = ids[: count * text_len].reshape(count, text_len)
                buffer += rows.tobytes()
                domains += [document.domain] * count
                indices += [index] * count
                if len(indices) == max_sequences:
                    break
    if num_read and not num_documents:
        raise ConsaError(
            f"split {split!r} with heldout_fraction {heldout_fraction} has none of the {num_read} documents of "
            f"{data!r}; add documents, or name others to measure on (heldout_data)"
        )
    if not longest:
        raise ConsaError(f"data {data!r} holds no text; name files with text in UTF-8")
    if not indices and longest >= text_len:
        raise ConsaError(
            f"data {data!r} is a single document of {longest} tokens, of which one sequence of seq_len {seq_len} is"
            f" held out and none is left; lower seq_len to {longest // 2}, or add documents"
        )
    if not indices:
        raise ConsaError(
            f"seq_len {seq_len} is longer than each of the {num_documents} documents in split {split!r} of {data!r} "
            f"({num_read} in all); the longest has {longest + len(encoder.prefix)} tokens: lower seq_len to that"
        )
    tokens = np.frombuffer(buffer, encoder.dtype).reshape(-1, seq_len)
    tokens.flags.writeable = False
    return SequenceSet(
        tokens=tokens,
        domains=tuple(domains),
        documents=np.array(indices, np.int64),
        num_documents=num_documents,
        num_skipped=num_skipped,
    )


def _place(document: Document) -> int:
    """A document's place in [0, 2**64), by a hash of its text; those below a limit are held out."""
    return int.from_bytes(document.digest[:8], "big")


def _limit(sources: list[Source], heldout_fraction: float, seq_len: int) -> int | None:
    """The limit of places that are held out; None if there is a single document, whose end is.

    It is `heldout_fraction` of all places, and moves just so far that both splits have a document. Documents of fewer
    bytes than `seq_len` do not count, since they give no sequence.
    """
    limit, places = int(heldout_fraction * 2**64), set[int]()
    for document in (document for source in sources for document in source.read(lambda count: None)):
        if len(document.text.encode()) >= seq_len:
            places.add(_place(document))
            if min(places) < limit <= max(places):  # seldom after more than a few documents
                return limit
    if len(places) == 1:
        return None
    return max(min(limit, max(places)), min(places) + 1) if places else limit


def _part(ids: np.ndarray, split: Split, heldout_fraction: float, text_len: int) -> np.ndarray:
    """The tokens of a single document in a split: whole sequences at its end are held out, at least one."""
    count = len(ids) // text_len
    first = (count - max(1, min(count - 1, round(heldout_fraction * count)))) * text_len
    return ids[max(0, first) : count * text_len] if split == "heldout" else ids[: max(0, first)]


# Tokenising.


class _Encoder:
    """A tokenizer as a thread-safe function from text to ids, with its number of threads and its identity."""

    def __init__(self, tokenizer: Any, workers: int) -> None:
        vocabulary = tokenizer.get_vocab()
        self.dtype = np.dtype(np.uint16 if max(vocabulary.values()) < 2**16 else np.int32)
        if getattr(tokenizer, "is_fast", False):
            from tokenizers import Tokenizer

            # A copy, so that switching off truncation and padding does not change the caller's tokenizer.
            backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            backend.no_truncation()
            backend.no_padding()
            described, self.workers = backend.to_str(), workers
            first = backend.encode("a").ids[:1]
            # A batch of one, because unlike `encode` it releases the GIL.
            self._encode = lambda text: backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        else:
            described, self.workers = (json.dumps([type(tokenizer).__qualname__, sorted(vocabulary.items())]), 1)
            first = tokenizer.encode("a")[:1]
            self._encode = partial(tokenizer.encode, add_special_tokens=False, truncation=False, verbose=False)
        self.prefix: list[int] = first if first == [tokenizer.bos_token_id] else []
        self.identity = [hashlib.sha256(described.encode()).hexdigest(), self.prefix]

    def __call__(self, text: str) -> np.ndarray:
        return np.array(self._encode(text), self.dtype)


_Pieces = list[Future[np.ndarray]]


def _tokenize(
    documents: Iterable[Document], selected: Callable[[Document], bool], encoder: _Encoder
) -> Generator[tuple[Document, _Pieces | None]]:
    """Yield each document with its ids in pieces, or None if not selected; read only a few documents ahead.

    Threads suffice, because the Rust code of the tokenizer releases the GIL. They need no copies of text and ids.
    """
    with ThreadPoolExecutor(encoder.workers) as pool:
        ahead: deque[tuple[Document, _Pieces | None]] = deque()
        try:
            for document in documents:
                pieces = map(partial(pool.submit, encoder), _split_long(document.text))
                ahead.append((document, list(pieces) if selected(document) else None))
                if len(ahead) > 4 * encoder.workers:
                    yield ahead.popleft()
            yield from ahead
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _split_long(text: str) -> Iterator[str]:
    """Split a long text between words or lines, where tokens of common tokenizers have a boundary."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARS:
        boundary = _BOUNDARY.search(text, start + PIECE_CHARS, start + 2 * PIECE_CHARS)
        end = boundary.end() if boundary else start + 2 * PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


_BOUNDARY = re.compile(r"(?<=\S)(?:(?= \S)|\n(?=\S))")  # before a lone space, after a lone line break


# The cache: a sealed array and a sealed JSON file for each key; the JSON file is written last.


def _load_entry(entry: Path) -> SequenceSet | None:
    """Return the stored sequences, or None if they are missing, incomplete or damaged."""
    array, record = entry.with_suffix(".npy"), read_sealed(entry.with_suffix(".json"))
    if record is None or not is_sealed(array):
        return None
    fields = json.loads(record)
    return SequenceSet(
        tokens=np.load(array, mmap_mode="r", allow_pickle=False),
        domains=tuple(fields.pop("domains")),
        documents=np.array(fields.pop("documents"), np.int64),
        **fields,
    )


def _store_entry(entry: Path, built: SequenceSet) -> SequenceSet:
    """Write `built` and return it memory-mapped; if the folder cannot take it, warn and return `built`."""
    content = io.BytesIO()
    np.save(content, built.tokens, allow_pickle=False)
    record = vars(built) | {"documents": built.documents.tolist()}
    del record["tokens"]
    try:
        write_sealed(entry.with_suffix(".npy"), content.getvalue())
        write_sealed(entry.with_suffix(".json"), json.dumps(record).encode())
    except ConsaError as error:
        warnings.warn(f"tokens are not cached ({error}); set CONSA_CACHE to a folder with room", stacklevel=3)
    return _load_entry(entry) or built
