"""What vLLM plans for requests of a hybrid, beside the dense model: KV bytes of a request, and requests that fit.

    python benchmarks/serving.py --out benchmarks/results/serving.json

The numbers are those of the engine's own planner, which it admits requests by. The model has the shape of Qwen3-0.6B's
attention and random weights; only so many layers that the engine starts on a laptop, since a request's layers all count
alike. In an environment with vLLM; on a CPU, VLLM_CPU_KVCACHE_SPACE says how many GiB the pool has.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, parser_of, print_table, write_json
from transformers import Qwen3Config, Qwen3ForCausalLM

from consa.allocation import Allocation
from consa.bench.vllm import dense_folder, run_job
from consa.constraints import Constraint, choose
from consa.model.convert import convert
from consa.serving.limits import vllm_version
from consa.serving.plan import plan

HEADS, HEAD_DIM = 8, 128
COLUMNS = [
    "allocation",
    "FA heads per layer",
    "sinks",
    "tokens at once",
    "KV MiB of a request",
    "of dense",
    "decoding, of ideal",
    "requests that fit",
    "over dense",
]


def main() -> None:
    options = _options()

    config = Qwen3Config(
        num_hidden_layers=options.layers,
        num_key_value_heads=HEADS,
        num_attention_heads=2 * HEADS,
        head_dim=HEAD_DIM,
        hidden_size=64,
        intermediate_size=64,
        vocab_size=256,
        max_position_embeddings=options.context + 1,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).bfloat16()
    chunks = [int(chunk) for chunk in options.chunks.split(",")]
    rows: list[list[Any]] = []
    dense: dict[str, Any] = {}
    planned, requests = 0, 0.0  # of the dense model
    with tempfile.TemporaryDirectory() as temporary:
        for index, (name, allocation) in enumerate(_allocations(options)):
            hybrid = Path(temporary, str(index))
            kind = convert(model, allocation, hybrid).kind
            if not dense:  # the first is a hybrid
                dense_model = dense_folder(hybrid, Path(temporary, "dense"))
                dense = _measured(dense_model, options.context, chunks[:1], Path(temporary))
                (planned, requests), *_ = dense["plans"]
                rows.append(
                    ["dense", "", "", "any", f"{planned / 2**20:.1f}", "1.000", "", f"{requests:.1f}", "1.00"]
                )
            per_layer = allocation.full_attention.sum(1)
            counts = f"{per_layer.min()} to {per_layer.max()}" if np.ptp(per_layer) else str(per_layer[0])
            ideal = plan(allocation, context=options.context, head_dim=HEAD_DIM).ideal_bytes
            engine = {} if kind == "hybrid" else {"model_impl": "transformers"}
            found = _measured(hybrid, options.context, [*chunks, 1], Path(temporary), **engine)
            decoding, _ = found["plans"].pop()
            for chunk, (bytes_of_request, fit) in zip(chunks, found["plans"], strict=True):
                rows.append(
                    [
                        name if kind == "hybrid" else f"{name} (plain folder)",
                        counts,
                        allocation.num_sink_tokens,
                        chunk,
                        f"{bytes_of_request / 2**20:.1f}",
                        f"{bytes_of_request / planned:.3f}",
                        f"{decoding / ideal:.3f}",
                        f"{fit:.1f}",
                        f"{fit / requests:.2f}",
                    ]
                )
                print(rows[-1], flush=True)
    settings = {name: getattr(options, name) for name in ("layers", "sparsity", "context", "window")}
    settings |= {"kv_heads": HEADS, "head_dim": HEAD_DIM, "pool_bytes": dense["pool_bytes"]}
    record = environment() | {"settings": settings, "columns": COLUMNS, "rows": rows}
    record["versions"] |= {"vllm": vllm_version()}
    write_json(options.out, record)
    print_table(COLUMNS, rows)


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--chunks", default="512,2048,8192", help="tokens that the engine computes at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _allocations(options: argparse.Namespace) -> list[tuple[str, Allocation]]:
    """Random ones of the sparsity, by what is asked of the numbers of FA heads; and one of whole layers."""
    shape = options.layers, HEADS
    scores = np.random.default_rng(options.seed).normal(size=shape)
    num_full = round((1 - options.sparsity) * scores.size)
    kinds = ("uniform", "even", "any")
    masks = {kind: choose(scores, num_full, Constraint(full_heads_per_layer=kind)) for kind in kinds}
    found = {
        kind: Allocation(full_attention=mask, window=options.window, num_sink_tokens=0)
        for kind, mask in masks.items()
    }
    layers = np.argsort(scores[:, 0]) < num_full // HEADS
    whole = replace(found["any"], full_attention=layers[:, None].repeat(HEADS, 1), granularity="layer")
    return [*found.items(), ("any", replace(found["any"], num_sink_tokens=4)), ("layers", whole)]


def _measured(
    folder: Path, context: int, chunks: list[int], temporary: Path, **options: Any
) -> dict[str, Any]:
    engine = {"max_model_len": context, "max_num_batched_tokens": chunks[0], "dtype": "bfloat16"} | options
    job = {"folder": str(folder), "options": engine, "contexts": [], "batch_sizes": [], "chunks": chunks}
    return run_job(job | {"decode_tokens": 1, "repeats": 1}, temporary)


if __name__ == "__main__":
    main()
