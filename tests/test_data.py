import json
import subprocess
import sys
import tempfile
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from consa import data, documents
from consa.data import SequenceSet, load_sequences
from consa.errors import ConsaError

TEXT = (
    "The quick brown fox jumps over the lazy dog.\nIn the beginning there was a loop:\n"
    "    for index in range(10):\n        total += index\n\nAnd the loop had an end, and the end was good.\n"
)
# Whole words and pieces of them, with line breaks, indents and characters of several bytes.
TEXTS = st.lists(
    st.sampled_from([*TEXT.split(" "), "\n", "\n\n", "   ", "é", "樹", "🌳", "x"]), max_size=60
).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def load(tokenizer, tmp_path):
    """`load_sequences` of the tiny tokenizer, with its own cache and without a progress bar."""

    def load(source, seq_len=8, *, tokenizer=tokenizer, **options):
        options = {"cache_dir": tmp_path / "cache", "progress": False, "workers": 2} | options
        return load_sequences(str(source), tokenizer, seq_len, **options)

    return load


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def jsonl(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts), encoding="utf-8")
    return path


def numbered(count, repeat=4):
    return [f"Document {number} of {count}.\n" + TEXT * repeat for number in range(count)]


def fail(*_, **__):
    raise AssertionError("the cache was not used")


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
    def sides(folder, texts):
        """Which documents came out on each side, by number and by text."""
        source, found = str(jsonl(Path(folder, "a.jsonl"), texts)), {}
        for split in ("all", "train", "heldout"):
            try:
                result = load_sequences(
                    source,
                    tokenizer,
                    4,
                    split=split,
                    heldout_fraction=fraction,
                    cache_dir=Path(folder),
                    progress=False,
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
    monkeypatch.setattr(data, "PIECE_CHARS", 100)
    pieces = list(data._split_long(TEXT * 30))
    assert len(pieces) > 20
    assert "".join(pieces) == TEXT * 30
    assert load(path, cache_dir=tmp_path / "other").tokens.tolist() == whole
    assert [len(piece) for piece in data._split_long("x" * 450)] == [200, 200, 50]  # no line to cut at


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
    frames = [
        zstandard.compress(plain[:1000]),
        b"\x50\x2a\x4d\x18\x04\0\0\0skip",
        zstandard.compress(plain[1000:]),
    ]
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
        file
        for file in documents._walk(Path(json.__file__).parents[1], ("site-packages",))
        if file.suffix == ".py"
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
    monkeypatch.setattr(data, "_cut", fail)
    with pytest.raises(AssertionError):
        load("hf:o/n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConsaError, match="pip install datasets"):
        load("hf:o/n")


# The cache.


def test_second_time_comes_from_the_cache_memory_mapped(load, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", numbered(5), domain="prose")
    first = load(source)
    monkeypatch.setattr(data, "_cut", fail)
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
    monkeypatch.setattr(data, "_cut", fail)
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
    monkeypatch.setattr(data, "_cut", fail)
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
    write = data.write_atomically

    def full_disk(path, content):
        if path.suffix == ".json":
            raise ConsaError("no room")
        write(path, content)

    monkeypatch.setattr(data, "write_atomically", full_disk)
    with pytest.warns(UserWarning, match="no room"):
        load(source)
    monkeypatch.setattr(data, "_cut", fail)
    with pytest.raises(AssertionError, match="the cache was not used"):
        load(source)


def test_default_cache_is_used(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path / "own"))
    load_sequences(str(jsonl(tmp_path / "a.jsonl", numbered(2))), tokenizer, 8, progress=False)
    assert len(list((tmp_path / "own" / "sequences").iterdir())) == 2


# What a user can get wrong.


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
        ("a.txt.zst", zstandard.compress(TEXT.encode())[:-3], r"a\.txt\.zst: the file is cut off"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n')[:-3], r"a\.jsonl\.zst: the file is cut off"),
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


def test_split_without_documents_names_how_many_there_are(load, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [TEXT, TEXT])
    assert load(source).num_documents == 2
    empty = []
    for split in ("train", "heldout"):
        try:
            load(source, split=split, heldout_fraction=0.5)
        except ConsaError as error:
            empty.append((split, str(error)))
    ((split, message),) = empty
    assert f"split '{split}' with heldout_fraction 0.5 has none of the 2 documents of" in message


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


def test_import_is_cheap():
    heavy = {"torch", "transformers", "tokenizers", "rich", "zstandard"}
    code = f"import sys, consa.data; print({heavy} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    )


def test_sequences_spread_over_documents():
    documents = np.array([0, 0, 0, 4, 5, 5, 9])
    found = SequenceSet(
        tokens=np.arange(7)[:, None],
        domains=tuple("aaabccd"),
        documents=documents,
        num_documents=9,
        num_skipped=5,
    )
    whole = found.spread(99)
    assert whole.documents.tolist() == [0, 4, 5, 9, 0, 5, 0]
    assert sorted(whole.tokens[:, 0]) == list(range(7))
    assert found.spread(2).tokens[:, 0].tolist() == [0, 3]
    assert whole.domains == tuple("abcdaca")
