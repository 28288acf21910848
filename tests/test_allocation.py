from __future__ import annotations

import copy
import json
import os
import pickle
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from consa.allocation import SCHEMA, Allocation, Granularity, check_sparsity, num_full_units, num_full_units_within
from consa.errors import ConsaError, InvalidAllocationError

# Half surrogates included: a path that is not UTF-8 ends up in the provenance like any other.
text = st.text(st.characters() | st.sampled_from("\ud800\udfff\n"), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    num_layers, num_kv_heads = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    granularity = draw(st.sampled_from(get_args(Granularity)))
    native = draw(st.dictionaries(st.integers(0, num_layers - 1), st.integers(1, 9000), max_size=num_layers - 1))
    mask = draw(hnp.arrays(bool, (num_layers, num_kv_heads)))
    if granularity == "layer":
        mask[:] = mask[:, :1]
    mask[list(native)] = False
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return Allocation(
        full_attention=mask,
        granularity=granularity,
        window=draw(st.integers(1, 10**12)),
        num_sink_tokens=draw(st.integers(0, 100)),
        native_windows=native,
        scores=draw(st.none() | hnp.arrays(np.float64, mask.shape, elements=finite)),
        provenance=draw(st.dictionaries(text, json_values, max_size=3)),
    )


def example(**changes: Any) -> Allocation:
    """A small allocation that uses every field."""
    fields: dict[str, Any] = {
        "full_attention": np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=bool),
        "window": 16,
        "num_sink_tokens": 2,
        "native_windows": {1: 32},
        "scores": np.linspace(-1.5, 2, 12).reshape(4, 3),
        "provenance": {"method": "learned", "seed": 1},
    }
    return Allocation(**fields | changes)


# --- JSON


@given(allocations())
def test_json_keeps_everything(allocation: Allocation):
    again = Allocation.from_json(allocation.to_json())
    assert again == allocation and hash(again) == hash(allocation)
    assert again.to_json() == allocation.to_json()
    np.testing.assert_array_equal(again.full_attention, allocation.full_attention)
    if allocation.scores is None:
        assert again.scores is None
    else:
        np.testing.assert_array_equal(again.scores, allocation.scores)
    for name in ("granularity", "window", "num_sink_tokens", "native_windows", "provenance", "sparsity"):
        assert getattr(again, name) == getattr(allocation, name), name
    allocation.to_json().encode()  # can be written


@given(allocations())
def test_files_keep_everything(tmp_path_factory: pytest.TempPathFactory, allocation: Allocation):
    path = tmp_path_factory.getbasetemp() / "deep" / "allocation.json"
    allocation.save(path)
    assert Allocation.load(path) == allocation


def test_json_is_for_people_too():
    record = json.loads(example(provenance={"model": "модель"}).to_json())
    assert record["schema"] == SCHEMA
    assert record["full_attention"] == ["100", "000", "110", "001"]
    assert record["sparsity"] == 5 / 9  # the layer that slides by itself does not count
    assert "модель" in example(provenance={"model": "модель"}).to_json()


def test_a_path_that_is_not_utf8_can_be_recorded(tmp_path: Path):
    allocation = example(provenance={"model": os.fsdecode(b"/mod\xe8les")})
    allocation.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == allocation
    assert os.fsencode(allocation.provenance["model"]) == b"/mod\xe8les"


def test_equal_allocations_give_equal_bytes():
    one = example(provenance={"b": {"y": (1, 2), "x": 2, "10": 0, "9": 0}, "a": 1})
    other = example(
        full_attention=np.asfortranarray(one.full_attention),
        window=np.int16(16),
        num_sink_tokens=np.int64(2),
        native_windows={np.int32(1): np.int64(32)},
        scores=one.scores.tolist() if one.scores is not None else None,
        provenance={"a": 1, "b": {9: 0, 10: 0, "x": 2, "y": [1, 2]}},
    )
    assert one == other and hash(one) == hash(other) and one.to_json().encode() == other.to_json().encode()
    two = example(native_windows={1: 8, 3: 9}, full_attention=np.eye(4, 3, dtype=bool) & [True, False, True])
    swapped = replace(two, native_windows={3: 9, 1: 8})
    assert two.to_json() == swapped.to_json()


