"""The real engine serves hybrids: the tokens that `consa.load(folder).generate()` gives, in the memory planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM; run make test-vllm")

from consa import Allocation, convert
from tests.models import allocate, tokens
from tests.serving.engine import engine, generate, same_tokens, served

pytestmark = pytest.mark.vllm
WINDOW = 40
LENGTHS = (3, 39, 40, 41, 130, 700, 1500)  # around the window, the page of 128 tokens and the chunk of 256
PROMPTS = [tokens(1, length, seed=length, vocab_size=257)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize("num_sink_tokens", [0, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral"])
def test_heads(family: str, num_sink_tokens: int, tmp_path: Path):
    model = served(family)
    allocation = allocate(model, window=WINDOW, num_sink_tokens=num_sink_tokens)
    convert(model, allocation, tmp_path / "hybrid")
    with engine(tmp_path / "hybrid", skip_tokenizer_init=True) as llm:
        together = generate(llm, PROMPTS)
        assert same_tokens(tmp_path / "hybrid", PROMPTS, together)
        again = generate(llm, PROMPTS)  # from the prefix cache
        alone = [generate(llm, [prompt])[0] for prompt in PROMPTS]
    assert again == together == alone
