"""The real vLLM in this process, on the CPU, and what it generates compared with `consa.load(folder).generate()`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read when vllm is imported.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import torch
from transformers import PreTrainedModel

from consa import load
from tests.models import tiny

# What the engine's attention on CPUs takes, with a vocabulary so large that greedy tokens differ.
SHAPE: dict[str, Any] = {"head_dim": 32, "hidden_size": 192, "vocab_size": 257}
TIE = 1e-4  # of two logits, relative to the largest: order of summation


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An `LLM` on a folder, in float32 unless told otherwise; gone when the block ends."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"enforce_eager": True, "dtype": "float32", "max_model_len": 2048, "max_num_batched_tokens": 256}
    llm: Any = LLM(str(folder), skip_tokenizer_init=True, **defaults | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def served(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a shape that the engine takes."""
    return tiny(family, **SHAPE | changes)


class Continued(list[list[int]]):
    """New tokens of each prompt, and how many of the prompt's were in the prefix cache."""

    def __init__(self, tokens: list[list[int]], from_cache: list[int]) -> None:
        super().__init__(tokens)
        self.from_cache = from_cache


def generate(llm: Any, prompts: list[list[int]], num_tokens: int = 24) -> Continued:
    """Greedy continuations of all prompts, handed in at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return Continued(
        [list(output.outputs[0].token_ids) for output in outputs],
        from_cache=[output.num_cached_tokens for output in outputs],
    )


def same_tokens(folder: Path | PreTrainedModel, prompts: list[list[int]], found: list[list[int]]) -> bool:
    """Whether every continuation is what `consa.load` generates, save where two logits tie."""
    model = folder if isinstance(folder, PreTrainedModel) else load(folder)
    return all(_same(model, prompt, tokens) for prompt, tokens in zip(prompts, found, strict=True))


@torch.no_grad()
def _same(model: PreTrainedModel, prompt: list[int], found: list[int]) -> bool:
    generating: Any = model
    wanted = generating.generate(
        torch.tensor([prompt]), max_new_tokens=len(found), do_sample=False, eos_token_id=None, pad_token_id=0
    )
    if wanted[0, len(prompt) :].tolist() == found:
        return True
    logits = model(torch.tensor([prompt + found[:-1]])).logits[0, len(prompt) - 1 :]
    short = logits.amax(-1) - logits.gather(1, torch.tensor(found)[:, None])[:, 0]
    return bool((short <= TIE * logits.abs().amax(-1)).all())


def groups(llm: Any) -> list[tuple[int, int, int | None]]:
    """Of the engine's KV cache groups: modules, KV heads of each, window."""
    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    return [
        (len(group.layer_names), group.kv_cache_spec.num_kv_heads, getattr(group.kv_cache_spec, "sliding_window", None))
        for group in cache.kv_cache_groups
    ]
