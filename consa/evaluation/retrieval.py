"""How often a hybrid, generating with its own cache, finds what is hidden in a long text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from consa.allocation import Allocation
from consa.cache import HybridCache
from consa.generation import generate_text
from consa.model import LoadedModel, attached
from consa.retrieval import Example, answered, num_answer_tokens


def ask(
    loaded: LoadedModel,
    allocation: Allocation | None,
    examples: Sequence[Example],
    *,
    on_example: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Continue each prompt greedily, by only as many tokens as the answer needs.

    Args:
        loaded: model and tokenizer.
        allocation: attached for the purpose; None leaves the model as it is.
        examples: of one task and length.
        on_example: called with 1 after each example.

    Returns:
        `{"scores": share of the answers found, for each example, "continuations": the new text of each}`.
    """
    scores, continuations = [], []
    with nullcontext() if allocation is None else attached(loaded.model, allocation):
        for example in examples:
            text = generate_text(
                loaded.model,
                loaded.tokenizer,
                example.prompt,
                max_new_tokens=num_answer_tokens(example, loaded.tokenizer),
                past_key_values=None if allocation is None else HybridCache(allocation),
            )
            scores.append(answered(example, text))
            continuations.append(text)
            if on_example:
                on_example(1)
    return {"scores": scores, "continuations": continuations}
