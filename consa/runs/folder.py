"""The folder of a run: held by one process at a time, and by one run for good."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from consa.errors import ConsaError
from consa.files import read_json, remove_leftovers, write_atomically
from consa.provenance import first_difference

CONFIG = "config.json"
MAX_CONFIG_BYTES = 2**20


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock; if nothing came of the block, leave no trace of it.

    Raises:
        ConsaError: another process holds it, it holds files of something else, or it cannot be written.
    """
    if not (folder / CONFIG).exists():
        check_free(folder)
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    lock = folder / ".lock"
    in_use = ConsaError(f"{folder} is in use by another process; wait for that one or choose another --out")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another file by now, where the last holder has just removed it.
                if os.fstat(file.fileno()).st_ino != lock.stat().st_ino:
                    raise in_use
            except (BlockingIOError, FileNotFoundError) as error:
                raise in_use from error
            write_atomically(lock.with_name(".writable"), b"")
            lock.with_name(".writable").unlink()
            remove_leftovers(folder)
            for room in list(folder.iterdir()):  # but not another run's, which may be writing
                if room.is_dir() and not (room / lock.name).exists():
                    remove_leftovers(room)
        except OSError as error:
            raise ConsaError(
                f"cannot write {folder}: {error.strerror or error}; choose another folder with --out"
            ) from error
        try:
            yield
        finally:
            with suppress(OSError):  # another run may have begun beside this one
                if missing and [path.name for path in folder.iterdir()] == [lock.name]:
                    lock.unlink()
                    for path in missing:
                        path.rmdir()


def check_same(
    folder: Path, settings: dict[str, Any], decisive: Callable[[dict[str, Any]], dict[str, Any]], *, kind: str
) -> None:
    """Refuse a folder that another run's results are in.

    Args:
        folder: of the run; it may not exist yet.
        settings: of this run, JSON-able, by part.
        decisive: what of such settings may not differ where a run is continued, by part.
        kind: "run" or "sweep", for messages.

    Raises:
        ConsaError: it holds another run, something damaged, or no run.
    """
    path, wanted = folder / CONFIG, decisive(json.loads(json.dumps(settings)))
    if not path.exists():
        return
    try:
        found = read_json(path, max_bytes=MAX_CONFIG_BYTES)
        other = isinstance(found["run"], dict) and not wanted.keys() <= found.keys()
        before = {} if other else decisive({part: found[part] for part in wanted})
    except (ConsaError, LookupError, TypeError, AttributeError) as error:
        raise ConsaError(
            f"cannot continue from {path}: damaged, or of no {kind}; choose another folder with --out, or delete this"
            f" one if it is a {kind}'s"
        ) from error
    difference = "of another command" if other else first_difference(before, wanted)
    if difference:
        raise ConsaError(
            f"{folder} holds a different {kind} ({difference}); choose another folder with --out, or delete it to start"
            " over"
        )


def check_free(folder: Path) -> None:
    """Refuse a folder that a run has not begun in but that holds files: a folder of text, say.

    Raises:
        ConsaError: it does; the message names one.
    """
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_file() and not path.name.startswith("."):
            raise ConsaError(
                f"{folder} holds files of something else ({path.name}); choose another with --out"
            )
