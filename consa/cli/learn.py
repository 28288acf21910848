"""Verbs that choose an allocation (learn, the demo, rules, sweep), and one that adapts the weights to it."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from consa.cli.options import (
    RULE_FIELDS,
    Chosen,
    Out,
    Tensorboard,
    Wandb,
    boards,
    chosen,
    from_options,
    number,
    text,
    was_given,
    with_fields_of,
)
from consa.cli.terminal import show
from consa.config import AdaptConfig, EvalConfig, LearnConfig, RunConfig, SweepConfig, folder_of
from consa.errors import ConsaError
from consa.settings import command_line, option_name


@with_fields_of(RunConfig, LearnConfig)
def learn(
    *, out: Out = None, tensorboard: Tensorboard = False, wandb: Wandb = False, ctx: typer.Context, **options: Any
) -> None:
    """Learn which layers or KV heads of MODEL keep full attention, and compare with rules."""
    if options["kv_budget"] is not None and was_given(ctx, "sparsity"):
        raise ConsaError("sparsity and kv_budget set the same thing; give only one of them")
    run_config, config = from_options(options, RunConfig, LearnConfig)
    folder = out or folder_of(run_config, config)
    _run(
        run_config,
        config,
        folder,
        command_line("learn", run_config, config),
        boards(tensorboard=tensorboard, wandb=wandb),
    )


DEMO_RUN = RunConfig(model="smollm2-135m", data="stdlib", max_tokens=2**22, num_heldout=7)
DEMO_LEARN = LearnConfig(
    sparsity=0.75,
    granularity="kv_head",
    window=64,
    num_sink_tokens=4,
    seq_len=1024,
    num_steps=60,
    sequences_per_step=1,
    warmup=0.4,  # with so few steps, the gates need most of them at the target
    sharpening_start=0.6,
    log_alpha_max=4.0,
    refine_evaluations=0,  # each would cost a forward pass per sequence
)


@with_fields_of(RunConfig, only=("device", "dtype"))
def demo(
    *,
    out: Out = None,
    seed: Annotated[int, number(help="Random seed of the gates and of the order of the text.")] = 0,
    tensorboard: Tensorboard = False,
    wandb: Wandb = False,
    **options: Any,
) -> None:
    """Learn KV heads of a real 135M model on Python's own sources, in 10 to 20 minutes on 2 CPU cores."""
    config = replace(DEMO_LEARN, seed=seed)
    folder = out or Path("runs") / ("demo" if seed == 0 else f"demo-seed{seed}")
    given = [word for name, value in options.items() if value for word in (option_name(name), value)]
    command = shlex.join(["consa", "demo", "--seed", str(seed), *given])
    run_config = replace(DEMO_RUN, **options)
    _run(run_config, config, folder, command, boards(tensorboard=tensorboard, wandb=wandb))


@with_fields_of(EvalConfig, only=RULE_FIELDS)
@with_fields_of(RunConfig, AdaptConfig)
def adapt(
    *,
    allocation: Chosen = None,
    out: Out = None,
    tensorboard: Tensorboard = False,
    wandb: Wandb = False,
    ctx: typer.Context,
    **options: Any,
) -> None:
    """Continue training MODEL under a fixed allocation, and compare with the hybrid before training."""
    run_config, config = from_options(options, RunConfig, AdaptConfig)
    rule = EvalConfig(**{name: options[name] for name in RULE_FIELDS})
    kept = chosen(ctx, allocation, run_config.model, replace(rule, seed=config.seed))
    command = f"{command_line('adapt', run_config, config, rule)} --allocation {shlex.quote(str(allocation))}"
    folder = out or folder_of(run_config, config)
    from consa.runs.adaptation import run_adaptation

    wanted = boards(tensorboard=tensorboard, wandb=wandb)
    summary = run_adaptation(run_config, kept, config, folder, command=command, boards=wanted)
    _show_losses(summary, folder, "model", "summary.md")


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
    out: Annotated[Path, text("FOLDER", "Folder for one JSON file per rule.")],
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
    folder = out or folder_of(run_config, config)
    from consa.runs.sweep import sweep as run_sweep

    frontier, paths = run_sweep(run_config, config, measured, folder, command=command)
    show(*frontier.for_terminal())
    for path in paths:
        print(path)


def _run(run_config: RunConfig, config: LearnConfig, folder: Path, command: str, wanted: tuple[str, ...]) -> None:
    """Learn, then show the table of losses."""
    run_config.start_for(config)  # bad settings raise before heavy imports
    from consa.runs.learning import run_learning

    summary = run_learning(run_config, config, folder, command=command, boards=wanted)
    made = ("model",) if config.mode == "joint" else ()
    _show_losses(summary, folder, "allocation.json", *made, "heatmap.png", "summary.md")
    if summary:
        from consa.runs.verdict import advice, next_step, questions, verdict

        lines = [verdict(summary), *advice(summary), *questions(summary, folder)]
        print("", *lines, f"Next: {next_step(summary, folder)}", sep="\n")


def _show_losses(summary: Any, folder: Path, *names: str) -> None:
    """Print the losses of a run and the paths of its files; processes other than the main one print nothing."""
    if not summary:
        return
    from consa.runs.summary import losses

    print(
        f"Held-out loss (nats) from position {summary['start']} on, and the share of the gap from all-SWA to dense"
        " that is recovered:"
    )
    show(*losses(summary))
    for name in names:
        print(folder / name)
