"""How often a hybrid, generating with its own cache, finds what is hidden in a long text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from consa.allocation import Allocation
from consa.cache.hybrid import HybridCache, cache_argument
from consa.data.questions import Example, answered, num_answer_tokens
from consa.model.attach import attached
from consa.model.generate import generate_texts
from consa.model.load import LoadedModel


def ask(
    loaded: LoadedModel,
    allocation: Allocation | None,
    examples: Sequence[Example],
    *,
    batch_size: int = 1,
    on_example: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Continue each prompt greedily, by only as many tokens as the longest answer needs.

    Args:
        loaded: model and tokenizer.
        allocation: attached for the purpose; None leaves the model as it is.
        examples: of one task and length.
        batch_size: prompts computed at once.
        on_example: called with the number of examples done since the last call.

    Returns:
        `{"scores": share of the answers found, for each example, "continuations": the new text of each}`.
    """
    scores, continuations = [], []
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
