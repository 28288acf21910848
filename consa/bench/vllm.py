"""Measure a hybrid beside its dense model in vLLM: whole generations, saturated throughput, and memory.

A decode step counts only if every request gets exactly one token in it. vLLM schedules a step while the one before it
runs, so the time of a single step means nothing: times are wall times over many steps.

Each model is measured in a process of its own, which returns all of its memory when it ends. The dense model runs in
stock vLLM, without consa's plugin. Run as a module, this is that process: `python -m consa.bench.vllm JOB RESULT`.
JOB is JSON, and RESULT gets a line of JSON for each workload.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# vLLM has an environment of its own, and pyright takes this file for it.

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from consa.bench.measure import Benchmark, Measurement, check_settings, peak_bytes
from consa.errors import ConsaError
from consa.model.convert import verify
from consa.model.register import ARCHITECTURE_PREFIX, family_config
from consa.provenance import hardware, versions
from consa.serving.capacity import bytes_in_use, requests_that_fit
from consa.serving.limits import engine_obstacle, hybrid_obstacle, vllm_version

CHUNK = 8192  # tokens that the engine computes in one step; the default of vLLM's server on large GPUs
SETTLE = 8  # decode steps of all requests before those that count
SPARE = 8  # tokens of each request after those that count
POLL = 0.5  # seconds between two looks at a job's results


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

    In a measurement, `cache_bytes` are the bytes of the KV cache in use while all requests decode, and `peak_bytes` are
    those of the engine's process, with the whole pool. `where["workloads"]` has every generation's times, the number of
    requests that ran at once, preemptions, and how many requests fit by vLLM's count and by consa's.

    Args:
        folder: a hybrid.
        contexts: prompt lengths, in tokens.
        batch_sizes: requests that decode at once.
        decode_tokens: decode steps that are timed in each generation.
        repeats: generations; medians are reported.
        options: options of vLLM's `LLM`, for both models.
        on_run: called after each context and batch size with the number of generations so far and a description.

    Raises:
        ConsaError: vLLM cannot serve the hybrid, a setting is out of range, the requests do not fit into the KV cache
            at once, or the engine failed.
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
    longest = config.get("max_position_embeddings")
    check_settings(**settings, longest=longest)
    workloads: list[dict[str, Any]] = [
        {"context": context, "requests": size, "decode_tokens": decode_tokens, "repeats": repeats}
        for context in contexts
        for size in batch_sizes
    ]
    engine = {"max_num_batched_tokens": CHUNK} | (options or {})
    engine.setdefault("max_model_len", max(tokens_of(job, engine["max_num_batched_tokens"]) for job in workloads))
    if longest is not None and engine["max_model_len"] > longest:
        raise ConsaError(
            f"a request needs {engine['max_model_len']:,} tokens, because early ones decode while later prompts are"
            f" read, and the model has {longest:,} positions; choose shorter contexts or smaller batches"
        )
    if dtype := config.get("dtype"):  # vLLM would make bfloat16 of float32
        engine.setdefault("dtype", dtype)
    rows: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        models = {"dense": dense_folder(folder, Path(temporary, "dense")), "hybrid": folder}
        done = 0
        for name, model in models.items():
            rows[name] = []
            for row in run_job(model, engine, workloads, stock=name == "dense"):
                rows[name].append(row)
                done += repeats
                if on_run:
                    on_run(done, f"{name}, {row['context']} tokens, batch {row['requests']}")
    measurements = [
        Measurement(
            model=name,
            context=row["context"],
            batch_size=row["requests"],
            prefill_seconds=statistics.median(row["prefill_seconds"]),
            decode_tokens_per_second=row["requests"] / statistics.median(row["decode_seconds"]),
            cache_bytes=row["kv_bytes"],
            peak_bytes=row["peak_bytes"],
        )
        for pair in zip(*rows.values(), strict=True)
        for name, row in zip(rows, pair, strict=True)
    ]
    where = {name: rows["hybrid"][0][name] for name in ("hardware", "dtype", "pool_bytes")}
    where |= {"engine": f"vLLM {vllm_version()}", "versions": versions(), **settings, **engine, "workloads": rows}
    return Benchmark(allocation.sparsity, tuple(measurements), where)


def requests_line(result: Benchmark) -> str:
    """Intervals, requests at once, preemptions, and how many requests fit, in a few lines."""
    lines = []
    for name, rows in result.where["workloads"].items():
        for row in rows:
            prefill, decode = interval(row["prefill_seconds"], 3), interval(row["decode_seconds"], 5)
            lines.append(
                f"{name}, {row['requests']} x {row['context']:,} tokens: prefill {prefill} s, a decode step {decode} s,"
                f" {row['running_max']} requests at once, {row['preemptions']} preemptions."
            )
        fit = rows[-1]["fit"]
        lines.append(
            f"{name}: {fit['consa']:.1f} requests of {fit['tokens']:,} tokens fit into"
            f" {result.where['pool_bytes'] / 2**30:.2f} GiB ({fit['vllm']:.1f} by vLLM's own count)."
        )
    return "\n".join(lines)


def interval(values: list[float], digits: int) -> str:
    """Median, lowest and highest as text."""
    median, lowest, highest = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({lowest:.{digits}f} to {highest:.{digits}f})"


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


def tokens_of(workload: dict[str, Any], chunk: int) -> int:
    """Tokens of the longest request of a workload, prompt and answer.

    Requests whose prompts are read first decode until the last prompt has been read, and then as long as steps count.
    """
    if "output_tokens" in workload:
        return workload["context"] + workload["output_tokens"]
    requests, context = workload["requests"], workload["context"]
    prefill_steps = math.ceil(requests * context / max(chunk - requests, 1)) + 2
    return context + prefill_steps + SETTLE + workload["decode_tokens"] + SPARE


def run_job(
    folder: Path, options: dict[str, Any], workloads: list[dict[str, Any]], *, stock: bool
) -> Iterator[dict[str, Any]]:
    """Measure workloads on one model, in a process of its own; yields a row for each as soon as it is there.

    Args:
        folder: a model.
        options: options of vLLM's `LLM`.
        workloads: keyword arguments of `generations`, or of `saturate` where they have `output_tokens`.
        stock: whether consa's plugin stays out.

    Raises:
        ConsaError: the process failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as temporary:
        job, result, log = (Path(temporary, name) for name in ("job.json", "result.jsonl", "log"))
        job.write_text(json.dumps({"folder": str(folder), "options": options, "workloads": workloads}))
        result.touch()
        with log.open("w") as output, result.open() as rows:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(job), str(result)],
                env=environment(stock) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},  # the scheduler in that process
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                running = True
                while running:
                    running = process.poll() is None
                    yield from map(json.loads, rows)
                    time.sleep(POLL if running else 0)
            finally:
                process.kill()
                process.wait()
        if process.returncode:
            raise ConsaError(f"vLLM failed on {folder}: {last_line(log)}")


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def environment(stock: bool) -> dict[str, str]:
    """Variables of a process that runs vLLM, with consa's plugin or without any."""
    variables = {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ
    return variables | {"VLLM_PLUGINS": ""} if stock else variables


def measure(result: Path, *, folder: str, options: dict[str, Any], workloads: list[dict[str, Any]]) -> None:
    """Measure workloads in this process; adds a line to the file `result` for each."""
    from vllm import LLM, ModelRegistry
    from vllm.platforms import current_platform

    from consa.serving.plugin import ARCHITECTURES

    start = time.perf_counter()
    options = {"enforce_eager": current_platform.is_cpu()} | options  # compiling for a CPU takes minutes
    llm: Any = LLM(folder, skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    engine = llm.llm_engine.vllm_config
    shared = {
        "start_seconds": time.perf_counter() - start,
        "hardware": hardware(),
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "plugin": bool(ARCHITECTURES.keys() & ModelRegistry.models.keys()),
        "compilation": engine.compilation_config.mode.name,
        "graphs": engine.compilation_config.cudagraph_mode.name,
        "chunk": engine.scheduler_config.max_num_batched_tokens,
        "asynchronous": bool(engine.scheduler_config.async_scheduling),
    }
    if workloads:  # compiles kernels for prompts and for decoding
        longest = max(workload["context"] for workload in workloads)
        Generation(llm, context=min(longest, 2 * shared["chunk"]), requests=3, max_tokens=4).finish()
    for workload in workloads:
        row = (saturate if "output_tokens" in workload else generations)(llm, **workload)
        row = workload | row | shared | {"peak_bytes": peak_bytes(engine.device_config.device)}
        with result.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")
    llm.llm_engine.engine_core.shutdown()


class Generation:
    """Requests of random tokens, or of given prompts, that an engine in this process works on.

    Attributes:
        tokens: new tokens of each request, in order.
        running: requests in the scheduler after each step.
        waiting: requests in the scheduler's queue after each step.
        finished: requests that were done after each step.
        kv_bytes: the most bytes of the KV cache that requests held.
    """

    def __init__(
        self,
        llm: Any,
        *,
        max_tokens: int,
        context: int = 0,
        requests: int = 0,
        prompts: list[list[int]] | None = None,
        seed: int = 0,
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.engine = llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        if prompts is None:
            vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
            generator = torch.Generator().manual_seed(seed)
            prompts = torch.randint(vocabulary, (requests, context), generator=generator).tolist()
        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.max_tokens = max_tokens
        self.tokens: dict[str, list[int]] = {}
        self.running, self.waiting, self.finished = [], [], []
        self.kv_bytes = 0
        self._preempted: dict[str, int] = {}
        for row, prompt in enumerate(prompts or []):
            name = f"{time.monotonic_ns()}-{row}"
            self.tokens[name] = []
            self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the requests were handed in."""
        return time.perf_counter() - self._start

    @property
    def preemptions(self) -> int:
        """How often a request lost its pages and began again."""
        return sum(self._preempted.values())

    def step(self) -> list[int]:
        """Let the engine do one step; returns the numbers of new tokens of requests that got some."""
        new = []
        for output in self.engine.step():
            tokens = output.outputs[0].token_ids
            if tokens and output.request_id in self.tokens:
                self.tokens[output.request_id] += tokens
                new.append(len(tokens))
        self.running.append(len(self.scheduler.running))
        self.waiting.append(len(self.scheduler.waiting))
        self.finished.append(sum(len(tokens) == self.max_tokens for tokens in self.tokens.values()))
        self.kv_bytes = max(self.kv_bytes, bytes_in_use(self.scheduler.kv_cache_manager))
        for name, request in self.scheduler.requests.items():
            if request.num_preemptions:
                self._preempted[name] = request.num_preemptions
        return new

    def prefill(self) -> float:
        """Work until every request has a token; returns seconds since they were handed in."""
        while not all(self.tokens.values()):
            self.step()
        return self.seconds

    def decode(self, steps: int, *, strict: bool = True) -> float:
        """Do `steps` steps in which requests get tokens; returns seconds per step.

        Raises:
            ConsaError: not every request got one token in each step, unless `strict` is False.
        """
        start, done = time.perf_counter(), 0
        while done < steps:
            new = self.step()
            if not new:  # the first steps only fill the pipeline of asynchronous scheduling
                continue
            done += 1
            if strict and new != [1] * len(self.tokens):
                raise ConsaError(
                    f"only {len(new)} of {len(self.tokens)} requests got a token in a decode step: they do not fit into"
                    " the KV cache at once; measure fewer or shorter ones"
                )
        return (time.perf_counter() - start) / steps

    def finish(self) -> None:
        """Work until all requests are done."""
        while self.engine.has_unfinished_requests():
            self.step()

    def abort(self) -> None:
        """Give all requests up."""
        self.engine.abort_request(list(self.tokens))
        self.finish()


def generations(llm: Any, *, context: int, requests: int, decode_tokens: int, repeats: int, **_: Any) -> dict[str, Any]:
    """Measure prefill and decode steps of whole generations in which all requests are alive.

    Args:
        llm: vLLM's `LLM`, with its engine in this process.
        context: prompt length, in tokens.
        requests: requests that are handed in together.
        decode_tokens: decode steps that are timed.
        repeats: generations, each with its own prompts.

    Returns:
        For each generation, seconds until every request has a token and seconds of a decode step; bytes of the KV cache
        in use while all decode; the most requests at once; preemptions; what `fit` says.
    """
    workload = {"context": context, "requests": requests, "decode_tokens": decode_tokens}
    tokens = tokens_of(workload, llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens)
    row: dict[str, Any] = {"prefill_seconds": [], "decode_seconds": [], "preemptions": 0}
    row |= {"running_max": 0, "kv_bytes": 0}
    for seed in range(repeats):
        generation = Generation(llm, context=context, requests=requests, max_tokens=tokens - context, seed=seed)
        row["prefill_seconds"].append(generation.prefill())
        generation.decode(SETTLE, strict=False)
        generation.kv_bytes = 0  # count decoding alone
        row["decode_seconds"].append(generation.decode(decode_tokens))
        row["preemptions"] += generation.preemptions
        row["running_max"] = max(row["running_max"], *generation.running)
        row["kv_bytes"] = max(row["kv_bytes"], generation.kv_bytes)
        generation.abort()
    return row | fit(llm, tokens)


def saturate(
    llm: Any, *, context: int, output_tokens: int, over: float = 2.0, requests: int | None = None, **_: Any
) -> dict[str, Any]:
    """Measure the throughput of more requests than fit into the KV cache at once.

    Args:
        llm: vLLM's `LLM`, with its engine in this process.
        context: prompt length, in tokens.
        output_tokens: tokens that each request generates.
        over: requests handed in, over those that fit.
        requests: requests handed in, instead of `over`.

    Returns:
        Seconds from the first step to the last token, tokens generated per second, requests at once (the most, and the
        median of steps in which some have finished and some wait), preemptions, bytes of the KV cache in use at most;
        what `fit` says.
    """
    limits = fit(llm, context + output_tokens)
    requests = requests or math.ceil(over * limits["fit"]["consa"])
    generation = Generation(llm, context=context, requests=requests, max_tokens=output_tokens)
    generation.finish()
    seconds = generation.seconds
    steps = zip(generation.running, generation.waiting, generation.finished, strict=True)
    steady = [running for running, waiting, finished in steps if waiting and finished]
    return limits | {
        "requests": requests,
        "seconds": seconds,
        "tokens_per_second": requests * output_tokens / seconds,
        "steps": len(generation.running),
        "running_max": max(generation.running),
        "running_median": statistics.median(steady) if steady else None,
        "preemptions": generation.preemptions,
        "kv_bytes": generation.kv_bytes,
    }


def fit(llm: Any, num_tokens: int) -> dict[str, Any]:
    """How many requests of `num_tokens` fit into the KV cache, by vLLM's count and by consa's, and the pool's bytes."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    config = copy.copy(llm.llm_engine.vllm_config)
    config.model_config = copy.copy(config.model_config)
    config.model_config.max_model_len = num_tokens
    numbers = {
        "tokens": num_tokens,
        "vllm": get_max_concurrency_for_kv_cache_config(config, cache),
        "consa": requests_that_fit(cache, config, num_tokens),
    }
    return {"fit": numbers, "pool_bytes": cache.kv_cache_tensors[0].size}  # groups lie over each other in it


if __name__ == "__main__":
    measure(Path(sys.argv[2]), **json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
