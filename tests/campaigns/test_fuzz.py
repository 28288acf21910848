"""The fuzzing's readers, on some inputs each; `python -m tests.campaigns.fuzz` reads 100,000."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consa import Allocation, ConsaError
from tests.campaigns.fuzz import judge
from tests.campaigns.fuzz_targets import TARGETS, Attempt, Target
from tests.campaigns.mutations import damaged_bytes, damaged_json


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Target, Attempt]]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONSA_CACHE", str(folder / "cache"))
        yield request.param, request.param.prepare(folder)


def test_damaged_input_is_read_or_refused(prepared: tuple[Target, Attempt]):
    target, attempt = prepared
    for number in range(max(5, round(400 * target.share))):
        result = judge(attempt, Random(f"test {target.name} {number}"))
        assert result in ("accepted", "refused"), f"input {number}: {result}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(random=st.randoms(use_true_random=False))
def test_shrunk_damage_to_an_allocation(random: Random, tmp_path: Path):
    """As above, but drawn by hypothesis, which reduces what fails to the least damage that does."""
    (tmp_path / "a.json").write_bytes(damaged_json(random, {"schema": "consa.allocation/1", "scores": None}))
    with contextlib.suppress(ConsaError):
        Allocation.load(tmp_path / "a.json")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_any_json_value_is_refused(value: object):
    import json

    text = json.dumps({"schema": "consa.allocation/1", "full_attention": value})
    with pytest.raises(ConsaError):
        Allocation.from_json(text)


def test_failures_are_told_apart():
    """A judge that could not fail would find nothing."""

    def attempt(error: BaseException) -> Attempt:
        def read(random: Random) -> None:
            raise error

        return read

    assert judge(attempt(ConsaError("one line")), Random(0)) == "refused"
    assert judge(lambda random: None, Random(0)) == "accepted"
    assert judge(attempt(KeyError("a")), Random(0)).startswith("KeyError at tests")
    assert judge(attempt(MemoryError()), Random(0)).startswith("MemoryError")
    assert "characters" in judge(attempt(ConsaError("x" * 20_000)), Random(0))


def test_the_same_seed_gives_the_same_damage():
    made = [damaged_bytes(Random("a 1"), bytes(range(100))) for _ in range(2)]
    assert made[0] == made[1] != damaged_bytes(Random("a 2"), bytes(range(100)))
