"""Read documents from files, folders, globs, the standard library or datasets of the Hugging Face hub."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from consa.errors import ConsaError, first_line, missing_extra
from consa.files import sha256_of

MAX_DOCUMENT_BYTES = 256 * 2**20
"""Largest document or JSONL line, in decompressed bytes, so that a small compressed file cannot fill the memory."""


COMPRESSED = (".zst", ".gz")
LINES = ("jsonl", "ndjson")
OTHER_FORMATS = ("arrow", "bz2", "docx", "epub", "feather", "gguf", "h5", "npy", "pdf", "pkl", "xlsx", "xz", "zip")
"""Formats that hold no plain text: refused by that name rather than for their bytes."""
MAX_CHECKED_FILES = 100


class Document(NamedTuple):
    """A text with its domain and hash."""

    text: str
    domain: str
    digest: bytes  # SHA-256 of the text; it determines the split, so copies of a document stay together


class Source(NamedTuple):
    """A file or dataset with documents."""

    identity: list[Any]  # everything that determines the documents
    size: int  # bytes of a file or rows of a dataset, for the progress bar
    read: Callable[[Callable[[int], None]], Iterator[Document]]  # calls its argument with its progress


def find_sources(data: str, text_field: str) -> list[Source]:
    """The sources that `data` names, in that order, without duplicates; folders and globs sorted, stdlib shuffled."""
    sources: dict[Path | str, Source] = {}
    for part in _parts(data):
        if part.startswith("hf:"):
            sources[part] = _hub_source(part, text_field)
            continue
        name, paths = os.path.expanduser(part), _find_paths(part)
        for path in paths:
            if path.resolve() not in sources:
                sources[path.resolve()] = _file_source(path, text_field, is_named=path == Path(name))
    return list(sources.values())


def check_data(data: str, text_field: str = "text") -> None:
    """Raise a ConsaError if some name in `data` has no files, or its first files do not begin with a document."""
    try:
        for part in _parts(data):
            if not part.startswith("hf:"):
                for path in islice(_find_paths(part), MAX_CHECKED_FILES):
                    is_named = path == Path(os.path.expanduser(part))
                    next(_read(path, text_field, is_named, lambda count: None), None)
    except OSError as error:
        raise ConsaError(f"cannot read {error.filename or data}: {error.strerror or error}") from error


def _parts(data: str) -> list[str]:
    return [data] if os.path.exists(data) else [part.strip() for part in data.split(",")]


def _find_paths(part: str) -> list[Path]:
    """The files of one part of `data`; at least one."""
    name = os.path.expanduser(part)
    if part == "stdlib":
        library = Path(sysconfig.get_path("stdlib"))
        files = _walk(library, left_out=("site-packages", "dist-packages"))
        # Ordered by hash: the first documents are of every kind, and the order is the same on all machines.
        paths = sorted(
            (file for file in files if file.suffix == ".py"),
            key=lambda file: hashlib.sha256(file.relative_to(library).as_posix().encode()).digest(),
        )
    else:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        paths = [path for match in matches for path in _walk(Path(match))]
    if not paths:
        raise ConsaError(f"data {part!r} names no file; name a file, folder, glob, stdlib or hf:owner/name")
    return paths


def _walk(path: Path, left_out: tuple[str, ...] = ()) -> list[Path]:
    """The sorted files in a folder and its subfolders, or the path itself if it is not a folder."""
    if not path.is_dir():
        return [path]

    def fail(error: OSError) -> None:
        raise error

    paths: list[Path] = []
    for base, folders, names in os.walk(path, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        paths += [Path(base, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.is_file())


def _file_source(path: Path, text_field: str, *, is_named: bool) -> Source:
    read = partial(_read, path, text_field, is_named)
    return Source([*_format(path), is_named, sha256_of(path)], path.stat().st_size, read)


def _format(path: Path) -> tuple[str, str]:
    """The compression and the format of a file, by its name."""
    if not path.is_file():
        raise ConsaError(f"{path} is not a regular file; write the text to a file first")
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    return compression, (path.with_suffix("") if compression else path).suffix.removeprefix(".").lower()


def _read(path: Path, text_field: str, is_named: bool, advance: Callable[[int], None]) -> Iterator[Document]:
    """The documents of a file, by its format."""
    compression, kind = _format(path)
    if kind in LINES:
        return _read_jsonl(path, text_field, advance)
    if kind in ("csv", "tsv"):
        return _read_csv(path, text_field, "," if kind == "csv" else "\t", advance)
    if kind == "parquet" and not compression:
        return _read_parquet(path, text_field, advance)
    if is_named and kind in OTHER_FORMATS:
        raise ConsaError(f"{path} is a .{kind} file, not text; convert it to .txt, .jsonl, .csv or .parquet")
    if kind == "json":
        return _read_json(path, text_field, is_named, advance)
    return _read_whole(path, kind, is_named, advance)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file and its decompressed content."""
    with open(path, "rb") as file:
        match _format(path)[0]:
            case ".zst":
                yield file, cast(BinaryIO, io.BufferedReader(_ZstdStream(file, path)))
            case ".gz":
                try:
                    yield file, cast(BinaryIO, gzip.GzipFile(fileobj=file))
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise ConsaError(f"cannot decompress {path}: {error}; download or create it again") from error
            case _:
                yield file, file


