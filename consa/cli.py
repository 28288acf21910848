"""The command line: one thin command per verb. What is heavy is imported inside the commands, so help is instant."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

import consa
from consa.config import LearnConfig, RunConfig
from consa.errors import ConsaError


class _Commands(TyperGroup):
    """Turns whatever a user can cause into one line on stderr and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        _quieten()
        try:
            status = super().main(*args, **options | {"standalone_mode": False})
        except typer.BadParameter.__mro__[1] as error:  # UsageError, whichever click this typer uses
            status = _fail(str(error.format_message()).rstrip("."), 2)
        except typer.Abort:
            status = 1
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConsaError as error:
            raise typer.Exit(_fail(str(error), 2)) from None
        except KeyboardInterrupt:
            raise typer.Exit(_fail("interrupted; the same command continues where it was", 130)) from None
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            advice = "lower --micro-batch or --seq-len, or turn on --activation-checkpointing"
            raise typer.Exit(_fail(f"out of memory; {advice}", 2)) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(consa.__doc__ or "").partition("\n")[0],
)


def main() -> None:
    """The entry point of `consa`."""
    app(prog_name="consa")


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError by name, since torch is not imported here; the CPU's allocator has no class of its own.
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(
        error
    )


def _quieten() -> None:
    """Keep the libraries' own talk off the terminal; consa's warnings become one line each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks; consa uses threads
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"consa\b")
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)


# Options from dataclasses.


def num_bytes(text: str) -> int:
    """Parse a size such as 2GiB, 512MB or 1000000.

    Raises:
        BadParameter: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    if not match:
        raise typer.BadParameter(f"must be a size such as 2GiB, 512MB or 1000000, got {text!r}")
    number, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** (" kmgt".index(prefix) if prefix else 0)
    return int(float(number) * unit) if "." in number else int(number) * unit


PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {"kv_budget": (num_bytes, "BYTES")}


def _with_fields_of(*configs: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of the dataclasses; a field without default becomes an argument.

    The command's keyword argument `**options` receives them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        signature = [
            *(
                _parameter(field, get_type_hints(config)[field.name])
                for config in configs
                for field in fields(config)
            ),
            *(p for p in own if p.kind is not p.VAR_KEYWORD),
        ]
        signature = [p.replace(kind=p.KEYWORD_ONLY) for p in signature]
        command.__signature__ = inspect.Signature(signature)  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return decorate


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    parser, metavar = PARSERS.get(field.name, (None, None))
    choices = [member for member in (kind, *get_args(kind)) if get_origin(member) is Literal]
    if choices:  # as text, so that the dataclass says what is wrong with a bad one, in one line
        metavar, kind = "|".join(get_args(choices[0])), str if field.default is not None else str | None
    help_text = field.metadata["help"]
    if field.default is MISSING:
        annotation = Annotated[
            kind, typer.Argument(help=help_text, metavar=field.name.upper(), show_default=False)
        ]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    name = f"--{field.name.replace('_', '-')}"
    if kind is bool:
        name = f"{name}/--no-{name[2:]}"
    option = typer.Option(
        name, help=help_text, parser=parser, metavar=metavar, show_default=field.default is not None
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[kind, option],
    )


def _split(options: dict[str, Any], *configs: type) -> list[Any]:
    """The options, as one instance of each of the dataclasses."""
    return [config(**{field.name: options[field.name] for field in fields(config)}) for config in configs]


