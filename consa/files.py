"""Files that are either whole or absent."""

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
from pathlib import Path
from typing import Any, cast

from consa.errors import ConsaError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds all of it or what it held before, whatever kills the process.

    Raises:
        ConsaError: the folder or the disk does not take it.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # a new file, with the permissions that the user's umask gives
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConsaError(
            f"cannot write {path}: {error.strerror or error}; choose a folder with room"
        ) from error
    finally:  # also when interrupted; after os.replace there is nothing left under this name
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers of files and folders left directly in `folder`, where nobody else may be writing."""
    for path in list(folder.iterdir()):
        if re.fullmatch(r"\..+\.[0-9a-f]{16}", path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_writable(folder: Path) -> None:
    """Make sure that files can be put into a folder, which need not exist yet; leaves nothing there.

    Raises:
        ConsaError: something is in the way.
    """
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryDirectory(prefix=".", dir=nearest).cleanup()
    except OSError as error:
        raise ConsaError(
            f"cannot write {folder}: {error.strerror or error}; choose another folder"
        ) from error


def read_text(path: Path, *, max_bytes: int) -> str:
    """Read a UTF-8 file of at most `max_bytes` bytes.

    Raises:
        ConsaError: missing, unreadable, too large or not UTF-8.
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
        raise ConsaError(
            f"cannot read {path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def read_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object from a file of at most `max_bytes` bytes.

    Raises:
        ConsaError: as `read_text`, or it holds no JSON object.
    """
    text = read_text(path, max_bytes=max_bytes)
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConsaError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ConsaError(f"{path} is damaged: it should hold an object, not {type(record).__name__}")
    return cast(dict[str, Any], record)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all; its numbers are finite."""
    write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def png(figure: Any) -> bytes:
    """A figure of matplotlib as PNG; the same data give the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def cache_dir() -> Path:
    """Where converted models and tokenised text are kept: $CONSA_CACHE, else ~/.cache/consa."""
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
