"""Retrieval prompts; tests/evaluation tests the answers of models."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from consa.data.questions import NUM_NEEDLES, TASKS, Example, answered, examples, num_answer_tokens
from consa.errors import ConsaError


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_length_but_never_exceed_it(task: str, tokenizer):
    for length in (1500, 2500):
        for example in examples(task, tokenizer, length=length, count=3):
            taken = len(tokenizer(example.prompt)["input_ids"]) + num_answer_tokens(example, tokenizer)
            assert length - 120 < taken <= length  # less than another sentence of letters is missing
            assert example.prompt == example.prompt.rstrip()  # the continuation brings its own space


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_examples(task: str, tokenizer):
    first = examples(task, tokenizer, length=1500, count=3)
    assert first == examples(task, tokenizer, length=1500, count=3)
    assert not set(first) & set(examples(task, tokenizer, length=1500, count=3, seed=1))
    assert len(set(first)) == 3


@pytest.mark.parametrize("task", ["single", "multi_key", "multi_query", "multi_value"])
def test_the_prompt_tells_each_number_once(task: str, tokenizer):
    for example in examples(task, tokenizer, length=2000, count=4):
        assert all(example.prompt.count(answer) == 1 for answer in example.answers)
        hidden = re.findall(r"\d{7}", example.prompt)
        assert len(hidden) == (1 if task == "single" else NUM_NEEDLES)
        assert set(example.answers) <= set(hidden)
        assert len(example.answers) == (1 if task in ("single", "multi_key") else NUM_NEEDLES)


def test_the_question_names_what_is_asked_for(tokenizer):
    for example in examples("multi_key", tokenizer, length=2000, count=4):
        (thing,) = re.findall(r"for (\w+) is$", example.prompt)
        assert f"for {thing} is {example.answers[0]}." in example.prompt
    for example in examples("multi_query", tokenizer, length=2000, count=4):
        things = re.findall(r"numbers for (\w+), (\w+), (\w+) and (\w+), in this order, are$", example.prompt)
        for thing, answer in zip(things[0], example.answers, strict=True):
            assert f"for {thing} is {answer}." in example.prompt


def test_variables_pass_a_value_on(tokenizer):
    for example in examples("variable_tracking", tokenizer, length=2000, count=4):
        assigned = dict(re.findall(r"VAR (\w+) = (\w+)\.", example.prompt))
        (value,) = re.findall(r"have the value (\d+) are VAR$", example.prompt)
        for name in example.answers:
            while name in assigned:
                name = assigned[name]
            assert name == value
        assert len(example.answers) == len(assigned) == NUM_NEEDLES + 1


def test_common_words_are_the_most_frequent(tokenizer):
    for example in examples("common_words", tokenizer, length=4000, count=3):
        listed = re.findall(r"(\w+),", example.prompt)
        frequent = sorted(set(listed), key=listed.count)[-3:]
        assert set(frequent) == set(example.answers)


def test_depths_spread_over_the_text(tokenizer):
    depths = [
        example.prompt.index(example.answers[0]) / len(example.prompt)
        for example in examples("single", tokenizer, length=3000, count=10)
    ]
    assert depths == sorted(depths) and depths[0] < 0.15 and depths[-1] > 0.85
    assert max(b - a for a, b in pairwise(depths)) < 0.2
    asked = [e.prompt.index(f"is {e.answers[0]}") for e in examples("multi_key", tokenizer, length=2000, count=20)]
    assert min(asked) < 500 and max(asked) > 1200


def test_answered_is_the_share_of_the_answers():
    example = Example("", ("RAQZS", "word"))
    assert answered(example, " raqzs, and the Word is") == 1
    assert answered(example, "RAQZ words") == 0.5
    assert answered(example, "") == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": "needle"}, "one of single, multi_key, .* got 'needle'"),
        ({"length": 60}, "'single' does not fit into 60 tokens"),
        ({"length": 0}, "does not fit into 0 tokens"),
        ({"count": 0}, "at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, named: str, tokenizer):
    given = {"task": "single", "length": 1000, "count": 1} | changes
    with pytest.raises(ConsaError, match=named):
        examples(given.pop("task"), tokenizer, **given)


def test_what_is_hidden_lies_in_the_middle_of_equal_parts(tokenizer):
    made = examples("single", tokenizer, length=3000, count=4)
    depths = [example.prompt.index(example.answers[0]) / len(example.prompt) for example in made]
    assert depths == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.06)
