"""Read documents from files, folders, globs, the standard library or datasets of the Hugging Face hub."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from consa.errors import ConsaError, first_line, missing_extra
from consa.files import sha256_of

MAX_DOCUMENT_BYTES = 256 * 2**20
"""Largest document or JSONL line, in decompressed bytes, so that a small compressed file cannot fill the memory."""


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


def check_data(data: str) -> None:
    """Raise a ConsaError if some name in `data` has no files; reads none."""
    try:
        for part in _parts(data):
            if not part.startswith("hf:"):
                _find_paths(part)
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
    if not path.is_file():
        raise ConsaError(f"{path} is not a regular file; write the text to a file first")
    kind = (path.with_suffix("") if path.suffix == ".zst" else path).suffix.removeprefix(".")
    read = partial(_read_jsonl, path, text_field) if kind == "jsonl" else partial(_read_whole, path, kind, is_named)
    return Source([sha256_of(path), path.suffix == ".zst", kind, is_named], path.stat().st_size, read)


def _read_jsonl(path: Path, text_field: str, advance: Callable[[int], None]) -> Iterator[Document]:
    with open(path, "rb") as file:
        stream = io.BufferedReader(_ZstdStream(file, path)) if path.suffix == ".zst" else file
        position, read_line = 0, partial(stream.readline, MAX_DOCUMENT_BYTES + 1)
        for number, line in enumerate(iter(read_line, b""), 1):
            place = f"{path}:{number}"
            if len(line) > MAX_DOCUMENT_BYTES:
                raise ConsaError(f"{place}: a line of more than {MAX_DOCUMENT_BYTES} bytes; split the document")
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise ConsaError(f"{place}: not a JSON object in UTF-8 ({error}); fix or remove it") from error
                yield _from_record(record, text_field, place)
            advance(file.tell() - position)
            position = file.tell()


def _read_whole(path: Path, kind: str, is_named: bool, advance: Callable[[int], None]) -> Iterator[Document]:
    content = bytearray()
    with open(path, "rb") as file:
        stream = io.BufferedReader(_ZstdStream(file, path)) if path.suffix == ".zst" else file
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