@pytest.mark.parametrize(
    "changes",
    [
        {"full_attention": np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)},
        {"window": 17},
        {"num_sink_tokens": 3},
        {"native_windows": {1: 33}},
        {"scores": None},
        {"provenance": {}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_counts_for_equality(changes: dict[str, Any]):
    assert example(**changes) != example()
    assert example(**changes).to_json() != example().to_json()
    assert example() != "allocation"


def test_granularity_counts_for_equality():
    mask = np.array([[True, True], [False, False]])
    by_layer = Allocation(full_attention=mask, granularity="layer", window=1)
    assert by_layer != Allocation(full_attention=mask, granularity="kv_head", window=1)


# --- immutability


def test_nobody_can_write_to_it():
    allocation = example()
    assert allocation.scores is not None
    with pytest.raises(ValueError, match="read-only"):
        allocation.full_attention[0, 0] = False
    with pytest.raises(ValueError, match="read-only"):
        allocation.scores[0, 0] = 7
    with pytest.raises(FrozenInstanceError):
        allocation.window = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_what_the_caller_does_later_does_not_leak_in():
    mask, scores = np.zeros((4, 3), dtype=bool), np.zeros((4, 3))
    native, provenance = {1: 32}, {"steps": [1, 2], "nested": {"a": 1}}
    allocation = example(full_attention=mask, scores=scores, native_windows=native, provenance=provenance)
    before = allocation.to_json()
    mask[:], scores[:], native[1] = True, 9, 5
    provenance["steps"].append(3)
    provenance["nested"]["a"] = 2
    provenance["new"] = 0
    assert allocation.to_json() == before
    assert mask.flags.writeable and scores.flags.writeable  # the caller's arrays stay the caller's


def test_copies_are_equal():
    for again in (copy.deepcopy(example()), pickle.loads(pickle.dumps(example()))):
        assert again == example() and not again.full_attention.flags.writeable


# --- what does not add up is refused, by name

BAD_FIELDS: list[tuple[str, Any]] = [
    ("full_attention", np.zeros((4, 3))),
    ("full_attention", np.zeros((4, 3), dtype=int)),
    ("full_attention", np.zeros(4, dtype=bool)),
    ("full_attention", np.zeros((4, 3, 1), dtype=bool)),
    ("full_attention", np.zeros((0, 3), dtype=bool)),
    ("full_attention", np.zeros((4, 0), dtype=bool)),
    ("full_attention", [[True, False], [True]]),
    ("full_attention", None),
    ("full_attention", np.ones((4, 3), dtype=bool)),  # FA in layer 1, which slides by itself
    ("granularity", "head"),
    ("granularity", None),
    ("granularity", ["layer"]),
    ("granularity", "layer"),  # with a layer of both kinds
    ("window", 0),
    ("window", -1),
    ("window", 128.0),
    ("window", "128"),
    ("window", True),
    ("window", None),
    ("num_sink_tokens", -1),
    ("num_sink_tokens", 4.0),
    ("num_sink_tokens", False),
    ("num_sink_tokens", None),
    ("native_windows", {4: 8}),
    ("native_windows", {-3: 8}),  # not even for a layer that holds no FA
    ("native_windows", {1: 0}),
    ("native_windows", {1: 8.0}),
    ("native_windows", {1: True}),
    ("native_windows", {"1": 8}),
    ("native_windows", {True: 8}),
    ("native_windows", [(1, 8)]),
    ("native_windows", None),
    ("scores", np.zeros((3, 4))),
    ("scores", np.full((4, 3), np.nan)),
    ("scores", np.full((4, 3), np.inf)),
    ("scores", 5),
    ("scores", "high"),
    ("scores", [[0, 0, 0], [0]]),
    ("scores", [[10**400] * 3] * 4),
    ("scores", [["x"] * 3] * 4),
    ("scores", [[None] * 3] * 4),
    ("provenance", {"loss": float("nan")}),
    ("provenance", {"mask": np.zeros(2)}),
    ("provenance", {"when": object()}),
    ("provenance", None),
    ("provenance", 3),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_field_is_refused_by_name(name: str, value: Any):
    with pytest.raises(InvalidAllocationError, match=name):
        example(**{name: value})


def test_native_windows_must_leave_something():
    with pytest.raises(InvalidAllocationError, match="native_windows"):
        Allocation(full_attention=np.zeros((2, 2), dtype=bool), window=8, native_windows={0: 4, 1: 4})


def test_provenance_too_deep_or_circular_is_refused():
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    circle: dict[str, Any] = {}
    circle["again"] = circle
    for value in ({"deep": deep}, circle):
        with pytest.raises(InvalidAllocationError, match="provenance"):
            example(provenance=value)


BAD_RECORDS: list[tuple[str, Any]] = [
    ("schema", "consa.allocation/2"),
    ("schema", None),
    ("num_layers", 5),
    ("num_layers", "4"),
    ("num_kv_heads", 2),
    ("num_kv_heads", None),
    ("granularity", "head"),
    ("granularity", {}),
    ("window", 0),
    ("window", 16.0),
    ("window", [16]),
    ("num_sink_tokens", -1),
    ("num_sink_tokens", "2"),
    ("sparsity", 0.5),
    ("sparsity", "0.5"),
    ("full_attention", "100000110001"),
    ("full_attention", ["100", "000", "110"]),
    ("full_attention", ["100", "000", "110", "00"]),
    ("full_attention", ["100", "000", "110", "201"]),
    ("full_attention", ["100", "000", "110", [0, 0, 1]]),
    ("full_attention", ["100", "001", "110", "001"]),
    ("native_windows", [1]),
    ("native_windows", {"one": 8}),
    ("native_windows", {"4": 8}),
    ("native_windows", {"1": "8"}),
    ("native_windows", {"1" * 5000: 8}),
    ("scores", [[1.0]]),
    ("scores", {}),
    ("scores", [[None] * 3] * 4),
    ("provenance", ["method"]),
    ("provenance", [["method", "learned"]]),
    ("provenance", None),
]


@pytest.mark.parametrize(("name", "value"), BAD_RECORDS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_record_is_refused_by_name(name: str, value: Any):
    record = json.loads(example().to_json())
    with pytest.raises(InvalidAllocationError, match=name):
        Allocation.from_json(json.dumps(record | {name: value}))


@pytest.mark.parametrize("name", json.loads(example().to_json()))
def test_a_missing_field_is_refused_by_name(name: str):
    record = json.loads(example().to_json())
    del record[name]
    with pytest.raises(InvalidAllocationError, match=name):
        Allocation.from_json(json.dumps(record))


def test_an_unknown_field_is_refused_by_name():
    record = json.loads(example().to_json()) | {"win\ndwo": 3}
    with pytest.raises(InvalidAllocationError, match=r"'win\\ndwo'"):
        Allocation.from_json(json.dumps(record))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', "[" * 100_000, "NaN", "1" * 5000, "\ufeff{}", "\0"])
def test_what_is_no_record_is_refused(content: str):
    with pytest.raises(InvalidAllocationError, match=r"JSON|schema"):
        Allocation.from_json(content)


def test_a_bad_file_is_named(tmp_path: Path):
    path = tmp_path / "broken.json"
    path.write_text(example().to_json().replace('"window": 16', '"window": 0'))
    with pytest.raises(InvalidAllocationError, match=r"broken\.json: window"):
        Allocation.load(path)
    with pytest.raises(ConsaError, match=r"absent\.json"):
        Allocation.load(tmp_path / "absent.json")


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in inner for found in _paths(child, (*path, key)))]


def _loads_or_refuses(content: str) -> None:
    """Any file gives an allocation that survives a round trip, or a ConsaError."""
    try:
        allocation = Allocation.from_json(content)
    except ConsaError as error:
        assert "\n" not in str(error)  # one line, whatever it quotes
        return
    assert Allocation.from_json(allocation.to_json()) == allocation


anything = json_values | st.sampled_from([float("nan"), float("inf"), 10**400, "0", "01", [], {}, -1, 0.5, True])


@given(allocations(), st.data())
def test_mutated_records_load_or_are_refused(allocation: Allocation, data: st.DataObject):
    record = json.loads(allocation.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_paths(record)))
        if not path:
            record[data.draw(text)] = data.draw(anything)
            continue
        parent = record
        for key in path[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[path[-1]] = data.draw(anything)
        else:
            del parent[path[-1]]
    _loads_or_refuses(json.dumps(record))


@given(allocations(), st.data())
def test_mutated_text_loads_or_is_refused(allocation: Allocation, data: st.DataObject):
    content = allocation.to_json()
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(len(content), start + 20)))
    insert = data.draw(text | st.sampled_from(list('0123456789-.eE"{}[],:\\')))
    _loads_or_refuses(content[:start] + insert + content[stop:])


