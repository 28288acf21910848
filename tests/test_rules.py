from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import consa
from consa import rules
from consa.allocation import Allocation
from consa.errors import ConsaError, InvalidAllocationError
from consa.rules import RULES

LAYER_AND_HEAD_RULES = [rule for name, rule in RULES.items() if name != "uniform_heads"]
CASES = [(rule, granularity) for rule in LAYER_AND_HEAD_RULES for granularity in ("layer", "kv_head")]
CASES.append((rules.uniform_heads, "kv_head"))

percentages = st.integers(0, 100)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 9))


def full_units(allocation: Allocation) -> list[int]:
    """The numbers of the FA units, counted from the input over the layers that the allocation decides."""
    rows = allocation.full_attention[allocation.layers]
    return np.flatnonzero(rows[:, 0] if allocation.granularity == "layer" else rows).tolist()


def nearest(num_units: int, percent: int) -> int:
    """FA units nearest to `percent` on SWA, by trying all; ties go to fewer FA units."""
    return min(range(num_units + 1), key=lambda full: (abs(100 * full - (100 - percent) * num_units), full))


@pytest.mark.parametrize(("rule", "granularity"), CASES)
@given(size=sizes, percent=percentages, data=st.data())
def test_every_rule_hits_every_target(rule: Any, granularity: Any, size: Any, percent: int, data: Any):
    num_layers, num_kv_heads = size
    native = data.draw(st.dictionaries(st.integers(0, num_layers - 1), st.integers(1, 4096), max_size=num_layers - 1))
    allocation = rule(
        num_layers,
        num_kv_heads,
        sparsity=percent / 100,
        granularity=granularity,
        window=77,
        num_sink_tokens=3,
        native_windows=native,
    )
    num_units = (num_layers - len(native)) * (1 if granularity == "layer" else num_kv_heads)
    count = nearest(num_units, percent)
    assert len(full_units(allocation)) == count
    assert allocation.sparsity == (num_units - count) / num_units
    assert not allocation.full_attention[list(native)].any()
    assert allocation.full_attention.shape == (num_layers, num_kv_heads)
    assert allocation.granularity == granularity
    assert (allocation.window, allocation.num_sink_tokens) == (77, 3)
    assert allocation.native_windows == native
    assert allocation.provenance["method"] == rule.__name__
    assert allocation.provenance["target_sparsity"] == percent / 100


def test_a_feasible_target_is_the_sparsity_to_the_last_bit():
    for percent in range(0, 101):
        assert rules.bottom(100, 1, sparsity=percent / 100).sparsity == percent / 100
    assert rules.bottom(30, 3, sparsity=0.7).sparsity == 0.7


# 10 layers with 4 FA, 1 KV head: where FA lies, drawn by hand.
PATTERNS = {
    "interleaved": "1010010100",
    "interleaved_late": "0010100101",
    "bottom": "1111000000",
    "top": "0000001111",
    "middle": "0001111000",
    "sandwich": "1100000011",
}


@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
@pytest.mark.parametrize("name", PATTERNS)
def test_where_full_attention_lies(name: str, granularity: str):
    allocation = RULES[name](10, 1, sparsity=0.6, granularity=granularity)
    assert "".join("01"[full] for full in allocation.full_attention[:, 0].astype(int)) == PATTERNS[name]


@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
@given(size=sizes, percent=percentages)
def test_blocks_lie_where_their_names_say(granularity: str, size: tuple[int, int], percent: int):
    num_units = size[0] * (1 if granularity == "layer" else size[1])
    count = nearest(num_units, percent)

    def units(rule: Any) -> list[int]:
        return full_units(rule(*size, sparsity=percent / 100, granularity=granularity))

    assert units(rules.bottom) == list(range(count))
    assert units(rules.top) == list(range(num_units - count, num_units))
    middle = units(rules.middle)
    if count:
        assert middle == list(range(middle[0], middle[0] + count))  # one block
        assert 0 <= (num_units - 1 - middle[-1]) - middle[0] <= 1  # as much below as above
    sandwich = set(units(rules.sandwich))
    swa = [unit for unit in range(num_units) if unit not in sandwich]
    if swa:
        assert swa == list(range(swa[0], swa[-1] + 1))  # one block of SWA
        assert 0 <= swa[0] - (num_units - 1 - swa[-1]) <= 1  # the input side takes the odd one


@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
@given(size=sizes, percent=percentages)
def test_interleaved_is_even_and_comes_in_two_phases(granularity: str, size: tuple[int, int], percent: int):
    num_units = size[0] * (1 if granularity == "layer" else size[1])
    early = full_units(rules.interleaved(*size, sparsity=percent / 100, granularity=granularity))
    late = full_units(rules.interleaved_late(*size, sparsity=percent / 100, granularity=granularity))
    assert late == [num_units - 1 - unit for unit in reversed(early)]
    if early:
        assert early[0] == 0  # each stretch begins with FA, so the first unit has it, and the last stretch counts
        gaps = np.diff([*early, num_units])
        assert gaps.max() - gaps.min() <= 1


