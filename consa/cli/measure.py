"""Verbs that measure: quality, speed and memory, what heads attend to."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from consa.cli.options import (
    Converted,
    Device,
    Out,
    SavedDtype,
    existing,
    from_options,
    number,
    text,
    was_given,
    with_fields_of,
)
from consa.cli.terminal import show
from consa.config import EvalConfig, LearnConfig, RunConfig, folder_of
from consa.errors import ConsaError
from consa.files import check_writable
from consa.settings import command_line, words_of


@with_fields_of(RunConfig, EvalConfig)
def evaluate(
    *,
    allocation: Annotated[
        list[str] | None,
        text(
            "NAME",
            "Allocation to measure besides dense and all-SWA: an allocation.json, the folder of a run, the name of"
            " a published allocation or of a rule, or a .tsv of DuoAttention or PruLong. Separated by commas, or"
            " repeated.",
        ),
    ] = None,
    out: Out = None,
    ctx: typer.Context,
    **options: Any,
) -> None:
    """Measure allocations of MODEL beside dense and all-SWA: held-out loss, retrieval, lm-eval tasks."""
    run_config, config = from_options(options, RunConfig, EvalConfig)
    allocation = [word for name in allocation or () for word in words_of(name)]
    command = command_line("eval", run_config, config)
    for name in allocation:
        command += f" --allocation {shlex.quote(name)}"
    from consa.rules import RULES
    from consa.runs.evaluation import run_evaluation

    for name in ("sparsity", "granularity"):
        if was_given(ctx, name) and not set(allocation) & RULES.keys():
            raise ConsaError(f"{name} applies to rules, and no --allocation is one; files keep their own")
    table, paths = run_evaluation(
        run_config,
        config,
        allocation,
        out or folder_of(run_config, config),
        command=command,
        follow_files=not (was_given(ctx, "window") or was_given(ctx, "num_sink_tokens")),
    )
    for title, columns, rows in table.sections():
        print(f"{title}:")
        show(columns, rows)
    for path in paths:
        print(path)


def bench(
    folder: Converted,
    *,
    contexts: Annotated[str, text("N,N,...", "Tokens in the KV cache. Separated by commas.")] = "1024,4096",
    batch_sizes: Annotated[str, text("N,N,...", "Batch sizes, in sequences. Separated by commas.")] = "1",
    decode_tokens: Annotated[int, number(help="Decoding steps after each prefill.")] = 32,
    repeats: Annotated[int, number(help="Repeats of each measurement. The median counts.")] = 3,
    engine: Annotated[
        str,
        text(
            "transformers|vllm",
            "Engine that is measured. With vllm, KV cache is the bytes in use while all requests decode.",
        ),
    ] = "transformers",
    device: Device = None,
    dtype: SavedDtype = None,
    out: Annotated[Path | None, text("FOLDER", "Folder for bench.json and bench.png. Default: FOLDER-bench.")] = None,
) -> None:
    """Measure prefill, decoding, KV cache and peak memory of a converted model, beside the dense one."""
    lists = []
    for name, value in (("contexts", contexts), ("batch_sizes", batch_sizes)):
        try:
            lists.append([int(word) for word in value.split(",")])
        except ValueError:
            raise ConsaError(f"{name} must be integers separated by commas, got {value!r}") from None
    if engine not in ("transformers", "vllm"):
        raise ConsaError(f"engine must be transformers or vllm, got {engine!r}")
    if engine == "vllm" and (device or dtype):
        raise ConsaError("device and dtype apply to engine transformers; vLLM chooses its own")
    from consa.bench import measure as stock
    from consa.bench import vllm
    from consa.model.convert import load
    from consa.progress import progress

    out = out or Path(f"{folder if folder.name.strip('.') else folder.resolve()}-bench")
    check_writable(out)
    measure: Any = vllm.benchmark if engine == "vllm" else stock.benchmark
    model = folder if engine == "vllm" else load(folder, device=device, dtype=dtype)
    with progress("Measuring", len(lists[0]) * len(lists[1]) * repeats * 2) as tell:
        result = measure(
            model, contexts=lists[0], batch_sizes=lists[1], decode_tokens=decode_tokens, repeats=repeats, on_run=tell
        )
    show(*result.table())
    if engine == "vllm":
        print(vllm.requests_line(result))
    for path in stock.write(result, out):
        print(path)


@with_fields_of(RunConfig, only=("model", "data", "text_field", "max_tokens", "device", "dtype"))
@with_fields_of(LearnConfig, only=("window", "num_sink_tokens"))
def behaviour(
    *,
    seq_len: Annotated[int, number(help="Length of a held-out sequence, in tokens.")] = LearnConfig.seq_len,
    seed: Annotated[int, number(help="Random seed of the random sequence and the needles.")] = 0,
    sequences: Annotated[int, number(help="Held-out sequences to measure on.")] = 1,
    causal_sequences: Annotated[
        int, number(help="Sequences of these to measure each KV head's effect on the loss on. Slow; 0 for none.")
    ] = 0,
    run: Annotated[
        Path | None,
        text(
            "FOLDER",
            "Folder of a run of MODEL. Its window and sink tokens are used, and the measures are compared with its"
            " allocation.",
        ),
    ] = None,
    out: Annotated[
        Path | None, text("FILE", "File for the result. Default: behaviour.safetensors in the folder of --run.")
    ] = None,
    ctx: typer.Context,
    **options: Any,
) -> None:
    """Measure what each KV head of MODEL attends to: spans, sinks, induction, copying, needles and more."""
    if out is None and run is None:
        raise ConsaError("give --out FILE or --run FOLDER, so that there is a place to write to")
    existing(run)
    from consa.allocation import Allocation

    limits = {name: options.pop(name) for name in ("window", "num_sink_tokens")}
    limits |= {"seq_len": seq_len, "seed": seed}
    LearnConfig(**limits)  # checks the values
    allocation = None if run is None else Allocation.load(run / "allocation.json")
    for name in ("window", "num_sink_tokens"):
        if allocation and not was_given(ctx, name):
            limits[name] = getattr(allocation, name)
    run_config = RunConfig(**options)
    from consa.behaviour.record import MEASURES
    from consa.behaviour.relate import relate
    from consa.model.layout import check_fits
    from consa.model.load import read_layout
    from consa.runs.behaviour import run_behaviour

    path = out or cast(Path, run) / "behaviour.safetensors"
    if path.is_dir():
        raise ConsaError(f"out must be a file, got the folder {path}")
    if allocation:
        check_fits(allocation, read_layout(run_config.model), run_config.model)
    measured = run_behaviour(run_config, path, num_sequences=sequences, causal_sequences=causal_sequences, **limits)
    columns = ["measure", "lowest", "mean", "highest"]
    shown = {name: measured.measures[name] for name in MEASURES if name in measured.measures}
    rows = [[name, f"{v.min():.4g}", f"{v.mean():.4g}", f"{v.max():.4g}"] for name, v in shown.items()]
    if allocation:
        columns += ["AUC", "with score"]
        for row, relation in zip(rows, relate(measured, allocation), strict=True):
            row += ["-" if v is None else f"{v:.3f}" for v in (relation.auc, relation.with_scores)]
    show(columns, rows)
    print(path)
