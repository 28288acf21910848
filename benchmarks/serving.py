"""What hybrids save in vLLM on a GPU, beside stock vLLM with the dense model: time, throughput and memory.

    python benchmarks/serving.py --out benchmarks/results/serving.json
    python benchmarks/serving.py --out real.json --model FOLDER --allocation FILE

Without `--model` the model has the shape of Qwen3-0.6B and random weights. All models get the same options of vLLM,
which by default compiles them and uses CUDA graphs. Workloads: `long` (16 requests of 32,768 tokens) and `short` (64 of
2,048) are whole generations, timed in prefill and in decode steps of all requests; `saturated` hands in twice as
many requests of 32,768 tokens as fit; `server` sends requests of 2,048 to 8,192 tokens, all at once, to the
OpenAI-compatible server.

An interrupted run resumes when the same command is started again. `--prepare` writes the models only, without
a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import QWEN3_06B, environment, parser_of, print_table, write_json

from consa import Allocation, ConsaError, convert
from consa.bench import vllm as bench
from consa.serving.limits import vllm_version
from consa.serving.server import command

TINY = QWEN3_06B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
TINY |= {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
WORKLOADS = ("long", "short", "saturated", "server")
MODELS = ("dense", "heads-sinks4", "heads-sinks0", "layers-sinks4")
COLUMNS = ["workload", "model", "prefill s", "of dense", "decode ms/step", "of dense", "tokens/s", "x dense"]
COLUMNS += ["at once", "preempted", "KV GB used", "fit", "fit by vLLM"]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it started, too
    options = _options()
    workloads = _workloads(options)
    engine = {"max_num_batched_tokens": bench.CHUNK, "dtype": "bfloat16"} | options.engine
    lengths = (work | {"context": int(np.max(work["context"]))} for work in workloads.values())
    engine.setdefault("max_model_len", max(bench.tokens_of(work, engine["max_num_batched_tokens"]) for work in lengths))
    kept = ("model", "allocation", "sparsity", "window", "tiny")
    settings = {name: getattr(options, name) for name in kept} | {"engine": engine, "workloads": workloads}
    record = environment() | {"settings": settings, "columns": COLUMNS, "rows": [], "runs": {}}
    record["versions"] |= {"vllm": vllm_version()}
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if before["settings"] != settings:
            raise SystemExit(f"{options.out} was measured with {before['settings']}; choose another --out")
        record |= {"runs": before["runs"], "rows": before["rows"]}
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        if options.prepare:
            for name in options.models:
                model_folder(name, options, engine["max_model_len"])
            return
        for name in options.models:
            missing = [key for key in options.workloads if f"{key} {name}" not in record["runs"]]
            if not missing:
                continue
            offline, stock = [key for key in missing if key != "server"], name == "dense"
            try:
                folder = model_folder(name, options, engine["max_model_len"])
                jobs = [workloads[key] for key in offline]
                rows = bench.run_job(folder, engine, jobs, stock=stock) if jobs else ()
                for key, row in zip(offline, rows, strict=True):
                    _keep(record, options.out, f"{key} {name}", row)
                if "server" in missing:
                    row = serve(folder, engine, stock=stock, **workloads["server"])
                    _keep(record, options.out, f"server {name}", row)
            except ConsaError as error:  # the other models go on
                print(f"{name}: {error}", flush=True)
    print_table(COLUMNS, record["rows"])


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="dense,heads-sinks4,heads-sinks0", help=f"among {', '.join(MODELS)}")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="among these, with commas between")
    parser.add_argument("--context", type=int, default=32768, help="tokens of long prompts")
    parser.add_argument("--output-tokens", type=int, default=512, help="of each request of the saturated workload")
    parser.add_argument("--repeats", type=int, default=3, help="generations of `long`; `short` has three times as many")
    parser.add_argument("--engine", type=json.loads, default={}, help="options of vLLM's LLM for all models, as JSON")
    parser.add_argument("--model", help="a model folder or GGUF file instead of random weights")
    parser.add_argument("--allocation", help="allocation.json of the hybrid of --model")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--folder", type=Path, help="keeps the models between runs")
    parser.add_argument("--prepare", action="store_true", help="write the models and measure nothing")
    parser.add_argument("--tiny", action="store_true", help="a small model and small workloads, to test this script")
    options = parser.parse_args()
    if bool(options.model) != bool(options.allocation):
        parser.error("--model and --allocation go together")
    if options.model:
        options.models = "dense,given"
    for name, known in (("models", (*MODELS, "given")), ("workloads", WORKLOADS)):
        chosen = getattr(options, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown {name}: {', '.join(unknown)}; choose among {', '.join(known)}")
        setattr(options, name, chosen)
    return options


def _workloads(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arguments of `bench.generations`, `bench.saturate` and `serve` by the names of workloads."""
    context, repeats = options.context, options.repeats
    long = {"context": context, "requests": 16, "decode_tokens": 64, "repeats": repeats}
    saturated = {"context": context, "output_tokens": options.output_tokens}
    server = {"context": [2048, 8192], "requests": 256, "output_tokens": 256}
    if options.tiny:
        long |= {"requests": 3, "decode_tokens": 4}
        server = {"context": [20, 80], "requests": 4, "output_tokens": 4}
    # Short generations are over soon, and their steps wait for the CPU more often: more of them give a median.
    short = long | {"context": context // 16, "requests": 4 * long["requests"], "repeats": 3 * repeats}
    return dict(zip(WORKLOADS, (long, short, saturated, server), strict=True))


def model_folder(name: str, options: argparse.Namespace, positions: int) -> Path:
    """The folder of a model in `options.folder`, written when it is first asked for."""
    folder = options.folder / name
    if folder.exists():
        return folder
    if name == "dense":
        hybrid = model_folder("given" if options.model else MODELS[1], options, positions)
        return bench.dense_folder(hybrid, folder)
    if name == "given":
        words = [sys.executable, "-m", "consa", "convert", options.model, "--allocation", options.allocation]
        subprocess.run([*words, "--kind", "hybrid", "--out", folder], check=True)
        return folder
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape: dict[str, Any] = (TINY if options.tiny else QWEN3_06B) | {"max_position_embeddings": positions}
    config = Qwen3Config(**shape)
    torch.manual_seed(0)
    model, tokenizer = Qwen3ForCausalLM(config).bfloat16(), _tokenizer(config.vocab_size)
    convert(model, _allocation(name, config, options), folder, kind="hybrid", tokenizer=tokenizer)
    return folder


def _allocation(name: str, config: Any, options: argparse.Namespace) -> Allocation:
    """FA heads anywhere, or FA layers anywhere, drawn with seed 0."""
    granularity, sinks = name.split("-sinks")
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    units = layers * heads if granularity == "heads" else layers
    full = np.zeros(units, bool)
    full[np.random.default_rng(0).permutation(units)[: round(units * (1 - options.sparsity))]] = True
    return Allocation(
        full_attention=full.reshape(layers, -1).repeat(layers * heads // units, axis=1),
        granularity="kv_head" if granularity == "heads" else "layer",
        window=options.window,
        num_sink_tokens=int(sinks),
    )


def _tokenizer(vocabulary: int) -> Any:
    """A word for each token; the server wants a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t1")


def _keep(record: dict[str, Any], out: Path, name: str, row: dict[str, Any]) -> None:
    record["runs"][name] = row
    record["rows"] = _table(record["runs"])
    write_json(out, record)
    print(f"{name}: {json.dumps(row)}", flush=True)


def serve(
    folder: Path, engine: dict[str, Any], *, context: list[int], requests: int, output_tokens: int, stock: bool
) -> dict[str, Any]:
    """Measure the OpenAI-compatible server with requests of `context[0]` to `context[1]` tokens, all sent at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"]
    for key, value in engine.items():
        words += [f"--{key.replace('_', '-')}"] if value is not False else []
        if not isinstance(value, bool):
            words.append(value if isinstance(value, str) else json.dumps(value))
    stock_server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    program = [*stock_server, *words] if stock else command(folder, words)
    address = f"http://127.0.0.1:{port}"
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile() as log:
        options: dict[str, Any] = {"env": bench.environment(stock), "stdout": log, "stderr": subprocess.STDOUT}
        server = subprocess.Popen(program, start_new_session=True, **options)
        try:
            while not _answers(address):
                if server.poll() is not None:
                    raise ConsaError(f"the server of {folder} failed: {bench.last_line(Path(log.name))}")
                time.sleep(0.5)
            started = time.perf_counter() - start
            lengths = np.random.default_rng(0).integers(context[0], context[1], requests, endpoint=True).tolist()
            asyncio.run(_send(address, str(folder), lengths[:2], output_tokens))  # compiles kernels
            return {"start_seconds": started} | asyncio.run(_send(address, str(folder), lengths, output_tokens))
        finally:
            _end(server)


def _end(server: subprocess.Popen[Any]) -> None:
    """End a server and its engine, which has a process of its own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            server.wait(3)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health").close()
    except OSError:
        return False
    return True


async def _send(address: str, model: str, lengths: list[int], output_tokens: int) -> dict[str, Any]:
    """Send all requests at once and read their answers as streams."""
    import aiohttp

    generator = np.random.default_rng(len(lengths))
    running: list[float] = []

    async def watch() -> None:
        while True:
            running.append(await asyncio.to_thread(_metric, address, "vllm:num_requests_running"))
            await asyncio.sleep(0.25)

    async def answer(length: int) -> tuple[float, float]:
        body = {"model": model, "prompt": generator.integers(2, 256, length).tolist(), "max_tokens": output_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True}
        first, last = 0.0, 0.0
        async with session.post(f"{address}/v1/completions", json=body) as lines:
            lines.raise_for_status()
            async for line in lines.content:
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    last = time.perf_counter()
                    first = first or last
        return first, last

    preempted = _metric(address, "vllm:num_preemptions_total")
    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=None)}
    async with aiohttp.ClientSession(**limits) as session:
        watcher = asyncio.create_task(watch())
        start = time.perf_counter()
        times = await asyncio.gather(*map(answer, lengths))
        seconds = time.perf_counter() - start
        watcher.cancel()
    firsts = [first - start for first, _ in times]
    return {
        "requests": len(lengths),
        "output_tokens": output_tokens,
        "prompt_tokens": sum(lengths),
        "seconds": seconds,
        "tokens_per_second": len(lengths) * output_tokens / seconds,
        "first_token_seconds": statistics.median(firsts),
        "first_token_seconds_p99": float(np.quantile(firsts, 0.99)),
        "seconds_per_token": statistics.median((last - first) / max(output_tokens - 1, 1) for first, last in times),
        "running_max": int(max(running, default=0)),
        "preemptions": _metric(address, "vllm:num_preemptions_total") - preempted,
    }


def _metric(address: str, name: str) -> float:
    """A number that the server reports of itself."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def _table(runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each workload and model; ratios are to the dense model, of medians."""
    rows = []
    for key in sorted(runs, key=lambda key: WORKLOADS.index(key.split()[0])):
        workload, name = key.split()
        run, numbers, dense = runs[key], _numbers(runs[key]), _numbers(runs.get(f"{workload} dense", {}))
        ratios = {kind: f"{numbers[kind] / dense[kind]:.3f}" for kind in dense}
        cells = [workload, name]
        for times, unit in (("prefill_seconds", 1), ("decode_seconds", 1e3)):
            cells.append(bench.interval([unit * value for value in run[times]], 2) if times in run else "")
            cells.append(ratios.get(times, ""))
        cells += [f"{numbers['speed']:,.0f}", ratios.get("speed", "")]
        median = run.get("running_median")
        cells.append(f"{run['running_max']}" + ("" if median is None else f" (median {median:.0f})"))
        cells.append(f"{run['preemptions']:.0f}")
        cells.append(f"{run['kv_bytes'] / 1e9:.1f}" if "kv_bytes" in run else "")
        cells += [f"{run['fit'][name]:.1f}" if "fit" in run else "" for name in ("consa", "vllm")]
        rows.append(cells)
    return rows


def _numbers(run: dict[str, Any]) -> dict[str, float]:
    """What of a run is compared with the dense model's, which may not have been measured."""
    numbers = {times: statistics.median(run[times]) for times in ("prefill_seconds", "decode_seconds") if times in run}
    if run:
        numbers["speed"] = run.get("tokens_per_second") or run["requests"] / numbers["decode_seconds"]
    return numbers


if __name__ == "__main__":
    main()
