"""Writing files so that they are either complete or absent, and reading them with errors of one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

from consa.errors import ConsaError

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object as it is read from a file, before anything is known about its fields."""

SEAL = b"sha256 "  # a sealed file ends in a line of this and the SHA-256 of everything before that line
SEAL_BYTES = len(SEAL) + 64 + 1


def write_atomically(path: Path, *content: bytes) -> None:
    """Write the parts of `content` so that `path` holds all of them or what it held before, even after a kill.

    Raises:
        ConsaError: the folder or the disk cannot take the file.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # a new file, with the permissions that the user's umask gives
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConsaError(f"cannot write {path}: {error.strerror or error}; choose a folder with room") from error
    finally:  # also when interrupted; after os.replace there is nothing left under this name
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_files(folder: Path, content: Mapping[str, bytes]) -> list[Path]:
    """Write files by name atomically, and return their paths."""
    for name, data in content.items():
        write_atomically(folder / name, data)
    return [folder / name for name in content]


def write_sealed(path: Path, content: bytes) -> None:
    """Write `content` atomically, followed by its SHA-256, so that `read_sealed` notices any later damage.

    Raises:
        ConsaError: the folder or the disk cannot take the file.
    """
    write_atomically(path, content, SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n")


def read_sealed(path: Path) -> bytes | None:
    """Return what `write_sealed` wrote, or None if the file is missing, damaged or not sealed."""
    try:
        with path.open("rb") as file:
            content = file.read(max(0, os.fstat(file.fileno()).st_size - SEAL_BYTES))
            seal = file.read()
    except OSError:
        return None
    return content if seal == SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n" else None


def is_sealed(path: Path) -> bool:
    """Whether `read_sealed` would return the content; reads the file in blocks, for files larger than memory."""
    try:
        with path.open("rb") as file:
            left, digest = os.fstat(file.fileno()).st_size - SEAL_BYTES, hashlib.sha256()
            while left > 0 and (block := file.read(min(left, 2**20))):
                digest.update(block)
                left -= len(block)
            return file.read() == SEAL + digest.hexdigest().encode() + b"\n"
    except OSError:
        return False


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that killed processes left directly in `folder`.

    No other process may be writing there.
    """
    for path in list(folder.iterdir()):
        if re.fullmatch(r"\..+\.[0-9a-f]{16}", path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which need not exist yet; nothing is left there.

    Raises:
        ConsaError: they cannot.
    """
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryDirectory(prefix=".", dir=nearest).cleanup()
    except OSError as error:
        raise ConsaError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error


def read_text(path: Path, *, max_bytes: int) -> str:
    """Read a UTF-8 file of at most `max_bytes` bytes.

    Raises:
        ConsaError: the file is missing, unreadable, too large or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = bytearray()  # a device has no size to ask for
            while len(content) <= max_bytes and (block := file.read(2**20)):
                content += block
        if len(content) > max_bytes:
            raise ConsaError(f"{path} has more than the {max_bytes} bytes such a file may have")
        return content.decode("utf-8")
    except OSError as error:
        raise ConsaError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConsaError(f"cannot read {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: Path, *, max_bytes: int) -> JsonObject:
    """Read a JSON object from a file of at most `max_bytes` bytes.

    Raises:
        ConsaError: as `read_text`, or the file holds no JSON object.
    """
    try:
        record: Any = json.loads(read_text(path, max_bytes=max_bytes))
    except (ValueError, RecursionError) as error:
        raise ConsaError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ConsaError(f"{path} is damaged: it should hold an object, not {type(record).__name__}")
    return cast(JsonObject, record)


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write a JSON object atomically; every number in it must be finite."""
    write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def png(figure: Any) -> bytes:
    """Render a matplotlib figure as PNG; the same data give the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def cache_dir() -> Path:
    """The folder for converted models and tokenised text: $CONSA_CACHE, else ~/.cache/consa."""
    return Path(os.environ.get("CONSA_CACHE") or "~/.cache/consa").expanduser()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as hex.

    Raises:
        ConsaError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConsaError(f"cannot read {path}: {error.strerror or error}") from error
