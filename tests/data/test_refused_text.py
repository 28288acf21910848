"""Errors in a user's text data are refused in one line."""

import gzip
import tracemalloc

import pytest
import zstandard

from consa.data import documents
from consa.errors import ConsaError
from tests.text import TEXT, jsonl, numbered


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1;"),
        ({"split": "test"}, "split is 'test'; choose one of all, train, heldout"),
        ({"heldout_fraction": 0.0}, "heldout_fraction is 0.0;"),
        ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0;"),
        ({"max_tokens": 7}, "max_tokens is 7; allow at least 8"),
        ({"max_tokens": 0}, "max_tokens is 0; allow at least 8"),
        ({"workers": 0}, "workers is 0;"),
        ({"source": "nowhere.txt"}, r"'nowhere\.txt' names no file;"),
        ({"source": "no/*.txt"}, r"'no/\*\.txt' names no file;"),
        ({"source": ""}, "data '' names no file;"),
        ({"source": "hf:"}, "'hf:' is not of the form"),
        ({"source": "hf:a:b:c:d"}, "'hf:a:b:c:d' is not of the form"),
        ({"source": "/dev/null"}, "/dev/null is not a regular file"),
        ({"seq_len": 10_000}, r"seq_len 10000 is longer than each of the 3 documents .* has \d+ tokens"),
    ],
)
def test_bad_argument(load, tmp_path, options, message):
    source = jsonl(tmp_path / "a.jsonl", numbered(3))
    with pytest.raises(ConsaError, match=message) as caught:
        load(**{"source": source} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl.zst", b"", "holds no text"),
        ("a.txt", "é".encode("latin-1"), r"a\.txt is not UTF-8 text"),
        ("a.txt", TEXT.encode("utf-16"), r"a\.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl:3: not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not a JSON object in UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"txt": "a"}\n', r"a\.jsonl:1: no field 'text'"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: no field 'text' that is a string"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: no field 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: field 'text' is not valid Unicode"),
        ("a.txt.zst", zstandard.compress(TEXT.encode())[:-3], r"a\.txt\.zst: the file is truncated"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n')[:-3], r"a\.jsonl\.zst: the file is truncated"),
        ("a.jsonl.zst", b"not compressed", r"cannot decompress .*a\.jsonl\.zst"),
    ],
)
def test_bad_content(load, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConsaError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_empty_folder(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConsaError, match="empty' names no file;"):
        load(tmp_path / "empty")


def test_unreadable_file(load, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", numbered(1))

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(documents, "open", refuse, raising=False)  # file modes do not stop a test run as root
    with pytest.raises(ConsaError, match=rf"cannot read {source}: Permission denied"):
        load(source)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.zst", "a.jsonl.zst"])
def test_document_over_the_limit(load, tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 2**20)
    content = bytes(2**20 + 1)
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
    with pytest.raises(ConsaError, match="more than 1048576 bytes"):
        load(tmp_path / name)


def test_small_compressed_file_cannot_fill_the_memory(load, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 2**20)
    bomb = zstandard.compress(bytes(2**29))
    assert len(bomb) < 2**15
    (tmp_path / "a.jsonl.zst").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(ConsaError, match=r"a\.jsonl\.zst:1: a line of more than"):
            load(tmp_path / "a.jsonl.zst")
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


CHAT = b'{"messages": [{"role": "user", "content": "hello"}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", CHAT, r"a\.jsonl:1: holds chat messages and no field 'text'; .*chat template"),
        ("a.json", b"[" + CHAT + b"]", r"record 1: holds chat messages"),
        ("a.json", b'{"text": "a"', "neither JSON nor JSON lines"),
        ("a.json", b'{"name": "a"}', "no field 'text'"),
        ("a.csv", b"title,body\nx,y\n", r"a\.csv, row 1: no field 'text'"),
        ("a.csv", b"text\n\xff\n", "not a table in UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:20], r"cannot decompress .*a\.jsonl\.gz"),
        ("a.txt.gz", b"not compressed", r"cannot decompress .*a\.txt\.gz"),
        ("a.parquet", b"not a table", r"cannot read .*a\.parquet"),
        ("a.pdf", b"%PDF", r"is a \.pdf file, not text; convert it"),
        ("a.txt.xz", b"xz", r"is a \.xz file, not text; convert it"),
    ],
)
def test_other_formats_are_refused_for_what_they_are_before_a_model_is_loaded(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConsaError, match=message) as caught:
        documents.check_data(str(tmp_path / name))
    assert "\n" not in str(caught.value)