def _command_line(verb: str, *configs: Any) -> str:
    """The command that gives these settings, without what is default anyway."""
    words = ["consa", verb]
    for config in configs:
        for field in fields(config):
            value = getattr(config, field.name)
            name = f"--{field.name.replace('_', '-')}"
            if field.default is MISSING:
                words.append(str(value))
            elif value != field.default:
                words += (
                    [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
                )
    return shlex.join(words)


# Commands.

Out = Annotated[
    Path | None, typer.Option(help="folder for the results; under runs/ unless given", show_default=False)
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
@_with_fields_of(RunConfig, LearnConfig)
def learn(*, out: Out = None, tensorboard: Tensorboard = False, ctx: typer.Context, **options: Any) -> None:
    """Learn which layers or KV heads of MODEL keep full attention, and measure it beside every rule."""
    if options["kv_budget"] is not None and _was_given(ctx, "sparsity"):
        raise ConsaError("sparsity and kv_budget set the same thing; give one of them")
    where, config = _split(options, RunConfig, LearnConfig)
    folder = out or Path("runs") / _name_of(where, config)
    _run(where, config, folder, _command_line("learn", where, config), tensorboard)


@app.command()
def demo(
    out: Out = None,
    seed: Annotated[int, typer.Option(help="of the gates' noise and the order of the text")] = 0,
    tensorboard: Tensorboard = False,
) -> None:
    """Learn and measure KV heads of a real 135M model, small, on Python's own sources: 10 minutes on a laptop CPU."""
    config = replace(DEMO_LEARN, seed=seed)
    folder = out or Path("runs") / ("demo" if seed == 0 else f"demo-seed{seed}")
    _run(DEMO_RUN, config, folder, f"consa demo --seed {seed}", tensorboard)


DEMO_RUN = RunConfig(model="smollm2-135m", data="stdlib", max_tokens=2**20, num_heldout=7)
DEMO_LEARN = LearnConfig(
    sparsity=0.75,
    granularity="kv_head",
    window=64,
    num_sink_tokens=4,
    seq_len=1024,
    num_steps=60,
    sequences_per_step=1,
)


@app.command()
def rules(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="as in learn; its shape counts")
    ] = None,
    *,
    layers: Annotated[int | None, typer.Option(help="instead of MODEL: its number of layers")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="instead of MODEL: KV heads of each layer")] = None,
    head_dim: Annotated[
        int, typer.Option(help="without MODEL: elements of one head's key, for the cache's size")
    ] = 128,
    sparsity: Annotated[float, typer.Option(help="share of units to put on sliding-window attention")] = 0.75,
    granularity: Annotated[
        str, typer.Option(metavar="layer|kv_head", help="what is decided as one")
    ] = "kv_head",
    window: Annotated[int, typer.Option(help="tokens a sliding-window query sees, itself included")] = 128,
    num_sink_tokens: Annotated[int, typer.Option(help="first tokens visible on top of the window")] = 4,
    seed: Annotated[int, typer.Option(help="of random_units")] = 0,
    context: Annotated[int, typer.Option(help="tokens in the KV cache whose size is shown")] = 32768,
    out: Annotated[Path, typer.Option(help="folder for one JSON file per rule")],
) -> None:
    """Write every rule's allocation for MODEL, or for a model of given shape, and show what each saves."""
    from rich import box
    from rich.table import Table

    from consa.rules import RULES

    # The same limits as in learning, checked in the same place.
    LearnConfig(
        sparsity=sparsity,
        granularity=granularity,  # pyright: ignore[reportArgumentType]
        window=window,
        num_sink_tokens=num_sink_tokens,
        seed=seed,
    )
    if context < 1:
        raise ConsaError(f"context must be an integer >= 1, got {context}")
    native_windows: dict[int, int] = {}
    if (model is None) == (layers is None or kv_heads is None) or (model and (layers or kv_heads)):
        raise ConsaError("give either MODEL, or both --layers and --kv-heads")
    if model is not None:
        from consa.model import read_layout

        layout = read_layout(model)
        layers, kv_heads, head_dim = layout.num_layers, layout.num_kv_heads, layout.head_dim
        native_windows = layout.native_windows
    assert layers is not None and kv_heads is not None
    options = {
        "granularity": granularity,
        "window": window,
        "num_sink_tokens": num_sink_tokens,
        "native_windows": native_windows,
    }
    table = Table("rule", box=box.SIMPLE_HEAD)
    for column in ("sparsity", f"KV cache at {context} tokens", "of dense"):
        table.add_column(column, justify="right")

    def size(allocation: consa.Allocation) -> int:
        return allocation.kv_cache_bytes(context, head_dim=head_dim)

    dense = size(RULES["bottom"](layers, kv_heads, sparsity=0.0, **options))
    allocations = {
        name: rule(
            layers,
            kv_heads,
            sparsity=sparsity,
            **options | ({"seed": seed} if name == "random_units" else {}),
        )
        for name, rule in RULES.items()
        if name != "uniform_heads" or granularity == "kv_head"
    }
    for name, allocation in allocations.items():
        origin = {} if model is None else {"model": model}
        replace(allocation, provenance=origin | dict(allocation.provenance)).save(out / f"{name}.json")
        taken = size(allocation)
        table.add_row(name, f"{allocation.sparsity:.4f}", f"{taken / 2**20:.1f} MiB", f"{taken / dense:.1%}")
    _show(table)
    print(f"{len(allocations)} allocations in {out}")


@app.command(hidden=True)
def cli_docs() -> None:
    """Print this reference as Markdown; docs/cli.md is what it printed last."""
    group = typer.main.get_command(app)
    print("# Command line\n\nMade from the commands by `make docs`; do not edit.")
    for name, command in group.commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        if not command.hidden:
            arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
            print(f"\n## {' '.join(['consa', name, *arguments])}\n\n{inspect.getdoc(command.callback)}\n")
            for p in command.params:
                print(f"- {_described(p)}")


def _described(parameter: Any) -> str:
    """One line about an option or argument, in Markdown."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`: {parameter.help}"
    shown = parameter.default is not None and not (parameter.is_flag and not parameter.secondary_opts)
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    default = f" (default `{parameter.default}`)" if shown else " (required)" if parameter.required else ""
    return f"`{names}`: {parameter.help}{default}"


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _name_of(where: RunConfig, config: LearnConfig) -> str:
    """A run folder's name: the same command finds its folder again."""
    model = re.sub(r"[^\w.-]+", "-", Path(where.model).name) or "model"
    size = f"{config.sparsity:g}" if config.kv_budget is None else f"{config.kv_budget}B"
    return f"{model}-{config.granularity}-{size}-w{config.window}-seed{config.seed}"


def _run(where: RunConfig, config: LearnConfig, folder: Path, command: str, tensorboard: bool) -> None:
    """Run, then show the table."""
    where.start_for(config)  # says what is wrong before anything heavy is imported
    from rich import box
    from rich.table import Table

    from consa.runs import recovered_text, run

    summary = run(where, config, folder, command=command, tensorboard=tensorboard)
    table = Table(
        "allocation",
        box=box.SIMPLE_HEAD,
        title=f"Held-out loss (nats) from position {summary['start']} on;"
        " recovered: share of the gap from all-SWA to dense",
    )
    for column in ("sparsity", "loss", "recovered"):
        table.add_column(column, justify="right")
    for row in summary["rows"]:
        cells = [row["name"], f"{row['sparsity']:.4f}", f"{row['loss']:.4f}", recovered_text(row)]
        table.add_row(*cells, style="bold" if row["name"] == "learned" else None)
    _show(table)
    for name in ("allocation.json", "heatmap.png", "summary.md"):
        print(folder / name)


def _show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)
