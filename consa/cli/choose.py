"""Verbs that choose allocations without `learn`: rules of thumb, and sweeps over methods."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from consa.cli.options import Out, command_line, from_options, model_name, number, with_fields_of
from consa.cli.terminal import show
from consa.config import EvalConfig, LearnConfig, RunConfig, SweepConfig
from consa.errors import ConsaError


@with_fields_of(LearnConfig, only=("sparsity", "granularity", "window", "num_sink_tokens"))
def rules(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model, as for `consa learn`. Only its shape is read.")
    ] = None,
    *,
    layers: Annotated[int | None, number(help="Number of layers, instead of MODEL.")] = None,
    kv_heads: Annotated[int | None, number(help="KV heads of each layer, instead of MODEL.")] = None,
    head_dim: Annotated[int, number(help="Head dimension, for the size of the KV cache. Applies without MODEL.")] = 128,
    seed: Annotated[int, number(help="Random seed of the rule random_units.")] = 0,
    tokens: Annotated[int, number(help="Tokens in the KV cache whose size is shown.")] = 32768,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for one JSON file per rule.")],
    **options: Any,
) -> None:
    """Write the allocation of every rule for MODEL or for a given shape, and show its KV cache."""
    from consa.rules import dense, every_rule

    LearnConfig(seed=seed, **options)  # checks the values
    for name, value in {"head_dim": head_dim, "tokens": tokens}.items():
        if value < 1:
            raise ConsaError(f"{name} must be an integer >= 1, got {value}")
    if (model is None) == (layers is None or kv_heads is None) or (model and (layers or kv_heads)):
        raise ConsaError("give either MODEL, or both --layers and --kv-heads")
    if model is not None:
        from consa.model.load import read_layout

        layout = read_layout(model)
        layers, kv_heads, head_dim = layout.num_layers, layout.num_kv_heads, layout.head_dim
        options["native_windows"] = layout.native_windows
    assert layers is not None and kv_heads is not None
    allocations = every_rule(layers, kv_heads, seed=seed, **options)
    whole = dense(layers, kv_heads, native_windows=options.get("native_windows"))
    dense_bytes = whole.kv_cache_bytes(tokens, head_dim=head_dim)
    rows = []
    for name, allocation in allocations.items():
        origin = {} if model is None else {"model": model}
        replace(allocation, provenance=origin | dict(allocation.provenance)).save(out / f"{name}.json")
        taken = allocation.kv_cache_bytes(tokens, head_dim=head_dim)
        rows.append([name, f"{allocation.sparsity:.4f}", f"{taken / 2**20:.1f} MiB", f"{taken / dense_bytes:.1%}"])
    show(["rule", "sparsity", f"KV cache at {tokens} tokens", "of dense"], rows)
    print(f"{len(allocations)} allocations in {out}")


MEASURED = tuple(field.name for field in fields(EvalConfig) if field.name not in ("sparsity", "granularity"))


@with_fields_of(RunConfig, SweepConfig)
@with_fields_of(EvalConfig, only=MEASURED)
def sweep(*, out: Out = None, **options: Any) -> None:
    """Choose allocations of MODEL by several methods at several sparsities, and plot quality over KV cache."""
    run_config, config = from_options(options, RunConfig, SweepConfig)
    measured = EvalConfig(**{name: options[name] for name in MEASURED})
    command = command_line("sweep", run_config, config, measured)
    folder = out or Path("runs") / f"sweep-{model_name(run_config)}"
    from consa.runs.sweep import sweep as run_sweep

    frontier, paths = run_sweep(run_config, config, measured, folder, command=command)
    show(*frontier.for_terminal())
    for path in paths:
        print(path)
