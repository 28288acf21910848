"""Text gives the same sequences of tokens from every kind of source."""

import csv
import gzip
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from consa.data import documents, sequences
from consa.data.documents import check_data
from consa.data.sequences import SequenceSet, load_sequences
from consa.errors import ConsaError
from tests.text import TEXT, encode, fail, jsonl, numbered

# Whole words and pieces of them, with line breaks, indents and characters of several bytes.
TEXTS = st.lists(st.sampled_from([*TEXT.split(" "), "\n", "\n\n", "   ", "é", "樹", "🌳", "x"]), max_size=60).map(
    " ".join
)


# What comes out.


def test_a_document_gives_its_consecutive_tokens_and_no_rest(load, tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT * 3)
    ids = encode(tokenizer, TEXT * 3)
    assert len(ids) % 8, "the text should leave a rest"
    result = load(path)
    assert result.tokens.tolist() == [ids[start : start + 8] for start in range(0, len(ids) - 7, 8)]
    assert result.documents.tolist() == [0] * (len(ids) // 8)
    assert result.domains == ("txt",) * (len(ids) // 8)
    assert (result.num_documents, result.num_skipped) == (1, 0)


@settings(max_examples=60)
@given(texts=st.lists(TEXTS, max_size=8), seq_len=st.integers(2, 40), workers=st.integers(1, 3))
def test_no_sequence_spans_two_documents(tokenizer, texts, seq_len, workers):
    ids = [encode(tokenizer, text) for text in texts]
    expected = [
        (index, one[start : start + seq_len])
        for index, one in enumerate(ids)
        for start in range(0, len(one) - seq_len + 1, seq_len)
    ]
    with tempfile.TemporaryDirectory() as folder:
        source = str(jsonl(Path(folder, "a.jsonl"), texts))
        options = {"cache_dir": Path(folder), "progress": False, "workers": workers}
        if not expected:
            with pytest.raises(ConsaError):
                load_sequences(source, tokenizer, seq_len, **options)
            return
        result = load_sequences(source, tokenizer, seq_len, **options)
        assert list(zip(result.documents.tolist(), result.tokens.tolist(), strict=True)) == expected
        assert result.num_documents == len(texts)
        assert result.num_skipped == sum(len(one) < seq_len for one in ids)


@settings(max_examples=40)
@given(texts=st.lists(TEXTS, min_size=1, max_size=12), fraction=st.floats(0.05, 0.95), order=st.randoms())
def test_split_is_a_partition_by_document_whatever_the_order(tokenizer, texts, fraction, order):
    assume(len({text for text in texts if len(text.encode()) >= 4}) != 1)  # of a single document the end is held out

    def sides(folder, texts):
        """The documents of each split, by index and by text."""
        source, found = str(jsonl(Path(folder, "a.jsonl"), texts)), {}
        for split in ("all", "train", "heldout"):
            try:
                result = load_sequences(
                    source, tokenizer, 4, split=split, heldout_fraction=fraction, cache_dir=Path(folder), progress=False
                )
            except ConsaError:
                found[split] = set()
            else:
                found[split] = set(result.documents.tolist())
        return found, {split: {texts[index] for index in found[split]} for split in found}

    with tempfile.TemporaryDirectory() as folder:
        indices, by_text = sides(folder, texts)
        assert indices["train"] | indices["heldout"] == indices["all"]
        assert not indices["train"] & indices["heldout"]
        assert not by_text["train"] & by_text["heldout"], "copies of a document must stay on one side"
        shuffled = order.sample(texts, len(texts))
        assert sides(folder, shuffled)[1] == by_text


def test_heldout_fraction_is_about_the_share_of_documents(load, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", numbered(400, repeat=1))
    heldout = load(source, split="heldout", heldout_fraction=0.2)
    train = load(source, split="train", heldout_fraction=0.2)
    assert 50 < heldout.num_documents < 110  # 80 expected, standard deviation 8
    assert heldout.num_documents + train.num_documents == 400


def test_bos_begins_every_sequence_and_eos_is_left_out(load, bos_tokenizer, tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    ids = encode(tokenizer, TEXT)
    result = load(path, tokenizer=bos_tokenizer)
    expected = [[bos_tokenizer.bos_token_id, *ids[start : start + 7]] for start in range(0, len(ids) - 6, 7)]
    assert result.tokens.tolist() == expected
    assert load(path, len(ids) + 1, tokenizer=bos_tokenizer).tokens.shape == (1, len(ids) + 1)
    with pytest.raises(ConsaError, match=f"the longest has {len(ids) + 1} tokens"):
        load(path, len(ids) + 2, tokenizer=bos_tokenizer)


def test_dtype_is_the_smallest_of_two_that_holds_the_vocabulary(load, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("low high " * 8)
    for highest, dtype in ((2**16 - 1, np.uint16), (2**16, np.int32)):
        backend = Tokenizer(models.WordLevel({"low": 0, "high": highest, "?": 1}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        result = load(path, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"))
        assert result.tokens.dtype == dtype
        assert result.tokens.tolist() == [[0, highest] * 4] * 2


def test_truncation_and_padding_of_the_tokenizer_are_ignored_and_kept(load, tokenizer, tmp_path):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=1000)
    limited = PreTrainedTokenizerFast(tokenizer_object=backend)
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    expected = load(path).tokens.tolist()
    before = limited.backend_tokenizer.truncation
    assert load(path, tokenizer=limited, cache_dir=tmp_path / "other").tokens.tolist() == expected
    assert limited.backend_tokenizer.truncation == before


def test_tokenizer_written_in_python(load, tmp_path):
    class Characters:
        bos_token_id = 1
        is_fast = False

        def get_vocab(self):
            return {chr(code): code for code in range(128)}

        def encode(self, text, add_special_tokens=True, **_):
            return [1] * add_special_tokens + [ord(character) for character in text]

    path = tmp_path / "a.txt"
    path.write_text("abcdef")
    assert load(path, 4, tokenizer=Characters()).tokens.tolist() == [[1, 97, 98, 99], [1, 100, 101, 102]]


def test_long_documents_have_the_same_tokens_in_pieces(load, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(TEXT * 30)
    whole = load(path).tokens.tolist()
    monkeypatch.setattr(sequences, "PIECE_CHARS", 100)
    pieces = list(sequences._split_long(TEXT * 30))
    assert len(pieces) > 20
    assert "".join(pieces) == TEXT * 30
    assert load(path, cache_dir=tmp_path / "other").tokens.tolist() == whole
    assert [len(piece) for piece in sequences._split_long("x" * 450)] == [200, 200, 50]  # no line to cut at


def test_max_tokens_keeps_the_beginning_and_stops_reading(load, tmp_path):
    texts = numbered(30, repeat=1)
    source = jsonl(tmp_path / "a.jsonl", texts)
    full = load(source)
    with open(source, "a") as file:
        file.write("this is not JSON\n")
    part = load(source, max_tokens=8 * 11 + 7)
    assert part.tokens.tolist() == full.tokens[:11].tolist()
    assert part.documents.tolist() == full.documents[:11].tolist()
    assert part.num_documents == part.documents[-1] + 1


def test_same_input_gives_the_same_bytes_with_any_number_of_workers(load, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", numbered(40))
    contents = []
    for workers in (1, 4):
        cache = tmp_path / f"cache{workers}"
        load(source, workers=workers, cache_dir=cache)
        contents.append({file.name: file.read_bytes() for file in (cache / "sequences").iterdir()})
    assert len(contents[0]) == 2
    assert contents[0] == contents[1]


def test_progress_is_silent_when_off_and_never_on_stdout(load, tmp_path, capfd):
    source = jsonl(tmp_path / "a.jsonl", numbered(3))
    load(source)
    assert capfd.readouterr() == ("", "")
    load(source, progress=True, cache_dir=tmp_path / "other")
    assert capfd.readouterr().out == ""


def test_progress_reaches_the_whole_input(tokenizer, tmp_path):
    (tmp_path / "b.txt").write_text(TEXT)
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(TEXT.encode()))
    jsonl(tmp_path / "a.jsonl", numbered(3))
    for source in documents.find_sources(str(tmp_path), "text"):
        seen = []
        assert list(source.read(seen.append))
        assert sum(seen) == source.size


# Where it comes from.


def test_folder_in_sorted_order_without_hidden_and_binary_files(load, tokenizer, tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_text("b " * 40)
    (folder / "sub" / "c.md").write_text("c " * 40)
    (folder / "a.txt").write_text("a " * 40)
    (folder / ".git" / "config").write_text("hidden " * 40)
    (folder / ".hidden").write_text("hidden " * 40)
    (folder / "image.bin").write_bytes(b"\xff\xd8\xff\xe0" * 40)
    (folder / "null.bin").write_bytes(b"text \0 and more " * 40)
    result = load(folder)
    texts = [tokenizer.decode(row).split()[0] for row in result.tokens]
    assert list(dict.fromkeys(texts)) == ["a", "b", "c"]
    assert (result.num_documents, result.num_skipped) == (5, 2)
    with pytest.raises(ConsaError, match=r"image\.bin is not UTF-8 text"):
        load(f"{folder / 'a.txt'},{folder / 'image.bin'}")
    with pytest.raises(ConsaError, match=r"null\.bin is not UTF-8 text"):
        load(folder / "null.bin")


def test_globs_and_lists_and_compression_name_the_same_text(load, tmp_path):
    texts = numbered(4)
    for name, text in zip("abcd", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    expected = load(",".join(str(tmp_path / f"{name}.txt") for name in "abcd")).tokens.tolist()
    assert load(tmp_path / "*.txt").tokens.tolist() == expected
    assert load(tmp_path / "**" / "[a-d].txt").tokens.tolist() == expected
    assert load(f"{tmp_path / 'a.txt'}, {tmp_path / '*.txt'}").tokens.tolist() == expected, "no file twice"
    assert (
        load(f"{tmp_path / 'b.txt'},{tmp_path / 'a.txt'}").tokens.tolist()
        != load(tmp_path / "[ab].txt").tokens.tolist()
    )
    with_comma = tmp_path / "a,b.jsonl"
    assert load(jsonl(with_comma, texts)).tokens.tolist() == expected
    plain = with_comma.read_bytes()
    frames = [zstandard.compress(plain[:1000]), b"\x50\x2a\x4d\x18\x04\0\0\0skip", zstandard.compress(plain[1000:])]
    (tmp_path / "f.jsonl.zst").write_bytes(b"".join(frames))
    assert load(tmp_path / "f.jsonl.zst").tokens.tolist() == expected
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(texts[0].encode("utf-8-sig")))
    assert load(tmp_path / "a.txt.zst").tokens.tolist() == load(tmp_path / "a.txt").tokens.tolist()


def test_jsonl_fields_blank_lines_and_byte_order_mark(load, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"body": TEXT, "domain": "code"}),
        "",
        json.dumps({"body": "short", "domain": "never seen"}),
        json.dumps({"body": TEXT, "domain": ["not", "a", "name"]}),
    ]
    path.write_text("\n".join(lines), encoding="utf-8-sig")  # and no line break at the end
    result = load(path, 16, text_field="body")
    count = len(encode(tokenizer, TEXT)) // 16
    assert result.domains == ("code",) * count + ("",) * count
    assert result.documents.tolist() == [0] * count + [2] * count
    assert (result.num_documents, result.num_skipped) == (3, 1)


def test_stdlib_is_there_and_leaves_out_installed_packages(load):
    files = [
        file for file in documents._walk(Path(json.__file__).parent.parent, ("site-packages",)) if file.suffix == ".py"
    ]
    assert Path(json.__file__) in files
    assert not any("site-packages" in file.parts for file in files)
    assert len(load("stdlib", 128, max_tokens=128 * 200).tokens) == 200


def test_hugging_face_dataset(load, tmp_path, monkeypatch):
    asked = []

    class Rows(list):
        _fingerprint = "f1"

    def load_dataset(*args, **options):
        asked.append((args, options))
        if "missing" in args:
            raise FileNotFoundError("no such dataset\nsecond line")
        return Rows({"text": text, "domain": "web"} for text in numbered(3))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    expected = load(jsonl(tmp_path / "a.jsonl", numbered(3))).tokens.tolist()
    for name, called in {
        "hf:o/n": (("o/n", None), {"split": "train"}),
        "hf:o/n:c": (("o/n", "c"), {"split": "train"}),
        "hf:o/n:c:test": (("o/n", "c"), {"split": "test"}),
        "hf:o/n::test": (("o/n", None), {"split": "test"}),
    }.items():
        result = load(name)
        assert result.tokens.tolist() == expected
        assert set(result.domains) == {"web"}
        assert asked[-1] == called
    with pytest.raises(ConsaError, match=r"'hf:missing': no such dataset; ") as caught:
        load("hf:missing")
    assert "second line" not in str(caught.value)
    with pytest.raises(ConsaError, match="hf:o/n row 0: no field 'body'"):
        load("hf:o/n", text_field="body")
    Rows._fingerprint = "f2"
    monkeypatch.setattr(sequences, "_cut", fail)
    with pytest.raises(AssertionError):
        load("hf:o/n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConsaError, match=r"pip install 'consa\[datasets\]'"):
        load("hf:o/n")


def test_import_is_cheap():
    heavy = {"torch", "transformers", "tokenizers", "rich", "zstandard"}
    code = f"import sys, consa.data.sequences; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_sequences_spread_over_documents():
    documents = np.array([0, 0, 0, 4, 5, 5, 9])
    found = SequenceSet(
        tokens=np.arange(7)[:, None], domains=tuple("aaabccd"), documents=documents, num_documents=9, num_skipped=5
    )
    whole = found.spread(99)
    assert whole.documents.tolist() == [0, 4, 5, 9, 0, 5, 0]
    assert sorted(whole.tokens[:, 0]) == list(range(7))
    assert found.spread(2).tokens[:, 0].tolist() == [0, 3]
    assert whole.domains == tuple("abcdaca")


# Records in files of other formats, as `datasets` and others write them.


def _records():
    return [{"text": text} for text in numbered(40)]


def _write_csv(path, records):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(records)


def _write_parquet(path, records):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame(records).to_parquet(path)


RECORD_FILES = {
    "lines.json": lambda path, records: path.write_text("\n".join(map(json.dumps, records))),
    "array.json": lambda path, records: path.write_text(json.dumps(records, indent=1)),
    "a.ndjson": lambda path, records: path.write_text("\n".join(map(json.dumps, records))),
    "a.jsonl.gz": lambda path, records: path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode())),
    "a.csv": _write_csv,
    "a.parquet": _write_parquet,
}


@pytest.mark.parametrize("name", RECORD_FILES)
@pytest.mark.parametrize("in_folder", [False, True])
def test_records_are_documents_in_every_format(load, tmp_path, name, in_folder):
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / name
    RECORD_FILES[name](path, _records())
    check_data(str(path))
    wanted = load(jsonl(tmp_path / "wanted.jsonl", numbered(40)))
    found = load(path.parent if in_folder else path)
    assert found.num_documents == 40 and np.array_equal(found.tokens, wanted.tokens)


def test_a_compressed_text_is_one_document(load, tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "b.txt").write_text(TEXT)
    assert np.array_equal(load(tmp_path / "a.txt.gz").tokens, load(tmp_path / "b.txt").tokens)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("fraction", [1e-9, 0.1, 1 - 1e-9])
def test_a_small_corpus_has_both_splits(load, tmp_path, count, fraction):
    """At least a document is held out and one is left; of a single document its end is held out."""
    source = jsonl(tmp_path / "a.jsonl", numbered(count, repeat=40))
    whole = load(source).tokens.tolist()
    train, heldout = (
        load(source, split=split, heldout_fraction=fraction).tokens.tolist() for split in ("train", "heldout")
    )
    assert train and heldout and len(train) + len(heldout) in (len(whole), len(whole) - 1)
    if count == 1 and fraction == 0.1:
        assert whole == train + heldout and len(heldout) == round(len(whole) / 10)


def test_one_sequence_cannot_be_both(load, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    length = load(tmp_path / "a.txt").tokens.size
    with pytest.raises(ConsaError, match=r"is a single document of .* lower seq_len"):
        load(tmp_path / "a.txt", length, split="train")