# --- what it adds up to


@given(allocations())
def test_sparsity_is_the_share_of_decided_heads_on_swa(allocation: Allocation):
    decided = [
        not full
        for layer, row in enumerate(allocation.full_attention)
        if layer not in allocation.native_windows
        for full in row
    ]
    assert allocation.sparsity == float(Fraction(sum(decided), len(decided)))
    assert allocation.layers == [x for x in range(allocation.num_layers) if x not in allocation.native_windows]
    assert (allocation.num_layers, allocation.num_kv_heads) == allocation.full_attention.shape


@given(allocations(), st.integers(0, 200), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_kv_cache_bytes_counts_the_tokens_that_the_next_query_may_need(
    allocation: Allocation, seq_len: int, head_dim: int, bytes_per_element: int, batch_size: int
):
    allocation = replace(allocation, window=1 + allocation.window % 100)
    tokens = 0
    last = seq_len - 1
    for layer, row in enumerate(allocation.full_attention):
        for full in row:
            for position in range(seq_len):
                if layer in allocation.native_windows:
                    tokens += last - allocation.native_windows[layer] < position
                else:
                    tokens += full or last - allocation.window < position or position < allocation.num_sink_tokens
    assert allocation.kv_cache_bytes(
        seq_len, head_dim=head_dim, bytes_per_element=bytes_per_element, batch_size=batch_size
    ) == tokens * (2 * head_dim * bytes_per_element * batch_size)


def test_kv_cache_bytes_of_a_dense_model():
    dense = Allocation(full_attention=np.ones((32, 8), dtype=bool), window=512)
    assert dense.kv_cache_bytes(131_072, head_dim=128) == 16 * 2**30  # the 16 GiB that everybody quotes


# --- how many units a target or a budget buys


def nearest(num_units: int, parts: int, whole: int) -> int:
    """FA units nearest to a sparsity of parts / whole, by trying all; ties go to fewer FA units."""
    return min(range(num_units + 1), key=lambda full: (abs(whole * full - (whole - parts) * num_units), full))


def test_num_full_units_is_nearest_for_every_percentage():
    for num_units in range(1, 101):
        for percent in range(101):
            assert num_full_units(num_units, percent / 100) == nearest(num_units, percent, 100), percent


@given(st.integers(1, 2000), st.integers(1, 6), st.data())
def test_num_full_units_is_nearest_for_every_decimal(num_units: int, digits: int, data: st.DataObject):
    parts = data.draw(st.integers(0, 10**digits))
    assert num_full_units(num_units, parts / 10**digits) == nearest(num_units, parts, 10**digits)


def test_num_full_units_of_a_tie_is_the_sparser():
    assert num_full_units(3, 0.5) == 1
    assert num_full_units(30, 0.75) == 7  # 7.5
    assert num_full_units(30, 0.7) == 9  # in binary, 0.3 * 30 is not 9


@pytest.mark.parametrize("sparsity", [-0.01, 1.01, 75, float("nan"), float("inf"), "0.5", None, 0.5j])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: Any):
    for refuse in (check_sparsity, lambda value: num_full_units(10, value)):
        with pytest.raises(ConsaError, match="sparsity"):
            refuse(sparsity)


