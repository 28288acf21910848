"""On a CUDA device: vLLM with consa's plugin generates what `consa.load` does.

vLLM computes in bfloat16, and the reference on the same weights in float32. The reference reads vLLM's own tokens
(teacher forcing), so that one difference does not make all later tokens differ. Where a token is not the reference's,
it counts as a tie if its logit lies at most `TIE` times the largest absolute logit below the maximum. Anything else is
an error, and so are more ties than `MOST_TIES` of all tokens. In bfloat16, transformers itself has ties for 4 % of the
tokens of such a model, by at most 0.03; a window that is wrong by one token gives differences of 0.04 to 0.8.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consa import Allocation, convert, load
from consa.bench.vllm import Generation
from tests.models import tokens
from tests.serving.engine import engine, generate, served
from tests.serving.kernel_cases import BATCHES, Shape, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]
TIE = 0.05
MOST_TIES = 0.15
PAGE, CHUNK, WINDOW, VOCABULARY = 16, 256, 40, 257
LENGTHS = (3, 15, 16, 17, 39, 40, 41, 256, 257, 700)  # around page, window and chunk
PROMPTS = [tokens(1, length, seed=length, vocab_size=VOCABULARY)[0].tolist() for length in LENGTHS]
HEADS = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1]], dtype=bool)
LAYERS = np.array([[1], [0], [0], [1]], dtype=bool).repeat(3, axis=1)
GRAPHS: dict[str, Any] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "block_size": PAGE,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 16,
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 2**28,
    "gpu_memory_utilization": 0.3,  # others may use the GPU too
    "compilation_config": GRAPHS,
}
DEVICE = "cuda"


def allocation(full: np.ndarray = HEADS, *, sinks: int = 4) -> Allocation:
    granularity = "layer" if full is LAYERS else "kv_head"
    return Allocation(full_attention=full, granularity=granularity, window=WINDOW, num_sink_tokens=sinks)


def hybrid(folder: Path, chosen: Allocation) -> Path:
    model = served("qwen3", head_dim=64, hidden_size=384).bfloat16()
    convert(model, chosen, folder, kind="hybrid")
    return folder


@torch.no_grad()
def ties(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> int | None:
    """Tokens that differ from the reference's by a tie; None if a difference is none or there are too many."""
    count, worst = 0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer[:-1]], device=DEVICE)).logits[0, len(prompt) - 1 :].float()
        chosen = torch.tensor(answer, device=DEVICE)[:, None]
        short = (logits.amax(-1) - logits.gather(1, chosen)[:, 0]) / logits.abs().amax(-1)
        count, worst = count + int((short > 0).sum()), max(worst, float(short.max()))
    total = sum(map(len, answers))
    print(f"{count} of {total} tokens differ, by at most {worst:.4f} of the largest logit")
    return count if worst <= TIE and count <= MOST_TIES * total else None


def reference(folder: Path) -> Any:
    return load(folder, device=DEVICE, dtype=torch.float32)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("batch", BATCHES)
def test_kernels(batch: str, sinks: int):
    check(BATCHES[batch], Shape(head_dim=128), 21, sinks, DEVICE, torch.bfloat16, tolerance=0.02)


@pytest.mark.parametrize(
    ("full", "sinks"), [(HEADS, 4), (HEADS, 0), (LAYERS, 4)], ids=["heads, 4 sinks", "heads", "layers, 4 sinks"]
)
def test_tokens_in_cuda_graphs(full: np.ndarray, sinks: int, tmp_path: Path):
    """All prompts at once, again with the prefix cache, and one after the other."""
    chosen = allocation(full, sinks=sinks)
    folder = hybrid(tmp_path / "hybrid", chosen)
    with engine(folder, **OPTIONS) as llm:
        together, again = generate(llm, PROMPTS), generate(llm, PROMPTS)
        alone = [generate(llm, [prompt])[0] for prompt in PROMPTS]
    assert not any(together.from_cache)
    assert [n > 0 for n in again.from_cache] == [n > PAGE for n in LENGTHS]
    model = reference(folder)
    for answers in (together, again, alone):
        assert ties(model, PROMPTS, answers) is not None
    passed = [len(prompt) >= WINDOW for prompt in PROMPTS]
    prompts, answers = list(compress(PROMPTS, passed)), list(compress(together, passed))
    for wrong in ({"window": WINDOW - 4}, {"num_sink_tokens": sinks + 5}):
        other = reference(hybrid(tmp_path / "-".join(wrong), replace(chosen, **wrong)))
        assert ties(other, prompts, answers) is None, f"{wrong} would pass"


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"compilation_config": {}}], ids=["eager", "compiled"])
def test_tokens_without_graphs_and_in_vllm_s_default_mode(options: dict[str, Any], tmp_path: Path):
    folder = hybrid(tmp_path / "hybrid", allocation())
    with engine(folder, **OPTIONS | options) as llm:
        answers = generate(llm, PROMPTS)
    assert ties(reference(folder), PROMPTS, answers) is not None


def test_tokens_of_requests_that_are_preempted(tmp_path: Path):
    """The pool holds all prompts, but not all answers."""
    folder = hybrid(tmp_path / "hybrid", allocation())
    prompts = [tokens(1, 60, seed=seed, vocab_size=VOCABULARY)[0].tolist() for seed in range(12)]
    with engine(folder, **OPTIONS | {"max_model_len": 256, "num_gpu_blocks_override": 170}) as llm:
        generation = Generation(llm, prompts=prompts, max_tokens=150)
        generation.finish()
    print(f"{generation.preemptions} preemptions, {max(generation.running)} requests at once")
    assert generation.preemptions > 0
    assert ties(reference(folder), prompts, list(generation.tokens.values())) is not None
