"""Retrieval: how often a hybrid that generates with its own cache finds what is hidden in a long text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypedDict

from consa.allocation import Allocation
from consa.cache.hybrid import HybridCache, cache_argument
from consa.config import EvalConfig
from consa.data import questions
from consa.data.questions import Example, answered, num_answer_tokens
from consa.evaluation.cells import Advance, Measure, digest
from consa.files import JsonObject
from consa.model.attach import attached
from consa.model.generate import generate_texts
from consa.model.load import LoadedModel


class Answers(TypedDict):
    """What a model answered.

    Attributes:
        scores: share of the answers that were found, for each example.
        continuations: the generated text of each example.
    """

    scores: list[float]
    continuations: list[str]


def tasks_of(config: EvalConfig) -> list[tuple[str, int]]:
    """The retrieval tasks to measure, each with the length of its prompts in tokens."""
    return [(task, length) for task in config.retrieval_tasks for length in config.retrieval_lengths]


def measures(loaded: LoadedModel, config: EvalConfig) -> Iterator[Measure]:
    """Yield a measure for each retrieval task and length; the examples are made once for all allocations."""
    for task, length in tasks_of(config):
        examples = questions.examples(task, loaded.tokenizer, length=length, count=config.examples, seed=config.seed)
        text = json.dumps([[example.prompt, example.answers] for example in examples])
        yield Measure(
            name=f"{task} {length}",
            settings={"text": digest(text)},
            size=len(examples),
            compute=partial(_compute, loaded, examples, config.batch_size),
        )


def _compute(
    loaded: LoadedModel, examples: Sequence[Example], batch_size: int, allocation: Allocation | None, advance: Advance
) -> JsonObject:
    return dict(ask(loaded, allocation, examples, batch_size=batch_size, on_example=advance))


def ask(
    loaded: LoadedModel,
    allocation: Allocation | None,
    examples: Sequence[Example],
    *,
    batch_size: int = 1,
    on_example: Callable[[int], None] | None = None,
) -> Answers:
    """Continue each prompt greedily, by the number of tokens that the longest answer needs.

    Args:
        loaded: model and tokenizer.
        allocation: attached while the model generates; None leaves the model as it is.
        examples: of one task and length.
        batch_size: prompts computed at once.
        on_example: called with the number of examples done since the last call.
    """
    scores: list[float] = []
    continuations: list[str] = []
    num_tokens = max(num_answer_tokens(example, loaded.tokenizer) for example in examples)
    with nullcontext() if allocation is None else attached(loaded.model, allocation):
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            cache: Any = {} if allocation is None else {cache_argument(loaded.model): HybridCache(allocation)}
            texts = generate_texts(
                loaded.model,
                loaded.tokenizer,
                [example.prompt for example in batch],
                max_new_tokens=num_tokens,
                **cache,
            )
            scores += [answered(example, text) for example, text in zip(batch, texts, strict=True)]
            continuations += texts
            if on_example:
                on_example(len(batch))
    return {"scores": scores, "continuations": continuations}
