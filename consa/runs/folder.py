"""The folder of a run: used by one process at a time, and never by two different runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from consa.config import AdaptConfig, LearnConfig, RunConfig, with_present_names
from consa.errors import ConsaError
from consa.files import JsonObject, read_json, remove_leftovers, write_atomically, write_json
from consa.provenance import environment, first_difference
from consa.training import distributed, loop

CONFIG = "config.json"
LOCK = ".lock"
MAX_CONFIG_BYTES = 2**20
FREE = {"num_heldout", "start", *loop.FREE}  # settings that do not change what is learned

Settings = dict[str, JsonObject]
"""Settings of a run, JSON-able, by part: "run", then "learn", "adapt" or others."""


@contextmanager
def opened(where: RunConfig, config: LearnConfig | AdaptConfig, folder: Path, settings: Settings) -> Iterator[None]:
    """Join the job's other processes; the main one locks the folder and checks that it is this run's."""
    with distributed.group(where.device), claimed(folder) if distributed.is_main() else nullcontext():
        distributed.check_divides(config.sequences_per_step, config.micro_batch)
        if distributed.is_main():
            check_same(folder, settings, _without_free, kind="run")
        yield


def _without_free(settings: Settings) -> Settings:
    return {part: {key: value for key, value in values.items() if key not in FREE} for part, values in settings.items()}


def record_settings(settings: Settings, command: str, folder: Path) -> JsonObject:
    """Return what the run is and computes on; the main process writes it to config.json."""
    record: JsonObject = {**settings, "command": command, **environment()}
    if distributed.is_main():
        write_json(folder / CONFIG, record)
    return record


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock; if the block leaves nothing else in a new folder, remove the folder again."""
    if not (folder / CONFIG).exists():
        check_free(folder)
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    lock = _locked(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # another run may have begun next to this one
            if missing and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                for path in missing:
                    path.rmdir()
        lock.release()


def _locked(folder: Path) -> FileLock:
    path, elsewhere = folder / LOCK, "choose another folder with --out"
    lock = FileLock(path, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        file = path.stat().st_ino
        lock.acquire()
        if path.stat().st_ino != file:  # the previous holder has removed the file that is locked now
            raise FileNotFoundError(path)
        write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
        remove_leftovers(folder)
        for inner in list(folder.iterdir()):
            if inner.is_dir() and not (inner / LOCK).exists():  # not in the folder of another run
                remove_leftovers(inner)
    except (Timeout, FileNotFoundError) as error:
        lock.release()
        raise ConsaError(f"{folder} is in use by another process; wait for that process, or {elsewhere}") from error
    except OSError as error:
        lock.release()
        raise ConsaError(f"cannot write {folder}: {error.strerror or error}; {elsewhere}") from error
    return lock


def check_same(
    folder: Path, settings: JsonObject, decisive: Callable[[Settings], Settings], *, kind: Literal["run", "sweep"]
) -> None:
    """Refuse a folder that holds another run; `decisive` selects the settings that must be equal to continue one."""
    path, wanted = folder / CONFIG, decisive(json.loads(json.dumps(settings)))
    if not path.exists():
        return
    try:
        found = with_present_names(read_json(path, max_bytes=MAX_CONFIG_BYTES))
        other = isinstance(found["run"], dict) and not wanted.keys() <= found.keys()
        before = {} if other else decisive({part: found[part] for part in wanted})
    except (ConsaError, LookupError, TypeError, AttributeError) as error:
        raise ConsaError(
            f"cannot continue from {path}: damaged, or not written by a {kind}; choose another folder with --out, or"
            " delete this one to start over"
        ) from error
    difference = "of another command" if other else first_difference(before, wanted)
    if difference:
        raise ConsaError(
            f"{folder} holds a different {kind} ({difference}); choose another folder with --out, or delete it to start"
            " over"
        )


def check_free(folder: Path) -> None:
    """Refuse a folder that holds files but no run, for example a folder of text."""
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_file() and not path.name.startswith("."):
            raise ConsaError(f"{folder} holds files of something else ({path.name}); choose another folder with --out")
