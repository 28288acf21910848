"""Tokens of texts that are to be continued."""

from __future__ import annotations

import copy
from typing import Any


def for_prompts(tokenizer: Any) -> Any:
    """The tokenizer without what it appends to a text (EOS for example), after which no model continues the text.

    It is returned as it is if it appends nothing.
    """
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((start for start in range(len(whole)) if whole[start : start + len(plain)] == plain), 0)
    if len(whole) == start + len(plain):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        tokenizer.build_inputs_with_special_tokens = lambda ids, *_: [*whole[:start], *ids]
        return tokenizer
    from tokenizers.processors import TemplateProcessing

    before = [(tokenizer.convert_ids_to_tokens(token), token) for token in whole[:start]]
    template = [*(name for name, _ in before), "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=before)
    return tokenizer
