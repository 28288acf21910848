"""The command line: one thin command per verb. What is heavy is imported inside the commands, so help is instant."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import consa
from consa.cli.options import command_line, described, from_options, number, with_fields_of
from consa.cli.terminal import INTERRUPTED, Commands, fail, show
from consa.config import AdaptConfig, EvalConfig, LearnConfig, RunConfig, SweepConfig
from consa.errors import ConsaError
from consa.files import check_writable, read_text

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(consa.__doc__ or "").partition("\n")[0],
)


def main() -> None:
    """The entry point of `consa`."""
    try:
        app(prog_name="consa")
    except KeyboardInterrupt:  # while typer was making the commands
        sys.exit(fail("interrupted", INTERRUPTED))


Out = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="for the results; under runs/ unless given", show_default=False),
]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="also write the metrics for TensorBoard")]


@app.callback(invoke_without_command=True)
def _consa(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(f"consa {consa.__version__}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command()
@with_fields_of(RunConfig, LearnConfig)
def learn(*, out: Out = None, tensorboard: Tensorboard = False, ctx: typer.Context, **options: Any) -> None:
    """Learn which layers or KV heads of MODEL keep full attention, and measure it beside every rule."""
    if options["kv_budget"] is not None and _was_given(ctx, "sparsity"):
        raise ConsaError("sparsity and kv_budget set the same thing; give one of them")
    where, config = from_options(options, RunConfig, LearnConfig)
    folder = out or Path("runs") / _name_of(where, config)
    _run(where, config, folder, command_line("learn", where, config), tensorboard)


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


@app.command()
def demo(
    out: Out = None,
    seed: Annotated[int, number(help="of the gates' noise and the order of the text")] = 0,
    tensorboard: Tensorboard = False,
) -> None:
    """Learn and measure KV heads of a real 135M model, small, on Python's own sources: 10 to 20 minutes on 2 cores."""
    config = replace(DEMO_LEARN, seed=seed)
    folder = out or Path("runs") / ("demo" if seed == 0 else f"demo-seed{seed}")
    _run(DEMO_RUN, config, folder, f"consa demo --seed {seed}", tensorboard)


Kept = Annotated[
    Path,
    typer.Option("--allocation", metavar="FILE", help="an allocation.json, a run's folder, or one published"),
]


@app.command()
@with_fields_of(RunConfig, AdaptConfig)
def adapt(
    *,
    allocation: Kept,
    out: Out = None,
    tensorboard: Tensorboard = False,
    **options: Any,
) -> None:
    """Train MODEL on under an allocation that stays, and measure it beside the hybrid as it was."""
    where, config = from_options(options, RunConfig, AdaptConfig)
    command = f"{command_line('adapt', where, config)} --allocation {shlex.quote(str(allocation))}"
    folder = out or Path("runs") / f"adapt-{_model_name(where)}-{config.method}-seed{config.seed}"
    from consa.allocation import Allocation

    kept = Allocation.load(allocation)
    from consa.runs.runs import run_adaptation

    summary = run_adaptation(where, kept, config, folder, command=command, tensorboard=tensorboard)
    _show_losses(summary, folder, "model", "summary.md")