@given(allocations(), st.integers(0, 300), st.data())
def test_num_full_units_within_is_the_most_that_fits(allocation: Allocation, seq_len: int, data: st.DataObject):
    allocation = replace(allocation, window=1 + allocation.window % 100)
    by_layer = allocation.granularity == "layer"
    units = [[(layer, head) for head in range(allocation.num_kv_heads)] for layer in allocation.layers]
    if not by_layer:
        units = [[head] for layer in units for head in layer]

    def bytes_with(full_units: int) -> int:
        mask = np.zeros_like(allocation.full_attention)
        for unit in units[:full_units]:
            for place in unit:
                mask[place] = True
        return replace(allocation, full_attention=mask).kv_cache_bytes(seq_len, head_dim=4, bytes_per_element=1)

    sizes = [bytes_with(count) for count in range(len(units) + 1)]
    budget = data.draw(st.sampled_from([*sizes, 2 * sizes[-1]])) + data.draw(st.integers(-1, 1))
    fitting = [count for count, size in enumerate(sizes) if size <= budget]
    if fitting:
        found = num_full_units_within(budget, seq_len, example=allocation, head_dim=4, bytes_per_element=1)
        assert found == fitting[-1]
    else:
        with pytest.raises(ConsaError, match=str(sizes[0])):
            num_full_units_within(budget, seq_len, example=allocation, head_dim=4, bytes_per_element=1)


def test_the_decision_is_what_a_model_computes_by():
    mask = np.array([[True, False], [False, True]])
    plain = Allocation(full_attention=mask, window=4)
    told = replace(plain, scores=np.ones((2, 2)), provenance={"method": "by hand"})
    assert told.decision() == plain.decision() and json.dumps(plain.decision())
    for changes in ({"window": 5}, {"num_sink_tokens": 0}, {"full_attention": ~mask}):
        assert replace(plain, **changes).decision() != plain.decision()


def test_repr_is_one_line():
    full = np.array([[True, False], [False, False]])
    allocation = Allocation(full_attention=full, window=7, num_sink_tokens=2, scores=full + 0.5)
    assert repr(allocation) == "Allocation(2 layers x 2 KV heads, sparsity 0.750, window 7, sinks 2)"
    assert str(allocation) == repr(allocation)
