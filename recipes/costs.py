"""Compute memory and time of every recipe on 1 and 8 GPUs from the model's shape; writes recipes/README.md.

python -m recipes.costs

Weights, gradients and optimizer states are counted in bytes. What a layer keeps for its backward pass is measured by
running one. Only the speed of the arithmetic is assumed.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from consa import rules
from consa.config import AdaptConfig, LearnConfig, at_once
from consa.files import write_atomically
from consa.model.loss import CHUNK_TOKENS
from recipes.run import RECIPES

PAGE = Path(__file__).parent / "README.md"
GPUS = (1, 8)
TFLOPS = 200  # assumed: a fifth of what an H100 can do in bfloat16
SAMPLE_TOKENS = 64  # of the layer that is run
CONTEXT = 32768  # tokens of the KV cache that is shown


def main() -> None:
    """Write the page."""
    write_atomically(PAGE, page().encode())


def page() -> str:
    """What README.md holds."""
    lines = [
        "# Recipes",
        "",
        "Complete settings for two models: `python -m recipes.run NAME learn`, then `adapt`, from a clone with"
        " `.[datasets]`. On 8 GPUs of one host, replace `python -m` by `torchrun --nproc-per-node 8 -m`; the settings"
        " stay the same. The costs are computed, and the configurations are tested; they have not been run to their"
        " ends. `python -m recipes.costs` writes this page.",
        "",
        "Memory is per GPU, in GB of 10^9 bytes, with one sequence at a time and gradient checkpointing. Time assumes"
        f" {TFLOPS} TFLOP/s, a fifth of an H100's peak in bfloat16, and perfect scaling to eight GPUs. It excludes"
        " reading text, measuring and refinement. Measured on H100 and H200 (research/results/distributed.json),"
        " adapting Qwen3-0.6B on one GPU is 15 to 28 % slower than this estimate; two GPUs with FSDP reach 0.55 of"
        " twice the speed at 8,192 tokens a sequence.",
        "",
    ]
    for name in RECIPES:
        lines += section(name, import_module(f"recipes.{name}"))
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, recipe: ModuleType) -> list[str]:
    """One recipe's part of the page."""
    model = skeleton(recipe.SHAPE)
    total, layers, embeddings = parameters(model)
    heads = (recipe.SHAPE["num_hidden_layers"], recipe.SHAPE["num_key_value_heads"])
    learn: LearnConfig = recipe.LEARN
    hybrid = rules.interleaved(
        *heads, sparsity=learn.sparsity, window=learn.window, num_sink_tokens=learn.num_sink_tokens
    )
    dense = rules.dense(*heads, window=learn.window)
    cache, small = (a.kv_cache_bytes(CONTEXT, head_dim=model.config.head_dim) / 1e9 for a in (dense, hybrid))
    lines = [
        f"## {name}: {recipe.RUN.model}",
        "",
        f"{total / 1e6:,.1f} M parameters: {embeddings / 1e6:.1f} M in the embeddings, shared with the output layer,"
        f" and {heads[0]} layers of {layers / heads[0] / 1e6:.2f} M. KV cache of one sequence of {CONTEXT:,} tokens:"
        f" {cache:.2f} GB dense, {small:.2f} GB as the hybrid. A checkpoint of adapting takes"
        f" {total * 12 / 1e9:.1f} GB; saving it needs twice that in the main process's host memory.",
        "",
    ]
    columns = [(phase, gpus) for phase in ("learn", "adapt") for gpus in GPUS]
    configs = {"learn": recipe.LEARN, "adapt": recipe.ADAPT}
    full = {"learn": 1.0, "adapt": 1 - learn.sparsity}
    estimates = [
        (memory(model, configs[phase], gpus), time(model, configs[phase], gpus, full=full[phase]))
        for phase, gpus in columns
    ]
    titles = (f"{phase}, {gpus} GPU{'s' * (gpus > 1)}" for phase, gpus in columns)
    lines += ["| | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(columns)]
    for part in dict.fromkeys(part for parts, _ in estimates for part in parts):
        cells = (f"{parts[part] / 1e9:.1f}" if part in parts else "" for parts, _ in estimates)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines.append("| **GB in all** | " + " | ".join(f"**{sum(p.values()) / 1e9:.1f}**" for p, _ in estimates) + " |")
    for label in estimates[0][1]:
        lines.append(f"| {label} | " + " | ".join(facts[label] for _, facts in estimates) + " |")
    return [*lines, ""]


def skeleton(shape: dict[str, Any]) -> Qwen3ForCausalLM:
    """The model without weights."""
    with torch.device("meta"):
        return Qwen3ForCausalLM(Qwen3Config(**shape))


def parameters(model: Qwen3ForCausalLM) -> tuple[int, int, int]:
    """How many there are, in the layers, in the embeddings."""
    total = sum(p.numel() for p in model.parameters())
    return (total, sum(p.numel() for p in model.model.layers.parameters()), model.model.embed_tokens.weight.numel())


def memory(model: Qwen3ForCausalLM, config: LearnConfig | AdaptConfig, gpus: int) -> dict[str, float]:
    """Bytes on each GPU, by what they are for."""
    total, layers, _ = parameters(model)
    shape, tokens = model.config, config.seq_len * at_once(config.micro_batch)
    sharded = isinstance(config, AdaptConfig) and config.parallel == "fsdp" and gpus > 1
    parts: dict[str, float] = {}
    whole, split = (total - layers, layers) if sharded else (total, 0)
    parts["weights"] = whole * 2
    if isinstance(config, AdaptConfig):
        parts["masters, gradients, Adam"] = (whole + split / gpus) * (4 + 4 + 8)
        if sharded or config.distillation or config.hidden_loss:
            parts["the model before training"] = total * 2
    if sharded:
        parts["two layers gathered"] = 2 * layers / shape.num_hidden_layers * 2
    parts["inputs of layers"] = shape.num_hidden_layers * tokens * shape.hidden_size * 2
    parts["one layer, recomputed"] = layer_bytes(shape) * tokens
    parts["one chunk of logits"] = CHUNK_TOKENS * shape.vocab_size * (2 + 2 + 4 + 4)  # with gradients, both precisions
    return parts


def time(model: Qwen3ForCausalLM, config: LearnConfig | AdaptConfig, gpus: int, *, full: float) -> dict[str, str]:
    """Tokens, FLOP and time, if a share `full` of the heads computes full attention and the others cost nothing.

    Backward counts as 2 passes through weights that train, 1 through frozen ones, and 2.5 through attention;
    recomputation as 1 more of each.
    """
    total, _, _ = parameters(model)
    shape = model.config
    attention = 2 * config.seq_len * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
    passes = 1 + (1 if isinstance(config, LearnConfig) else 2) + 1
    flop = passes * 2 * total + (1 + 2.5 + 1) * attention * full
    speed = TFLOPS * 1e12 / flop
    tokens = config.num_steps * config.sequences_per_step * config.seq_len
    hours = tokens / speed / gpus / 3600
    return {
        "GFLOP per token": f"{flop / 1e9:.1f}",
        "million tokens": f"{tokens / 1e6:.1f}",
        "tokens per second": f"{speed * gpus:,.0f}",
        "time": f"{hours:.1f} h" if hours > 1 else f"{hours * 60:.1f} min",
    }


def layer_bytes(config: Any) -> float:
    """What one layer keeps for its backward pass, bytes per token, in bfloat16: from running one on a few."""
    small = Qwen3Config(**config.to_diff_dict() | {"num_hidden_layers": 1, "vocab_size": 8, "layer_types": None})
    model = Qwen3ForCausalLM(small).bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    layer, hidden = model.model.layers[0], torch.zeros(1, SAMPLE_TOKENS, config.hidden_size, dtype=torch.bfloat16)
    places = torch.arange(SAMPLE_TOKENS)[None]
    position_embeddings = model.model.rotary_emb(hidden, places)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = layer(hidden.requires_grad_(), position_embeddings=position_embeddings, position_ids=places)
    del out
    return sum(kept.values()) / SAMPLE_TOKENS


if __name__ == "__main__":
    main()
