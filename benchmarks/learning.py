"""Learning on a GPU: tokens per second, beside loops without gates and with naive ones.

    python benchmarks/learning.py --random --out benchmarks/results/learning.json

Forward and backward, bf16, frozen weights. "consa" is a whole short run of `learn`, from gates almost all open to the
target sparsity, including the update of the gates. "dense" is the same loss and backward pass through the library's
causal attention. "two attentions" computes both branches of every head at every step: causal, and under a dense mask of
the window, mixed by the gates. These two have no optimizer. Times are medians over steps for them, and the mean over
the run for consa. The peak is of allocated memory, weights included. In compiled loops the layers are compiled, except
for attention; `to dense` is then to the compiled dense loop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import QWEN3_06B, environment, parser_of, print_table, write_json
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from consa.config import LearnConfig
from consa.model import loss
from consa.model.load import load_model
from consa.training import loop
from consa.training.learning import learn

DEVICE = torch.device("cuda")
WINDOW, NUM_SINK_TOKENS = 128, 4
WARM_UP = 3  # steps that are not timed
WARM_UP_RUN = 12  # steps
AT_ONCE = (4, 1)  # sequences
STEPS = 12  # of the loops that do not change as they go
COLUMNS = ["model", "tokens", "at once", "loop", "tokens/s", "to dense", "peak GB"]
SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def random_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def learned(model: PreTrainedModel, tokens: np.ndarray, num_steps: int, at_once: int = 1, **settings: Any) -> float:
    """Tokens per second of a whole run of `learn`, after a short run that compiles all kernels."""
    speeds: list[float] = []
    for steps in (min(WARM_UP_RUN, num_steps), num_steps):
        config = LearnConfig(
            window=WINDOW,
            num_sink_tokens=NUM_SINK_TOKENS,
            seq_len=tokens.shape[1],
            num_steps=steps,
            sequences_per_step=at_once,
            micro_batch=at_once,
            refine_evaluations=0,
            **settings,
        )
        speeds.clear()
        learn(model, tokens, config, on_step=lambda step: speeds.append(step["tokens_per_second"]))
    return statistics.harmonic_mean(speeds)


def stepped(model: PreTrainedModel, tokens: np.ndarray, at_once: int) -> float:
    """Tokens per second of loss and backward pass, through frozen weights to the embeddings."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())
    seconds = []
    for step in range(WARM_UP + STEPS):
        batch = tokens.take(range(step * at_once, (step + 1) * at_once), axis=0, mode="wrap")
        torch.cuda.synchronize()
        began = time.perf_counter()
        float(loss.backward(model, torch.from_numpy(batch).to(DEVICE), scale=1.0))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    embedded.remove()
    return batch.size / statistics.median(seconds[WARM_UP:])


@contextmanager
def two_attentions(model: PreTrainedModel, seq_len: int) -> Iterator[None]:
    """`z * FA + (1 - z) * SWA` of all heads, by the library."""
    heads = model.config.num_key_value_heads
    gates = torch.rand(model.config.num_hidden_layers, heads, device=DEVICE).requires_grad_()
    position = torch.arange(seq_len, device=DEVICE)
    distance = position[:, None] - position
    visible = (distance >= 0) & ((distance < WINDOW) | (position < NUM_SINK_TOKENS))

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        group = q.shape[1] // heads
        full = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        near = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        z = gates[module.layer_idx].repeat_interleave(group)[:, None, None]
        return (z * full + (1 - z) * near).to(q.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("two_attentions", attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = "two_attentions"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def peak_of(run: Callable[[], float]) -> tuple[float, float]:
    """What `run` returns, and the peak of allocated memory in GB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return run(), torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--random", action="store_true", help="random weights, nothing to load")
    parser.add_argument("--steps", type=int, default=60, help="of consa's run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    generator = np.random.default_rng(0)

    if options.random:
        model = random_model(LlamaConfig(**SMOLLM2_135M))
    else:
        model = load_model("smollm2-135m", device="cuda", dtype=torch.bfloat16).model
    tokens = generator.integers(0, SMOLLM2_135M["vocab_size"], (options.steps, 8192))
    rows: list[list[Any]] = []
    for at_once in AT_ONCE:
        loops = {"dense": peak_of(partial(stepped, model, tokens, at_once))}
        with two_attentions(model, tokens.shape[1]):
            loops["two attentions"] = peak_of(partial(stepped, model, tokens, at_once))
        loops["consa"] = peak_of(partial(learned, model, tokens, options.steps, at_once))
        with loop.prepared(model, compile=True):
            loops["dense, compiled"] = peak_of(partial(stepped, model, tokens, at_once))
        compiled = partial(learned, model, tokens, options.steps, at_once, compile=True)
        loops["consa, compiled"] = peak_of(compiled)
        for name, (speed, peak) in loops.items():
            dense = loops["dense, compiled" if "compiled" in name else "dense"][0]
            rows.append(["SmolLM2-135M", 8192, at_once, name, round(speed), round(speed / dense, 3), round(peak, 2)])
    del model
    print_table(COLUMNS, rows)

    model = random_model(Qwen3Config(**QWEN3_06B))
    tokens = generator.integers(0, QWEN3_06B["vocab_size"], (4, 32768))
    for name, settings in (("consa", {}), ("consa, checkpointing", {"gradient_checkpointing": True})):
        speed, peak = peak_of(partial(learned, model, tokens, len(tokens), **settings))
        rows.append(["Qwen3-0.6B", 32768, 1, name, round(speed), "", round(peak, 2)])
    if options.out:
        settings: dict[str, Any] = {"window": WINDOW, "num_sink_tokens": NUM_SINK_TOKENS, "steps": options.steps}
        write_json(options.out, environment() | settings | {"columns": COLUMNS, "rows": rows})
    print_table(COLUMNS, rows)


if __name__ == "__main__":
    main()