@app.command()
@with_fields_of(LearnConfig, only=("sparsity", "granularity", "window", "num_sink_tokens"))
def rules(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="as in learn; its shape counts")
    ] = None,
    *,
    layers: Annotated[int | None, number(help="instead of MODEL: its number of layers")] = None,
    kv_heads: Annotated[int | None, number(help="instead of MODEL: KV heads of each layer")] = None,
    head_dim: Annotated[
        int, number(help="without MODEL: elements of one head's key, for the cache's size")
    ] = 128,
    seed: Annotated[int, number(help="of random_units")] = 0,
    tokens: Annotated[int, number(help="in the KV cache whose size is shown")] = 32768,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="for one JSON file per rule")],
    **options: Any,
) -> None:
    """Write every rule's allocation for MODEL, or for a model of given shape, and show what each saves."""
    from consa.rules import dense, every_rule

    LearnConfig(seed=seed, **options)  # the same limits as in learning
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
        rows.append(
            [name, f"{allocation.sparsity:.4f}", f"{taken / 2**20:.1f} MiB", f"{taken / dense_bytes:.1%}"]
        )
    show(["rule", "sparsity", f"KV cache at {tokens} tokens", "of dense"], rows)
    print(f"{len(allocations)} allocations in {out}")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="as in learn")],
    *,
    allocation: Kept,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="a new folder for the checkpoint")],
    kind: Annotated[
        str,
        typer.Option(
            metavar="auto|plain|hybrid",
            help="plain needs no consa, and is possible for whole layers without sinks in some families; auto writes"
            " it where it is possible, else a hybrid",
        ),
    ] = "auto",
) -> None:
    """Write MODEL with an allocation as a checkpoint that loads and generates with the small KV cache."""
    from consa.allocation import Allocation

    chosen = Allocation.load(allocation)
    from consa.model import convert
    from consa.model.layout import check_fits
    from consa.model.load import load_model, read_layout
    from consa.progress import note

    convert.check_wish(out, kind)
    check_fits(chosen, read_layout(model), model)
    loaded = load_model(model, device="cpu", dtype="auto")
    match chosen.provenance.get("config"):
        case {"mode": "joint"}:
            note("Mode joint learned this allocation along with weights of its own, in the run's model")
    written = convert.convert(loaded.model, chosen, out, tokenizer=loaded.tokenizer, kind=cast(Any, kind))
    print(f"{written.folder}: {written.kind} checkpoint ({written.reason})")


Converted = Annotated[Path, typer.Argument(metavar="FOLDER", help="what `consa convert` wrote")]


@app.command()
def generate(
    folder: Converted,
    *,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="what to continue")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="instead: a file with the prompt")
    ] = None,
    max_new_tokens: Annotated[int, number(help="at most")] = 256,
    temperature: Annotated[float, number(kind=float, help="0 takes the most likely token each time")] = 0.0,
    top_p: Annotated[float, number(kind=float, help="share of probability to choose from")] = 1.0,
    seed: Annotated[int, number(help="of the choices")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the chat template")] = False,
) -> None:
    """Continue a prompt with a converted model; the text comes as it is made."""
    if (prompt is None) == (file is None):
        raise ConsaError("give either --prompt or --file")
    if file is not None:
        prompt = read_text(file, max_bytes=2**28)
    assert prompt is not None
    from consa.model.generate import Sampling, generate_text, load_with_tokenizer

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    model, tokenizer = load_with_tokenizer(folder)
    generate_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        chat=chat,
        on_text=lambda text: print(text, end="", flush=True),
    )
    print()


@app.command()
def bench(
    folder: Converted,
    *,
    contexts: Annotated[str, typer.Option(metavar="N,N,...", help="tokens in the cache")] = "1024,4096",
    batch_sizes: Annotated[str, typer.Option(metavar="N,N,...", help="sequences at once")] = "1",
    decode_tokens: Annotated[int, number(help="steps after each prefill")] = 32,
    repeats: Annotated[int, number(help="of each measurement; their median counts")] = 3,
    engine: Annotated[
        str, typer.Option(metavar="transformers|vllm", help="what computes; KV cache is what vllm plans")
    ] = "transformers",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="for bench.json and bench.png", show_default=False)
    ] = None,
) -> None:
    """Measure a hybrid that consa converted beside the dense one: prefill, decoding, KV cache and peak memory."""
    lists = []
    for name, text in (("contexts", contexts), ("batch_sizes", batch_sizes)):
        try:
            lists.append([int(number) for number in text.split(",")])
        except ValueError:
            raise ConsaError(f"{name} must be integers with commas between, got {text!r}") from None
    if engine not in ("transformers", "vllm"):
        raise ConsaError(f"engine must be transformers or vllm, got {engine!r}")
    from consa.bench import measure as stock
    from consa.bench import vllm
    from consa.model.convert import load
    from consa.progress import progress

    out = out or Path(f"{folder if folder.name.strip('.') else folder.resolve()}-bench")
    check_writable(out)
    measure: Any = vllm.benchmark if engine == "vllm" else stock.benchmark
    model = folder if engine == "vllm" else load(folder)
    with progress("measuring", len(lists[0]) * len(lists[1]) * repeats * 2) as tell:
        result = measure(
            model,
            contexts=lists[0],
            batch_sizes=lists[1],
            decode_tokens=decode_tokens,
            repeats=repeats,
            on_run=tell,
        )
    show(*result.table())
    if engine == "vllm":
        print(vllm.requests_line(result))
    for path in stock.write(result, out):
        print(path)


