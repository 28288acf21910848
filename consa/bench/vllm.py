"""What a hybrid saves in vLLM beside the dense model: the same measurements as `consa.bench.measure`, by the engine.

Each of the two is measured in a process of its own, which then gives its memory back. Run as a module, this is that
process: `python -m consa.bench.vllm JOB RESULT`, both JSON files.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from consa.bench.measure import Benchmark, Measurement, check_settings, peak_bytes
from consa.errors import ConsaError
from consa.model.convert import verify
from consa.model.register import ARCHITECTURE_PREFIX, family_config
from consa.provenance import hardware, versions
from consa.serving.limits import engine_obstacle, hybrid_obstacle, prefill_chunk, vllm_version


def benchmark(
    folder: Path,
    *,
    contexts: list[int],
    batch_sizes: list[int],
    decode_tokens: int = 32,
    repeats: int = 3,
    options: dict[str, Any] | None = None,
    on_run: Callable[[int, str], None] | None = None,
) -> Benchmark:
    """Measure a hybrid beside its dense model in vLLM.

    `cache_bytes` of a measurement are those that vLLM plans for so many requests of the context, and `peak_bytes` those
    of the engine's process, whole pool included. `where` has the requests of the longest context that vLLM plans to fit
    into the pool, of either model, and the pool's bytes.

    Args:
        folder: a hybrid.
        contexts: tokens.
        batch_sizes: requests at once.
        decode_tokens: steps after each prefill.
        repeats: of prefill and decoding, first all of the dense model's.
        options: of vLLM's `LLM`, for both.
        on_run: called after each model with the number of runs so far and what it was.

    Raises:
        ConsaError: vLLM cannot serve the hybrid, settings that the model does not take, or the engine failed.
    """
    kind, allocation = verify(folder)
    if kind == "plain":
        raise ConsaError(
            "there is nothing to compare: the model is no hybrid; make one with consa convert --kind hybrid"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = config["architectures"][0].removeprefix(ARCHITECTURE_PREFIX)
    if reason := engine_obstacle() or hybrid_obstacle(architecture, allocation):
        raise ConsaError(f"cannot measure {folder}: {reason}")
    settings: dict[str, Any] = {"contexts": contexts, "batch_sizes": batch_sizes}
    settings |= {"decode_tokens": decode_tokens, "repeats": repeats}
    check_settings(**settings, longest=config.get("max_position_embeddings"))
    longest = max(contexts) + decode_tokens
    engine: dict[str, Any] = {
        "max_model_len": longest,
        "max_num_batched_tokens": prefill_chunk(allocation, longest),
    }
    if dtype := config.get("dtype"):  # vLLM would make bfloat16 of float32
        engine["dtype"] = dtype
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        models = {"dense": dense_folder(folder, Path(temporary, "dense")), "hybrid": folder}
        for done, (name, model) in enumerate(models.items(), start=1):
            job = settings | {"folder": str(model), "options": engine | (options or {})}
            found[name] = run_job(job, Path(temporary))
            if on_run:
                on_run(done * len(contexts) * len(batch_sizes) * repeats, name)
    measurements = [
        Measurement(model=name, **row)
        for rows in zip(*(found[name]["measurements"] for name in models), strict=True)
        for name, row in zip(models, rows, strict=True)
    ]
    where = {name: found["hybrid"][name] for name in ("hardware", "dtype", "pool_bytes")}
    where |= {"engine": f"vLLM {vllm_version()}", "versions": versions(), **settings, **engine}
    where["requests"] = {name: found[name]["requests"] for name in models}
    return Benchmark(allocation.sparsity, tuple(measurements), where)


def requests_line(result: Benchmark) -> str:
    """How many requests vLLM plans to fit, in a sentence."""
    where = result.where
    fit = {name: f"{number:.1f}" for name, number in where["requests"].items()}
    return (
        f"vLLM plans to fit {fit['hybrid']} requests of {where['max_model_len']:,} tokens into"
        f" {where['pool_bytes'] / 2**30:.2f} GiB, and {fit['dense']} of the dense model."
    )


def dense_folder(hybrid: Path, folder: Path) -> Path:
    """The same model as a folder of its family, by links to the same files; returns it."""
    folder.mkdir()
    for path in hybrid.resolve().iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = family_config(json.loads((hybrid / "config.json").read_text(encoding="utf-8")))
    del config["consa"]
    config["architectures"] = [name.removeprefix(ARCHITECTURE_PREFIX) for name in config["architectures"]]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run_job(job: dict[str, Any], temporary: Path) -> dict[str, Any]:
    """What `measure` finds, in a process of its own.

    Raises:
        ConsaError: it failed; the message has its last line.
    """
    paths = temporary / "job.json", temporary / "result.json"
    paths[0].write_text(json.dumps(job), encoding="utf-8")
    paths[1].unlink(missing_ok=True)
    # The engine in that process itself, where its plans can be read.
    environment = {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, *map(str, paths)], env=environment, capture_output=True, text=True
    )
    if done.returncode or not paths[1].is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ConsaError(f"vLLM failed on {job['folder']}: {lines[-1].strip()}")
    return json.loads(paths[1].read_text(encoding="utf-8"))


def measure(
    folder: str,
    options: dict[str, Any],
    contexts: list[int],
    batch_sizes: list[int],
    decode_tokens: int,
    repeats: int,
    chunks: list[int] | None = None,
) -> dict[str, Any]:
    """Measure one model; see `benchmark`. With `chunks`, also what is planned for other numbers of tokens at once."""
    from vllm import LLM
    from vllm.platforms import current_platform

    options = {"enforce_eager": current_platform.is_cpu()} | options  # compiling for a CPU takes minutes
    llm: Any = LLM(folder, skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    device = llm.llm_engine.vllm_config.device_config.device
    rows = []
    for context in contexts:
        planned, _, _ = planned_bytes(llm, context + decode_tokens)
        for batch_size in batch_sizes:
            runs = [_run(llm, context, batch_size, decode_tokens) for _ in range(repeats)]
            rows.append(
                {
                    "context": context,
                    "batch_size": batch_size,
                    "prefill_seconds": statistics.median(prefill for prefill, _ in runs),
                    "decode_tokens_per_second": batch_size
                    / statistics.median(seconds for _, steps in runs for seconds in steps),
                    "cache_bytes": batch_size * planned,
                    "peak_bytes": peak_bytes(device),
                }
            )
    _, requests, pool = planned_bytes(llm, options["max_model_len"])
    plans = [planned_bytes(llm, options["max_model_len"], chunk)[:2] for chunk in chunks or ()]
    dtype = str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
    return {
        "measurements": rows,
        "requests": requests,
        "plans": plans,
        "pool_bytes": pool,
        "hardware": hardware(),
        "dtype": dtype,
    }


def planned_bytes(llm: Any, context: int, chunk: int | None = None) -> tuple[int, float, int]:
    """What vLLM plans for one request of a context in bytes, how many of them fit, and the pool's bytes.

    These are the numbers that vLLM logs and admits requests by.

    Args:
        llm: with its engine in this process.
        context: tokens.
        chunk: tokens that the engine computes at once, its own number unless given.
    """
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    config = copy.copy(llm.llm_engine.vllm_config)
    config.model_config = copy.copy(config.model_config)
    config.model_config.max_model_len = context
    if chunk is not None:
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.max_num_batched_tokens = chunk
    requests = get_max_concurrency_for_kv_cache_config(config, cache)
    pool = cache.kv_cache_tensors[0].size  # of all: they lie in the same memory
    return round(pool / requests), requests, pool


def _run(llm: Any, context: int, batch_size: int, decode_tokens: int) -> tuple[float, list[float]]:
    """Seconds until every request has its first token, and of each step after."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    generator = torch.Generator().manual_seed(context)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    tokens = torch.randint(vocabulary, (batch_size, context), generator=generator)
    sampling = SamplingParams(temperature=0, max_tokens=decode_tokens + 1, ignore_eos=True, detokenize=False)
    for row, prompt in enumerate(tokens.tolist()):
        engine.add_request(f"{time.monotonic_ns()}-{row}", {"prompt_token_ids": prompt}, sampling)
    begun: set[str] = set()
    prefill, steps = 0.0, []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        if len(begun) < batch_size:
            prefill += seconds
            begun |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        else:
            steps.append(seconds)
    return prefill, steps


if __name__ == "__main__":
    job, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(measure(**json.loads(job.read_text(encoding="utf-8")))), encoding="utf-8")
