"""Retrieval: how often a hybrid that generates with its own cache finds what is hidden in a long text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

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


def tasks_of(config: EvalConfig) -> list[tuple[str, int]]:
    """The retrieval tasks to measure, each with the length of its prompts in tokens."""
    return [(task, length) for task in config.retrieval_tasks for length in config.retrieval_lengths]


def measures(loaded: LoadedModel, config: EvalConfig) -> Iterator[Measure]:
    """Yield a measure for each retrieval task and length; the examples are made once for all allocations."""

    def compute(examples: Sequence[Example], allocation: Allocation | None, advance: Advance) -> JsonObject:
        return ask(loaded, allocation, examples, batch_size=config.batch_size, on_example=advance)

    for task, length in tasks_of(config):
        examples = questions.examples(task, loaded.tokenizer, length=length, count=config.examples, seed=config.seed)
        text = json.dumps([[example.prompt, example.answers] for example in examples])
        yield Measure(
            name=f"{task} {length}",
            settings={"text": digest(text)},
            size=len(examples),
            compute=partial(compute, examples),
        )


def ask(
    loaded: LoadedModel,
    allocation: Allocation | None,
    examples: Sequence[Example],
    *,
    batch_size: int = 1,
    on_example: Callable[[int], None] | None = None,
) -> JsonObject:
    """Continue each prompt greedily, by the number of tokens that the longest answer needs.

    Args:
        loaded: model and tokenizer.
        allocation: attached while the model generates; None leaves the model as it is.
        examples: of one length, so that prompts computed at once need little padding.
        batch_size: prompts computed at once.
        on_example: called with the number of examples done since the last call.

    Returns:
        For each example, "scores", the share of its answers that were found, and "continuations", the generated text.
    """
    num_tokens = max(num_answer_tokens(example, loaded.tokenizer) for example in examples)
    prompts = [example.prompt for example in examples]
    texts = continuations(
        loaded, allocation, prompts, max_new_tokens=num_tokens, batch_size=batch_size, on_prompt=on_example
    )
    scores = [answered(example, text) for example, text in zip(examples, texts, strict=True)]
    return {"scores": scores, "continuations": texts}


def continuations(
    loaded: LoadedModel,
    allocation: Allocation | None,
    prompts: Sequence[str],
    *,
    batch_size: int = 1,
    on_prompt: Callable[[int], None] | None = None,
    **options: Any,
) -> list[str]:
    """Continue each prompt greedily, with the small cache of the allocation.

    Args:
        loaded: model and tokenizer.
        allocation: attached while the model generates; None leaves the model as it is.
        prompts: nonempty texts.
        batch_size: prompts computed at once.
        on_prompt: called with the number of prompts done since the last call.
        options: keyword arguments of `generate_texts`.

    Returns:
        The new texts.
    """
    texts: list[str] = []
    with nullcontext() if allocation is None else attached(loaded.model, allocation):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            cache: Any = {} if allocation is None else {cache_argument(loaded.model): HybridCache(allocation)}
            texts += generate_texts(loaded.model, loaded.tokenizer, batch, **options, **cache)
            if on_prompt:
                on_prompt(len(batch))
    return texts