@app.command()
def serve(
    folder: Converted,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="what `vllm serve` takes, after --")
    ] = None,
) -> None:
    """Serve a converted model with vLLM: an OpenAI-compatible server, with the small KV cache; see docs/SERVING.md."""
    from consa.serving import server

    command = server.command(folder, options or [])
    print(shlex.join(command), flush=True)
    os.execv(command[0], command)


@app.command("eval")
@with_fields_of(RunConfig, EvalConfig)
def evaluate(
    *,
    allocation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="what to measure besides dense and all-SWA, several times if you like: an allocation.json, a"
            " run's folder, one published, a rule, or the .tsv of DuoAttention or PruLong",
        ),
    ] = None,
    out: Out = None,
    **options: Any,
) -> None:
    """Measure allocations of MODEL beside dense and all-SWA: held-out loss, retrieval and lm-eval's tasks."""
    where, config = from_options(options, RunConfig, EvalConfig)
    command = command_line("eval", where, config)
    for name in allocation or ():
        command += f" --allocation {shlex.quote(name)}"
    from consa.evaluation import suite

    table, paths = suite.run(
        where, config, allocation or [], out or Path("runs") / f"eval-{_model_name(where)}", command=command
    )
    for title, columns, rows in table.sections():
        print(f"{title}:")
        show(columns, rows)
    for path in paths:
        print(path)


MEASURED = tuple(field.name for field in fields(EvalConfig) if field.name not in ("sparsity", "granularity"))


@app.command()
@with_fields_of(RunConfig, SweepConfig)
@with_fields_of(EvalConfig, only=MEASURED)
def sweep(*, out: Out = None, **options: Any) -> None:
    """Choose allocations of MODEL by several methods at several sparsities, measure all, draw quality over KV cache."""
    where, config = from_options(options, RunConfig, SweepConfig)
    measured = EvalConfig(**{name: options[name] for name in MEASURED})
    command = command_line("sweep", where, config, measured)
    folder = out or Path("runs") / f"sweep-{_model_name(where)}"
    from consa.runs.sweep import sweep as run_sweep

    frontier, paths = run_sweep(where, config, measured, folder, command=command)
    show(*frontier.for_terminal())
    for path in paths:
        print(path)


