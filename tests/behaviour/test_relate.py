"""How measures and allocations relate, by counting and against numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from consa import Allocation, ConsaError
from consa.behaviour.record import MEASURES, OPTIONAL, Behaviour
from consa.behaviour.relate import agreement, auc, depth, depth_correlation, rank_correlation, relate


def allocation(full: Any, **options: Any) -> Allocation:
    return Allocation(full_attention=np.array(full, dtype=bool), window=8, **options)


def test_rank_correlation_and_auc_by_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, size=(2, 25))

        def ranks(x: np.ndarray) -> np.ndarray:
            return np.array([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])

        assert rank_correlation(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
        full = b > 2
        pairs = [(x > y) + (x == y) / 2 for x in a[full] for y in a[~full]]
        assert auc(a, full) == pytest.approx(np.mean(pairs))
    assert rank_correlation(np.ones(4), np.arange(4)) is None
    assert auc(np.arange(4), np.ones(4, bool)) is None


def test_relations_are_over_decided_layers():
    found = made((3, 2))
    scores = np.array(found.measures["copy"], dtype=float)
    scores[1] = 99
    chosen = allocation([[1, 0], [0, 0], [1, 1]], scores=scores, native_windows={1: 4})
    relations = {relation.measure: relation for relation in relate(found, chosen)}
    assert list(relations) == list(MEASURES)
    assert relations["copy"].with_scores == pytest.approx(1)
    decided = found.measures["entropy"][[0, 2]]
    assert relations["entropy"].auc == auc(decided, np.array([[True, False], [True, True]]))
    with pytest.raises(ConsaError, match="2 layers x 2 KV heads, but the behaviour was measured on 3 x 2"):
        relate(found, allocation([[1, 0], [0, 0]]))


def test_relations_of_layers_are_over_layers():
    found = made((3, 2))
    chosen = allocation([[1, 1], [0, 0], [1, 1]], granularity="layer", scores=[[2, 2], [0, 0], [1, 1]])
    relations = {relation.measure: relation for relation in relate(found, chosen)}
    means = found.measures["copy"].mean(1)
    assert relations["copy"].auc == auc(means, np.array([True, False, True]))
    assert relations["copy"].with_scores == rank_correlation(means, np.array([2, 0, 1]))


def test_depth_tells_blocks_from_scatter():
    def of(layers: list[int]) -> Any:
        full = np.zeros((24, 1), dtype=bool)
        full[layers] = True
        return depth(allocation(full), seed=0)

    block, scattered = of([9, 10, 11, 12, 13, 14]), of([0, 4, 8, 12, 16, 20])
    assert (block.mean_run, scattered.mean_run) == (6, 1)
    assert (block.blocks, scattered.blocks[1:3]) == ([(9, 14)], [(4, 4), (8, 8)])
    assert block.p_run < 0.01 and scattered.p_run > 0.9
    assert block.p_bottom < 0.1 and block.p_middle < 0.01 and scattered.p_bottom > 0.5
    assert block.expected_run == pytest.approx(1.3, abs=0.1)
    assert of([9, 10, 11, 12, 13, 14]) == block


def test_depth_is_over_decided_layers():
    found = depth(allocation([[0, 0], [1, 1], [0, 0], [1, 1], [0, 0]], native_windows={2: 4}))
    assert found.blocks == [(1, 3)] and found.mean_run == 2  # layer 2 was not to be decided
    nothing = depth(allocation([[0, 0]] * 3))
    assert (nothing.thirds, nothing.blocks, nothing.mean_run, nothing.p_bottom) == ((0, 0, 0), [], 0, 1)
    assert (nothing.bare, nothing.p_bare) == (3, 1)


def test_p_values_are_those_of_all_orders():
    """Three FA layers of six, all twenty orders counted."""
    found = depth(allocation([[0], [0], [1], [1], [1], [0]]), permutations=20_000)
    assert found.p_bottom == pytest.approx(4 / 20, abs=0.02)  # three of the upper four
    assert found.p_middle == pytest.approx(4 / 20, abs=0.02)  # both of the middle two
    assert found.p_run == pytest.approx(4 / 20, abs=0.02)  # one run of three
    assert found.bare == 2 and found.p_bare == pytest.approx(4 / 20, abs=0.02)  # none in the lowest two


def test_depth_correlates_across_shapes():
    short = allocation([[0, 0], [1, 1], [1, 0], [0, 1]])
    twice = allocation(np.repeat([[0], [1], [1], [0]], 2, axis=0))
    assert depth_correlation(short, short) == 1
    assert depth_correlation(short, twice) == pytest.approx(
        rank_correlation(np.array([0, 2, 1, 1]), np.array([0, 1, 1, 0]))
    )
    odd = allocation([[1], [0], [1]])
    thirds = np.array([1 / 3, 1, 2 / 3])  # of `short`, each a layer and a third wide
    assert depth_correlation(short, odd) == pytest.approx(rank_correlation(np.array([1, 0, 1]), thirds))
    assert depth_correlation(short, allocation([[1]] * 4)) is None


def test_depth_correlates_fully_with_itself_at_twice_the_layers():
    """Sums of thirds differ in their last bits, which must not part what is tied."""
    full = np.array([[0, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]])
    assert depth_correlation(allocation(full), allocation(np.repeat(full, 2, axis=0))) == pytest.approx(1)


def test_blocks_are_layers_above_the_mean_beside_shuffles_alone():
    found = depth(allocation([[1, 1], [1, 1], [1, 0], [1, 0]]))
    assert found.blocks == [(0, 1)] and found.mean_run == 2
    block = allocation([[0]] * 9 + [[1]] * 6 + [[0]] * 9)
    assert depth(block, permutations=1).expected_run < 3  # 6 as it is


def test_thirds_and_agreement():
    first = allocation([[1, 1], [0, 0], [1, 0], [0, 0], [0, 1], [0, 0]], scores=np.arange(12).reshape(6, 2))
    assert depth(first).thirds == (0.5, 0.25, 0.25)
    second = allocation([[1, 1], [0, 0], [0, 0], [0, 0], [0, 1], [1, 1]], scores=-np.arange(12).reshape(6, 2))
    found = agreement(first, second)
    assert found.jaccard == 3 / 6 and found.rank_correlation == pytest.approx(-1)
    assert found.expected_jaccard == pytest.approx((4 * 5 / 12) / (9 - 4 * 5 / 12))
    layers = allocation([[1, 1]] * 2 + [[0, 0]] * 4, granularity="layer")
    assert agreement(first, layers).rank_correlation is None
    with pytest.raises(ConsaError, match="do not compare"):
        agreement(first, allocation([[1, 0]]))


def test_agreement_is_over_decided_layers():
    full, scores = [[1, 0], [0, 0], [1, 1]], np.array([[3.0, 1.0], [0.0, 0.0], [4.0, 2.0]])
    first, second = (
        allocation(full, scores=scores + np.array([[0], [native], [0]]), native_windows={1: 4}) for native in (9, -9)
    )
    found = agreement(first, second)
    assert (found.jaccard, found.rank_correlation) == (1, 1)
    assert found.expected_jaccard == pytest.approx(9 / 4 / (6 - 9 / 4))  # of 3 among 4


def made(shape: tuple[int, int] = (4, 3), *, seed: int = 0, **changes: Any) -> Behaviour:
    rng = np.random.default_rng(seed)
    by_distance = rng.random((*shape, 5)).astype(np.float32)
    measures = {name: rng.random(shape).astype(np.float32) for name in MEASURES}
    fields = {"measures": measures, "by_distance": by_distance / by_distance.sum(-1, keepdims=True)}
    return Behaviour(**{**fields, "window": 8, "num_sink_tokens": 4, "provenance": {"model": "a"}, **changes})


def test_a_behaviour_comes_back_as_it_was(tmp_path: Path):
    saved = made()
    saved.save(tmp_path / "b.safetensors")
    loaded = Behaviour.load(tmp_path / "b.safetensors")
    assert all((loaded.measures[name] == saved.measures[name]).all() for name in MEASURES)
    assert (loaded.by_distance == saved.by_distance).all() and loaded.provenance == saved.provenance
    content = (tmp_path / "b.safetensors").read_bytes()
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def bad(name: str, values: Any) -> dict[str, Any]:
    return {"measures": {**made().measures, name: values}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (bad("copy", np.zeros((3, 4), np.float32)), r"copy must be finite float32 \(4, 3\), got float32 \(3, 4\)"),
        (bad("copy", np.zeros((4, 3))), "copy must be finite float32"),
        (bad("entropy", np.full((4, 3), np.nan, np.float32)), "entropy holds numbers that are not finite"),
        (bad("needle", np.full((4, 3), 1.5, np.float32)), r"needle must hold shares in \[0, 1\], got 1.5 to 1.5"),
        (bad("nedle", np.zeros((4, 3), np.float32)), "measures missing: none; unknown: nedle"),
        ({"measures": {}}, "measures missing: beyond_window_share, copy, "),
        ({"by_distance": np.zeros((4, 3, 5), np.float32)}, "by_distance must add up to 1 per head, got 0 to 0"),
        ({"by_distance": np.zeros((4, 3), np.float32)}, r"by_distance must be \(num_layers"),
        ({"window": 0}, "window must be an integer >= 1"),
        ({"num_sink_tokens": "4"}, "num_sink_tokens must be an integer >= 0"),
    ],
)
def test_what_does_not_add_up_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ConsaError, match=message):
        made(**changes)


def test_what_may_be_missing_may_be_missing():
    measures = {name: values for name, values in made().measures.items() if name not in OPTIONAL}
    assert made(measures=measures).measures.keys() == MEASURES.keys() - OPTIONAL


def test_damaged_files_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "b.safetensors"
    with pytest.raises(ConsaError, match=r"cannot read .*b\.safetensors"):
        Behaviour.load(path)
    path.write_bytes(b"not at all")
    with pytest.raises(ConsaError, match=r"b\.safetensors is damaged"):
        Behaviour.load(path)
    tensors = {"by_distance": made().by_distance, **made().measures}
    record = {"schema": "consa.behaviour/1", "num_sink_tokens": 4, "provenance": {}}
    for metadata, missing, message in (
        ({}, "", "metadata does not say schema 'consa.behaviour/1'"),
        ({"consa": json.dumps(record)}, "", "window is missing"),
        ({"consa": json.dumps(record | {"window": 8})}, "entropy", "measures missing: entropy"),
        ({"consa": json.dumps(record | {"window": 8})}, "by_distance", "by_distance is missing"),
        ({"consa": "{"}, "", "damaged"),
    ):
        kept = {name: values for name, values in tensors.items() if name != missing}
        path.write_bytes(safetensors.numpy.save(kept, metadata))
        with pytest.raises(ConsaError, match=rf"b\.safetensors.*{message}"):
            Behaviour.load(path)
