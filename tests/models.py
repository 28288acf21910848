"""Tiny random models of every supported family, whose attention matters: random weights are scaled up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from consa import Allocation
from consa.attention.reference import reference_attention
from consa.cache.hybrid import cache_argument
from consa.model import interface

CACHE = cache_argument(transformers.LlamaForCausalLM)
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 48,
    "intermediate_size": 64,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
NATIVE_WINDOW = 5
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": NATIVE_WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3", {"sliding_window": NATIVE_WINDOW, "query_pre_attn_scalar": 8}),
    "granite": ("Granite", {}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "cohere2": ("Cohere2", {"sliding_window": NATIVE_WINDOW}),
}


def tiny(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode, float32; `changes` go into its config."""
    name, options = FAMILIES[family]
    options = SHAPE | options | changes
    if family in ("gemma2", "gemma3_text", "cohere2") and "layer_types" not in options:
        kinds = ["sliding_attention", "full_attention"]
        options["layer_types"] = (kinds * options["num_hidden_layers"])[: options["num_hidden_layers"]]
    config_name = "Gemma3TextConfig" if family == "gemma3_text" else f"{name}Config"
    config = getattr(transformers, config_name)(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:  # as initialised, every token would attend to all others alike
                weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5)
    return model


def byte_tokenizer() -> Any:
    """A byte-level BPE of few merges, as transformers wraps it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def save_tiny(folder: Path) -> Path:
    """Write a random Llama of 4 layers x 3 KV heads with `byte_tokenizer` to a folder, which is returned."""
    tokenizer = byte_tokenizer()
    tiny(vocab_size=len(tokenizer), bos_token_id=None, pad_token_id=None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(
    path: Path, extra: Callable[[Any], None] = lambda writer: None, base: float = 1e4, **numbers: int
) -> Path:
    """Write a random Llama of 2 layers x 1 KV head with `byte_tokenizer` as GGUF to a file, which is returned.

    `numbers` stand in the header in place of the true ones, `extra` may add to it, and `base` is that of RoPE.
    """
    import gguf

    tokenizer = byte_tokenizer()
    width, vocabulary = 32, tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    writer = gguf.GGUFWriter(path, "llama")
    said = {"block_count": 2, "context_length": 64, "embedding_length": width, "feed_forward_length": width}
    said |= {"head_count": 2, "head_count_kv": 1, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1}
    for name, number in (said | numbers).items():
        getattr(writer, f"add_{name}")(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(base)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    blocks = {"attn_q": width, "attn_k": width // 2, "attn_v": width // 2, "attn_output": width}
    blocks |= {"ffn_gate": width, "ffn_up": width, "ffn_down": width, "attn_norm": 0, "ffn_norm": 0}
    shapes = {"token_embd": (len(words), width)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": (rows, width)[-2 if rows else -1 :] for name, rows in blocks.items()}
    shapes |= {"output_norm": (width,)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_texts(folder: Path, count: int = 40) -> Path:
    """Write short documents, of some 400 tokens each, to a folder, which is returned."""
    for number in range(count):
        words = [f"{(number * 37 + place * place) % 101:x}" for place in range(150)]
        (folder / f"{number:02}.txt").write_text(f"Document {number}.\n" + " ".join(words))
    return folder


def allocate(
    model: PreTrainedModel, *, window: int = 7, num_sink_tokens: int = 2, seed: int = 0, **options: Any
) -> Allocation:
    """A random allocation that fits a model, with heads of both kinds somewhere in the same layer."""
    config = model.config
    native = {
        layer: config.sliding_window
        for layer, kind in enumerate(getattr(config, "layer_types", None) or [])
        if kind == "sliding_attention"
    }
    rng = np.random.default_rng(seed)
    full = rng.random((config.num_hidden_layers, config.num_key_value_heads)) < 0.5
    full[-1] = np.arange(config.num_key_value_heads) % 2 == 0
    full[list(native)] = False
    return Allocation(
        full_attention=full, window=window, num_sink_tokens=num_sink_tokens, native_windows=native, **options
    )


def tokens(batch: int, length: int, *, seed: int = 0, vocab_size: int = SHAPE["vocab_size"]) -> torch.Tensor:
    """Random token ids without padding, `(batch, length)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab_size, (batch, length), generator=generator)


def left_padding(batch: torch.Tensor, starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace the first `starts[i]` tokens of row i by padding; returns tokens and mask."""
    mask = torch.arange(batch.shape[1]) >= torch.tensor(starts)[:, None]
    return batch * mask, mask.long()


@contextmanager
def exact(model: PreTrainedModel, allocation: Allocation) -> Iterator[None]:
    """Within the block the model computes the hybrid by `reference_attention`: dense masks, nothing of the fast paths.

    Pass `use_cache=False`: the reference wants all keys.
    """

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None = None,
        **ignored: Any,
    ) -> tuple[torch.Tensor, None]:
        native = allocation.native_windows.get(module.layer_idx)
        z = torch.tensor(allocation.full_attention[module.layer_idx][None], dtype=torch.float32)
        parts = [  # a KV head at a time: the masks of a long text take gigabytes
            reference_attention(
                q,
                k,
                v,
                z[:, head : head + 1],
                window=native or allocation.window,
                num_sink_tokens=0 if native else allocation.num_sink_tokens,
                scaling=scaling,
                softcap=softcap,
                first=None if attention_mask is None else attention_mask.flatten(),
            )
            for head, (q, k, v) in enumerate(
                zip(*(x.chunk(key.shape[1], dim=1) for x in (query, key, value)), strict=True)
            )
        ]
        out = torch.cat(parts, dim=1)
        return out.transpose(1, 2).to(query.dtype), None

    AttentionInterface.register("consa_test_reference", attend)
    AttentionMaskInterface.register("consa_test_reference", interface.consa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("consa_test_reference")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
