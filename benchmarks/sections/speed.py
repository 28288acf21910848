"""Attention, learning, decoding, inference, serving: time and memory."""

from __future__ import annotations

from typing import Any

from sections.text import source, table


def inference(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    return [
        "## Inference: what a hybrid saves beside the dense model",
        "",
        f"{settings['model']}, {settings['dtype']}, one sequence, window {settings['window']},"
        f" {settings['num_sink_tokens']} sinks; medians over {settings['repeats']} runs, each a prefill and"
        f" {settings['decode_tokens']} decoded tokens, dense and hybrid in turn on the same weights. Prefill: seconds;"
        " decode: tokens per second; KV cache: bytes that it holds; all hybrid over dense. Peaks of memory are with"
        " the weights.",
        "",
        *table(record["columns"], record["rows"]),
        "",
        *source(record),
    ]


def attention(record: dict[str, Any]) -> list[str]:
    return [
        "## Attention on a GPU: gates and windows beside the library's causal attention",
        "",
        "bf16, forward alone and forward + backward; shape is batch x query heads x KV heads x tokens x head_dim, a"
        " gate for each KV head of each sequence. Times are the GPU's; `ratio` is to the library's faster causal"
        " attention, in the same run. 75 % of the gates at 0 and the rest at 1 is the prefill of a hybrid; all open is"
        " the start of learning. One pass gives FA and SWA from the same scores, and repeats bit for bit.",
        "",
        *table(record["columns"], record["rows"]),
        "",
        *source(record),
    ]


def learning(record: dict[str, Any]) -> list[str]:
    compiled = any("compiled" in str(cell) for row in record["rows"] for cell in row)
    return [
        "## Learning on a GPU: tokens per second",
        "",
        "Forward and backward, bf16, frozen random weights. `dense` is the same loss and backward pass through the"
        " library's causal attention; `two attentions` computes both branches of every head; `consa` is a whole run of"
        f" {record['steps']} steps, from gates almost all open to the target, with deterministic kernels. `at once` is"
        " the micro-batch."
        + " Of `compiled` loops the layers are, but for attention; `to dense` is to the compiled one."
        * compiled,
        "",
        *table(record["columns"], record["rows"]),
        "",
        *source(record),
    ]


def decode(record: dict[str, Any]) -> list[str]:
    sizes = " and ".join(dict.fromkeys(row[0].replace(" x ", " tokens x ") for row in record["rows"]))
    return [
        f"## Decoding on a GPU: a step of a Qwen3-0.6B-shaped model, {sizes}",
        "",
        f"bf16, random weights, sparsity {record['sparsity']}, window {record['window']}, 4 sinks; the compiled model"
        " as one CUDA graph per step; dense is the library's attention over a cache of fixed size. `of copy` is what"
        " attention reads per second over what a large copy on the device moves"
        f" ({record['copy_bytes_per_second'] / 1e12:.2f} TB/s); `fits` is the largest batch in 80 GB.",
        "",
        *table(record["columns"], record["rows"]),
        "",
        *source(record),
    ]


def serving(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    return [
        "## Serving: what vLLM plans",
        "",
        f"{settings['layers']} layers of the shape of Qwen3-0.6B's ({settings['kv_heads']} KV heads of"
        f" {settings['head_dim']}), bfloat16, sparsity {settings['sparsity']}, window {settings['window']}, requests of"
        f" {settings['context']:,} tokens, {settings['pool_bytes'] / 2**30:.0f} GiB for the cache, random allocations."
        " `tokens at once` is `--max-num-batched-tokens`: vLLM keeps room for so many new tokens in every request."
        " `decoding, of ideal` is what vLLM plans for a request with one new token at a time, over the bytes of the"
        " allocation itself, without pages.",
        "",
        *table(record["columns"], record["rows"]),
        "",
        *source(record),
    ]
