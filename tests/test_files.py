from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from consa.errors import ConsaError
from consa.files import cache_dir, check_writable, read_text, remove_leftovers, sha256_of, write_atomically


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("content", [b"", b"new", b"\x00\xff\r\n", b"x" * 3_000_000])
def test_what_is_written_is_read(tmp_path: Path, content: bytes):
    path = tmp_path / "a" / "b" / "file"
    for _ in range(2):  # a new file, then over an old one
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert names(path.parent) == {"file"}


def test_a_shorter_content_replaces_a_longer_one(tmp_path: Path):
    write_atomically(tmp_path / "file", b"long content")
    write_atomically(tmp_path / "file", b"short")
    assert (tmp_path / "file").read_bytes() == b"short"


@pytest.mark.usefixtures("umask")
def test_permissions_follow_the_umask(tmp_path: Path):
    write_atomically(tmp_path / "file", b"")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert os.umask(0o027) == 0o027  # and the umask is as before


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, old: bytes | None
):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(ConsaError, match=r"file: No space left on device; ") as caught:
        write_atomically(path, b"new")
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == (set() if old is None else {"file"})
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_bytes() == b"old"


def test_content_is_on_disk_before_the_name_points_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def record(*args: object, real=real, name=name) -> None:
            calls.append(name)
            real(*args)

        monkeypatch.setattr(os, name, record)
    write_atomically(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace"]


def test_a_place_that_takes_no_file_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for path in (tmp_path / "file" / "below", tmp_path / "folder", tmp_path / ("long" * 100)):
        with pytest.raises(ConsaError, match=f"cannot write {path}"):
            write_atomically(path, b"new")
    assert names(tmp_path) == {"file", "folder"}


def test_read_text_returns_what_is_there(tmp_path: Path):
    (tmp_path / "file").write_bytes("größe\n".encode())
    assert read_text(tmp_path / "file", max_bytes=8) == "größe\n"


def test_read_text_says_why_not(tmp_path: Path):
    (tmp_path / "large").write_bytes(b"123456789")
    (tmp_path / "latin").write_bytes(b"gr\xf6\xdfe")
    for name, reason in (
        ("large", "more than the 8 bytes"),
        ("latin", "not UTF-8 text .* at byte 2"),
        ("absent", "No such file"),
        (".", "directory"),
    ):
        with pytest.raises(ConsaError, match=f"{tmp_path / name}.*{reason}"):
            # A folder's size differs between file systems, so it gets all the room it wants.
            read_text(tmp_path / name, max_bytes=8 if name != "." else 2**30)


def test_cache_dir_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("CONSA_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    for unset in ("", None):
        monkeypatch.setenv("CONSA_CACHE", "") if unset == "" else monkeypatch.delenv("CONSA_CACHE")
        assert cache_dir() == Path.home() / ".cache" / "consa"


def test_sha256_of_a_file(tmp_path: Path):
    content = b"consa" * 500_000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    with pytest.raises(ConsaError, match="absent: No such file"):
        sha256_of(tmp_path / "absent")


def test_what_can_be_written_is_known_before(tmp_path: Path):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "new", tmp_path / "a" / "b"):
        check_writable(folder)
    for name, reason in (("file", "Not a directory"), ("file/a", "Not a directory"), ("x" * 300, "too long")):
        with pytest.raises(ConsaError, match=rf"cannot write {tmp_path / name}: .*{reason}"):
            check_writable(tmp_path / name)
    assert names(tmp_path) == {"file"}


def test_a_folder_that_takes_nothing_is_named():
    with pytest.raises(ConsaError, match="cannot write /proc/consa: "):
        check_writable(Path("/proc/consa"))


def test_leftovers_that_are_links_go_and_what_they_name_stays(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (link := tmp_path / ".name.0123456789abcdef").symlink_to(tmp_path / "kept")
    remove_leftovers(tmp_path)
    assert not link.is_symlink() and (tmp_path / "kept" / "file").exists()