@app.command()
@with_fields_of(RunConfig, only=("model", "data", "text_field", "max_tokens", "device", "dtype"))
@with_fields_of(LearnConfig, only=("window", "num_sink_tokens"))
def behaviour(
    *,
    seq_len: Annotated[int, number(help="tokens per held-out sequence")] = LearnConfig.seq_len,
    seed: Annotated[int, number(help="of the random sequence and the needles")] = 0,
    sequences: Annotated[int, number(help="held-out sequences to measure on")] = 1,
    causal_sequences: Annotated[
        int, number(help="of these, to measure each KV head's effect on the loss with; slow, 0 for none")
    ] = 0,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="a run of MODEL: gives window and sink tokens, and shows how the measures go with its allocation",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="behaviour.safetensors in the run's folder unless given"),
    ] = None,
    ctx: typer.Context,
    **options: Any,
) -> None:
    """Measure what each KV head of MODEL attends to: spans, sinks, previous tokens, induction, copying, needles."""
    if out is None and run is None:
        raise ConsaError("give --out FILE or --run FOLDER; there is nowhere to write to")
    from consa.allocation import Allocation

    limits = {name: options.pop(name) for name in ("window", "num_sink_tokens")}
    limits |= {"seq_len": seq_len, "seed": seed}
    LearnConfig(**limits)  # the same limits as in learning
    allocation = None if run is None else Allocation.load(run / "allocation.json")
    for name in ("window", "num_sink_tokens"):
        if allocation and not _was_given(ctx, name):
            limits[name] = getattr(allocation, name)
    where = RunConfig(**options)
    from consa.behaviour import measure as verb
    from consa.behaviour.relate import MEASURES, relate
    from consa.model.layout import check_fits
    from consa.model.load import read_layout

    path = out or cast(Path, run) / "behaviour.safetensors"
    if path.is_dir():
        raise ConsaError(f"out must be a file, got the folder {path}")
    if allocation:
        check_fits(allocation, read_layout(where.model), where.model)
    found = verb.run(where, path, num_sequences=sequences, causal_sequences=causal_sequences, **limits)
    columns, rows = ["measure", "lowest", "mean", "highest"], []
    for name in filter(found.measures.__contains__, MEASURES):
        values = found.measures[name]
        rows.append([name, *(f"{value:.4g}" for value in (values.min(), values.mean(), values.max()))])
    if allocation:
        columns += ["AUC", "with score"]
        for row, relation in zip(rows, relate(found, allocation), strict=True):
            pair = (relation.auc, relation.with_scores)
            row += ["-" if value is None else f"{value:.3f}" for value in pair]
    show(columns, rows)
    print(path)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="folders of learn, adapt, eval or bench, or allocations"),
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="FILE", help="the page")] = Path("report.html"),
    behaviour: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="what consa behaviour wrote, for runs without one of their own"),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="also write every chart there, as SVG and PNG")
    ] = None,
) -> None:
    """Make one HTML page about runs, which needs no network: allocations, losses, behaviour, memory and speed."""
    from consa.behaviour.relate import Behaviour
    from consa.report import page

    words = ["consa", "report", *map(str, runs), "--out", str(out)]
    words += ["--behaviour", str(behaviour)] if behaviour else []
    found = Behaviour.load(behaviour) if behaviour else None
    for path in page.write(runs, out, command=shlex.join(words), behaviour=found, figures=figures):
        print(path)


@app.command(hidden=True)
def cli_docs() -> None:
    """Print this reference as Markdown; docs/cli.md is what it printed last."""
    print(f"# Command line\n\n{app.info.help} Made from the commands by `make docs`: do not edit.")
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        if not command.hidden:
            arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
            print(f"\n## {' '.join(['consa', name, *arguments])}\n\n{inspect.getdoc(command.callback)}\n")
            print("\n".join(described(parameter) for parameter in command.params))


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _name_of(where: RunConfig, config: LearnConfig) -> str:
    """A run folder's name: the same command finds its folder again."""
    model = _model_name(where)
    size = f"{config.sparsity:g}" if config.kv_budget is None else f"{config.kv_budget}B"
    return f"{model}-{config.granularity}-{size}-w{config.window}-seed{config.seed}"


def _model_name(where: RunConfig) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(where.model).name) or "model"


def _run(where: RunConfig, config: LearnConfig, folder: Path, command: str, tensorboard: bool) -> None:
    """Run, then show the table."""
    where.start_for(config)  # says what is wrong before anything heavy is imported
    from consa.runs.runs import run_learning

    summary = run_learning(where, config, folder, command=command, tensorboard=tensorboard)
    made = ("model",) if config.mode == "joint" else ()
    _show_losses(summary, folder, "allocation.json", *made, "heatmap.png", "summary.md")


def _show_losses(summary: dict[str, Any], folder: Path, *names: str) -> None:
    """What a run found, and where it is; nothing from the other processes of a distributed run."""
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