def _read_json(path: Path, text_field: str, is_named: bool, advance: Callable[[int], None]) -> Iterator[Document]:
    """An array of records, one record, or records in lines; in a folder, other JSON is a text like any other."""
    try:
        with _opened(path) as (_, stream):
            value = json.loads(stream.read(MAX_DOCUMENT_BYTES + 1).decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        with _opened(path) as (_, stream):
            first = stream.readline(MAX_DOCUMENT_BYTES)
        if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and _is_json(first):
            yield from _read_jsonl(path, text_field, advance)
            return
        if is_named and first.lstrip(b"\xef\xbb\xbf \t\n\r")[:1] in (b"{", b"["):
            raise ConsaError(
                f"{path} is neither JSON nor JSON lines; fix it, or name it .txt to read it as text"
            ) from None
        yield from _read_whole(path, "json", is_named, advance)
        return
    records: list[Any] = value if isinstance(value, list) else [value]
    if not is_named and not all(isinstance(record, dict) and text_field in record for record in records):
        yield from _read_whole(path, "json", is_named, advance)
        return
    for number, record in enumerate(records, 1):
        yield _from_record(record, text_field, f"{path}, record {number}")
    advance(path.stat().st_size)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _read_csv(path: Path, text_field: str, delimiter: str, advance: Callable[[int], None]) -> Iterator[Document]:
    with _opened(path) as (_, stream):
        csv.field_size_limit(MAX_DOCUMENT_BYTES)
        try:
            rows = csv.DictReader((line.decode("utf-8-sig") for _, line in _lines(stream, path)), delimiter=delimiter)
            for number, row in enumerate(rows, 1):
                yield _from_record(row, text_field, f"{path}, row {number}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConsaError(f"{path} is not a table in UTF-8: {error}; fix it") from error
        advance(path.stat().st_size)


def _read_parquet(path: Path, text_field: str, advance: Callable[[int], None]) -> Iterator[Document]:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_extra(f"reading {path}", "datasets") from error
    try:
        table: Any = pyarrow.parquet.ParquetFile(path)
        rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(batch_size=256))
        for number, row in enumerate(rows, 1):
            yield _from_record(row, text_field, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise ConsaError(f"cannot read {path}: {first_line(error)}; download or create it again") from error
    advance(path.stat().st_size)


def _read_jsonl(path: Path, text_field: str, advance: Callable[[int], None]) -> Iterator[Document]:
    with _opened(path) as (file, stream):
        position = 0
        for number, line in _lines(stream, path):
            place = f"{path}:{number}"
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise ConsaError(f"{place}: not a JSON object in UTF-8 ({error}); fix or remove it") from error
                yield _from_record(record, text_field, place)
            advance(file.tell() - position)
            position = file.tell()


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file with their numbers, from 1 on."""
    for number, line in enumerate(iter(partial(stream.readline, MAX_DOCUMENT_BYTES + 1), b""), 1):
        if len(line) > MAX_DOCUMENT_BYTES:
            raise ConsaError(f"{path}:{number}: a line of more than {MAX_DOCUMENT_BYTES} bytes; split the document")
        yield number, line


def _read_whole(path: Path, kind: str, is_named: bool, advance: Callable[[int], None]) -> Iterator[Document]:
    content = bytearray()
    with _opened(path) as (file, stream):
        while block := stream.read(2**20):
            content += block
            if len(content) > MAX_DOCUMENT_BYTES:
                raise ConsaError(f"{path} has more than {MAX_DOCUMENT_BYTES} bytes; split it into several files")
        advance(file.tell())
    try:
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL characters")
    except ValueError as error:
        if is_named:
            raise ConsaError(f"{path} is not UTF-8 text: {error}; convert it or leave it out") from error
        text = ""  # a document without tokens counts as skipped
    yield _from_record({"text": text, "domain": kind}, "text", str(path))


def _hub_source(name: str, text_field: str) -> Source:
    path, config, split, *rest = [*name.removeprefix("hf:").split(":"), "", ""]
    if not path or any(rest):
        raise ConsaError(f"data {name!r} is not of the form hf:owner/name[:config][:split]")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_extra(f"data {name!r}", "datasets") from error
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # the network, the hub and dataset builders may raise anything
        raise ConsaError(f"cannot load data {name!r}: {first_line(error)}; check its name, config and split") from error

    def read(advance: Callable[[int], None]) -> Iterator[Document]:
        for number, row in enumerate(rows):
            yield _from_record(row, text_field, f"{name} row {number}")
            advance(1)

    return Source(["hf", rows._fingerprint], len(rows), read)


def _from_record(record: Any, text_field: str, place: str) -> Document:
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        if isinstance(record, dict) and {"messages", "conversations"} & record.keys():
            raise ConsaError(
                f"{place}: holds chat messages and no field {text_field!r}; put them into text with the model's chat"
                f" template (tokenizer.apply_chat_template), and write that to {text_field!r}"
            )
        raise ConsaError(f"{place}: no field {text_field!r} that is a string; set text_field, or fix the data")
    text, domain = record[text_field], record.get("domain")
    try:
        digest = hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError as error:  # JSON can contain half a surrogate pair
        raise ConsaError(f"{place}: field {text_field!r} is not valid Unicode ({error}); fix it") from error
    return Document(text, domain if isinstance(domain, str) else "", digest)


class _ZstdStream(io.RawIOBase):
    """The content of a zstd file with any number of frames; zstandard's own reader accepts truncated files."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        import zstandard  # few texts need it

        self._zstandard, self._file, self._path = zstandard, file, path
        self._frame: Any = None
        self._compressed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._compressed or self._file.read(1024)  # 1 KiB: at most 32 MiB once decompressed
            if not block and self._frame is None:
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                if not block:
                    raise self._zstandard.ZstdError("the file is truncated")
                self._ready = memoryview(self._frame.decompress(block))
            except self._zstandard.ZstdError as error:
                raise ConsaError(f"cannot decompress {self._path}: {error}; download or create it again") from error
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