@given(sizes, percentages, st.data())
def test_uniform_heads_gives_every_layer_the_same(size: tuple[int, int], percent: int, data: Any):
    num_layers, num_kv_heads = size
    native = data.draw(st.dictionaries(st.integers(0, num_layers - 1), st.just(8), max_size=num_layers - 1))
    allocation = rules.uniform_heads(num_layers, num_kv_heads, sparsity=percent / 100, native_windows=native)
    rows = allocation.full_attention[allocation.layers]
    counts = rows.sum(1)
    assert counts.max() - counts.min() <= 1
    assert (rows == (np.arange(num_kv_heads) < counts[:, None])).all()  # the first heads
    richer = np.flatnonzero(counts > counts.min()).tolist()
    if richer:
        gaps = np.diff([*richer, len(rows)])
        assert richer[0] == 0 and gaps.max() - gaps.min() <= 1


def test_uniform_heads_has_no_layers_to_give():
    with pytest.raises(ConsaError, match="granularity"):
        rules.uniform_heads(4, 4, sparsity=0.5, granularity="layer")


@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
def test_random_units_is_random_and_reproducible(granularity: Any):
    def draw(seed: int) -> Allocation:
        return rules.random_units(24, 4, sparsity=0.5, granularity=granularity, seed=seed)

    drawn = [draw(seed) for seed in range(50)]
    assert drawn == [draw(seed) for seed in range(50)]
    assert len({allocation.full_attention.tobytes() for allocation in drawn}) == 50
    assert rules.random_units(24, 4, sparsity=0.5, granularity=granularity) == drawn[0]
    assert drawn[7].provenance["seed"] == 7
    share = np.mean([allocation.full_attention for allocation in drawn], axis=0)
    assert share.min() > 0.1 and share.max() < 0.9  # no place is left out or always in


def test_random_units_stays_the_same_between_versions():
    allocation = rules.random_units(8, 1, sparsity=0.5, seed=0)
    assert full_units(allocation) == [2, 3, 4, 6]


def test_one_decision_per_layer_covers_its_heads():
    allocation = rules.interleaved(6, 3, sparsity=0.5, granularity="layer")
    assert (allocation.full_attention == np.array([[1], [0], [1], [0], [1], [0]], dtype=bool)).all()


def test_native_windows_are_skipped_not_counted():
    allocation = rules.interleaved(8, 2, sparsity=0.5, native_windows={0: 16, 2: 16, 4: 16, 6: 16})
    assert np.flatnonzero(allocation.full_attention[:, 0]).tolist() == [1, 5]
    assert allocation.sparsity == 0.5


def test_every_rule_of_a_granularity():
    options = {"sparsity": 0.5, "window": 8}
    by_head = rules.every_rule(8, 2, granularity="kv_head", seed=3, **options)
    assert by_head == {
        name: rule(8, 2, granularity="kv_head", **options | ({"seed": 3} if name == "random_units" else {}))
        for name, rule in RULES.items()
    }
    by_layer = rules.every_rule(8, 2, granularity="layer", **options)
    assert by_layer.keys() == RULES.keys() - {"uniform_heads"}


def test_the_table_of_rules_is_complete():
    assert set(RULES) == {
        name
        for name, rule in vars(rules).items()
        if callable(rule) and getattr(rule, "__module__", "") == rules.__name__ and name[0] != "_"
    } - {"from_units", "dense", "all_swa", "names", "by_name", "every_rule"}
    assert consa.rules is rules


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": 1.5}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": -3}, "num_layers=-3"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"native_windows": dict.fromkeys(range(4), 8)}, "no units"),
        ({"native_windows": {9: 8}}, "native_windows"),
        ({"native_windows": {0: 0}}, "native_windows"),
        ({"granularity": "head"}, "granularity"),
        ({"window": 0}, "window"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES.values())
def test_bad_input_is_refused_by_name(rule: Any, changes: dict[str, Any], named: str):
    arguments: dict[str, Any] = {"num_layers": 4, "num_kv_heads": 2, "sparsity": 0.5} | changes
    error = InvalidAllocationError if named in ("native_windows", "window", "num_sink_tokens") else ConsaError
    with pytest.raises(error, match=named):
        rule(**arguments)


def test_a_negative_seed_is_refused_by_name():
    with pytest.raises(ConsaError, match="seed"):
        rules.random_units(4, 2, sparsity=0.5, seed=-1)
