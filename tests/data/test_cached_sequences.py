"""The cache of tokens is believed only where it is whole and of the same input."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from consa.data import sequences
from consa.data.sequences import load_sequences
from consa.errors import ConsaError
from tests.text import TEXT, fail, jsonl, numbered


def test_second_time_comes_from_the_cache_memory_mapped(load, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", numbered(5), domain="prose")
    first = load(source)
    monkeypatch.setattr(sequences, "_cut", fail)
    second = load(source.rename(tmp_path / "moved.jsonl"), workers=1)
    assert isinstance(second.tokens, np.memmap)
    assert not second.tokens.flags.writeable
    assert second.tokens.tolist() == first.tokens.tolist()
    assert second.documents.tolist() == first.documents.tolist()
    assert second.documents.dtype == first.documents.dtype == np.int64
    assert (second.domains, second.num_documents) == (first.domains, first.num_documents)
    assert second.num_skipped == first.num_skipped


def test_anything_that_changes_the_result_changes_the_key(load, bos_tokenizer, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", numbered(20), body=TEXT)
    as_text = tmp_path / "a.txt"
    as_text.write_bytes(source.read_bytes())
    without_bos = PreTrainedTokenizerFast(tokenizer_object=bos_tokenizer.backend_tokenizer)
    load(source)
    load(source, tokenizer=bos_tokenizer, seq_len=10)
    monkeypatch.setattr(sequences, "_cut", fail)
    load(source)
    for change in (
        {"seq_len": 9},
        {"split": "train"},
        {"heldout_fraction": 0.3},
        {"max_tokens": 80},
        {"text_field": "body"},
        {"tokenizer": bos_tokenizer},
        {"tokenizer": without_bos, "seq_len": 10},
        {"source": as_text},
        {"source": f"{source},{as_text}"},
    ):
        with pytest.raises(AssertionError, match="the cache was not used"):
            load(**{"source": source} | change)
    jsonl(source, numbered(21), body=TEXT)
    with pytest.raises(AssertionError, match="the cache was not used"):
        load(source)


def damage(suffix, change):
    def apply(cache):
        (file,) = (cache / "sequences").glob(f"*{suffix}")
        content = bytearray(file.read_bytes())
        file.unlink()
        changed = change(content)
        if changed is not None:
            file.write_bytes(changed)

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        damage(".npy", lambda content: None),
        damage(".npy", lambda content: content[: len(content) // 2]),
        damage(".npy", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        damage(".npy", lambda content: b""),
        damage(".json", lambda content: None),
        damage(".json", lambda content: content[:-5]),
        damage(".json", lambda content: content.replace(b'"num_skipped": 0', b'"num_skipped": 7')),
        damage(".json", lambda content: b"[]"),
        damage(".json", lambda content: b"\xff"),
    ],
)
def test_damaged_entry_is_rebuilt(load, tmp_path, monkeypatch, damage):
    source = jsonl(tmp_path / "a.jsonl", numbered(5))
    first = load(source)
    expected, skipped = first.tokens.tolist(), first.num_skipped
    damage(tmp_path / "cache")
    rebuilt = load(source)
    assert (rebuilt.tokens.tolist(), rebuilt.num_skipped) == (expected, skipped)
    monkeypatch.setattr(sequences, "_cut", fail)
    assert load(source).tokens.tolist() == expected, "the rebuilt entry should be whole"


def test_unwritable_cache_warns_once_and_goes_on(load, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", numbered(5))
    expected = load(source).tokens.tolist()
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="not cached") as warned:
        result = load(source, cache_dir=tmp_path / "file" / "cache")
    assert len(warned) == 1
    assert result.tokens.tolist() == expected
    assert not result.tokens.flags.writeable


def test_a_failed_write_leaves_nothing_that_loads(load, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", numbered(5))
    write = sequences.write_atomically

    def full_disk(path, content):
        if path.suffix == ".json":
            raise ConsaError("no room")
        write(path, content)

    monkeypatch.setattr(sequences, "write_atomically", full_disk)
    with pytest.warns(UserWarning, match="no room"):
        load(source)
    monkeypatch.setattr(sequences, "_cut", fail)
    with pytest.raises(AssertionError, match="the cache was not used"):
        load(source)


def test_default_cache_is_used(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path / "own"))
    load_sequences(str(jsonl(tmp_path / "a.jsonl", numbered(2))), tokenizer, 8, progress=False)
    assert len(list((tmp_path / "own" / "sequences").iterdir())) == 2


def test_a_file_under_another_name_has_another_domain(load, tmp_path):
    for kind in ("txt", "md"):
        (tmp_path / f"a.{kind}").write_text(TEXT)
        assert set(load(tmp_path / f"a.{kind}").domains) == {kind}
