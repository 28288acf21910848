"""What a run says about itself at its end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consa.evaluation.intervals import Estimate
from consa.evaluation.table import Line, Table
from consa.runs.verdict import advice, against_best_rule, next_step, questions, verdict


def line(name: str, cache: int, needles: float | None = None) -> Line:
    loss, nothing = Estimate(1.5, 1.4, 1.6), {}
    fields = {"by_position": nothing, "differences_by_position": nothing, "by_domain": nothing}
    return Line(
        **{"name": name, "kind": name, "sparsity": 0.5, "cache_bytes": cache, "loss": loss, "difference": loss},
        **fields,
        differences_by_domain={},
        recovered=0.5,
        retrieval={} if needles is None else {"needle": {1024: needles}},
    )


def summary(gain: Estimate | None, *, fractional: float | None = 0.0, margin: float = 1.0, **more: Any) -> Any:
    needles = more.pop("needles", (None, None))
    lines = (line("dense", 400, needles[0]), line("learned", 100, needles[1]))
    ends = {} if gain is None else {end: None if math.isnan(v) else v for end, v in vars(gain).items()}
    return {
        "table": Table(start=1, cache_tokens=32768, lines=lines, how={}).to_record(),
        "best_rule": None if gain is None else {"rule": "sandwich", "gain": ends},
        "learn": {"mode": "frozen", "num_steps": 200},
        **{"fractional": fractional, "margin": margin, "model": {"model": "a/model"}},
        **{"heldout_sequences": 16, "heldout_documents": 9, "seq_len": 1024, "window": 128},
        **{"run": {"num_heldout": 16}, "command": "consa learn a/model"},
        **more,
    }


GOOD, UNCLEAR, BAD = Estimate(0.2, 0.1, 0.3), Estimate(0.01, -0.1, 0.1), Estimate(-0.2, -0.3, -0.1)
NO_INTERVAL = Estimate(0.2, math.nan, math.nan)


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        (GOOD, "Beats the best rule (sandwich) by 0.200 [0.100, 0.300] nats; "),
        (UNCLEAR, "Does not clearly beat the best rule (sandwich): the difference is 0.010 [-0.100, 0.100] nats"),
        (BAD, "Does not beat the best rule (sandwich), whose loss is 0.200 [0.100, 0.300] nats lower; "),
        (Estimate(-0.2, math.nan, math.nan), "The loss is 0.200 nats higher than that of the best rule (sandwich); "),
        (NO_INTERVAL, "The loss is 0.200 nats lower than that of the best rule (sandwich); all held-out text"),
        (None, "no rule was measured; "),
    ],
)
def test_the_verdict_follows_the_interval(gain: Estimate | None, text: str):
    said = verdict(summary(gain))
    assert text in said and said.endswith("KV cache 25.0% of dense at 32,768 tokens.") and "\n" not in said


def test_needles_are_named_where_they_were_measured():
    assert verdict(summary(GOOD, needles=(1.0, 0.9))).endswith("; needles found 90%, by dense 100%.")


@pytest.mark.parametrize(
    ("given", "starts"),
    [
        (summary(GOOD), []),
        (summary(GOOD, fractional=0.3), ["Undecided: 30%"]),
        (summary(GOOD, margin=0.05), ["Not separated: "]),
        (summary(GOOD, margin=-3.0), []),  # the refinement exchanged units
        (summary(UNCLEAR), ["Too little text"]),
        (summary(NO_INTERVAL), ["Too little text"]),
        (summary(BAD, fractional=0.3, margin=0.0), ["Undecided", "Not separated", "A rule is better"]),
        (summary(None), []),
        (summary(UNCLEAR, fractional=None), []),  # nothing was learned
    ],
)
def test_a_poor_run_says_what_to_change(given: Any, starts: list[str]):
    lines = advice(given)
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * len(starts)
    assert all("with another --out" in line for line in lines if "--num-steps" in line), "this run's folder is taken"


@pytest.mark.parametrize(
    ("given", "words", "not_words"),
    [
        (summary(UNCLEAR), ["--num-heldout 64"], ["--out"]),  # which a finished run may change
        (summary(UNCLEAR, heldout_sequences=9), ["all held-out", "--heldout-data", "another --out"], ["--num-heldout"]),
        (summary(NO_INTERVAL, heldout_documents=1), ["one document", "--heldout-data"], ["--num-heldout"]),
    ],
)
def test_more_text_is_asked_for_where_it_helps(given: Any, words: list[str], not_words: list[str]):
    (line,) = advice(given)
    assert all(word in line for word in words) and not any(word in line for word in not_words)


def test_the_demo_has_nothing_to_change():
    assert advice(summary(BAD, fractional=0.5, command="consa demo --seed 0")) == []


def test_the_best_rule_is_compared_sequence_by_sequence():
    noise = np.linspace(0, 5, 16)  # common to all, so that only paired differences are certain
    losses = {"dense": noise, "learned": noise + 0.2, "top": noise + 0.5, "bottom": noise + 0.4 + 0.01 * np.sin(noise)}
    compared = against_best_rule(losses, np.arange(16))
    assert compared and compared["rule"] == "bottom"
    gain = compared["gain"]
    assert 0.18 < gain["low"] < gain["mean"] < gain["high"] < 0.22
    assert against_best_rule({"dense": noise, "learned": noise}, np.arange(16)) is None
    alone = against_best_rule(losses, np.zeros(16))
    assert alone and alone["gain"]["low"] is None


def test_the_next_step_can_be_copied():
    folder = Path("runs/a run")
    assert next_step(summary(GOOD), folder) == (
        "consa convert a/model --allocation 'runs/a run' --out 'runs/a run/hybrid'"
    )
    joint = summary(GOOD, learn={"mode": "joint"})
    assert next_step(joint, folder).startswith("consa generate 'runs/a run/model' --prompt ")


def test_questions_are_proposed_where_none_were_asked():
    (line,) = questions(summary(GOOD, seq_len=2048), Path("runs/a run"))
    assert line.endswith(
        "consa eval a/model --config 'runs/a run' --allocation 'runs/a run' --retrieval single,multi_value"
        " --lengths 2048"
    ), "a length that the model takes"
    assert questions(summary(GOOD, needles=(1.0, 0.9)), Path("runs")) == []
    assert questions(summary(GOOD, learn={"mode": "joint"}), Path("runs")) == [], "its hybrid has weights of its own"
