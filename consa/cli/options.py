"""Command-line options generated from config dataclasses, so that defaults, help and bounds are stated once."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import ArgumentInfo

from consa.config import FORMER_NAMES, EvalConfig
from consa.errors import ConsaError
from consa.settings import Kind, help_of, kinds, option_name

if TYPE_CHECKING:
    from consa.allocation import Allocation

FORMER_OPTIONS = {
    f"--{no}{old.replace('_', '-')}": f"--{no}{new.replace('_', '-')}"
    for old, new in FORMER_NAMES.items()
    for no in ("", "no-")
}
"""Former names of options, which commands still take and help does not list -> their present names."""


def with_fields_of(*configs: type, only: tuple[str, ...] = ()) -> Callable[..., Callable[..., None]]:
    """Give a command's `**options` every field of the dataclasses (or `only` some); without default, as arguments."""
    made = [
        _parameter(item, kinds(config)[item.name])
        for config in configs
        for item in fields(config)
        if not only or item.name in only
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        # Arguments first: help lists parameters in this order.
        command.__signature__ = inspect.Signature(sorted([*made, *own], key=_is_option))  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return decorate


def _is_option(parameter: inspect.Parameter) -> bool:
    return not any(isinstance(extra, ArgumentInfo) for extra in getattr(parameter.annotation, "__metadata__", ()))


def _parameter(item: Field[Any], kind: Kind) -> inspect.Parameter:
    details: dict[str, Any] = {
        "help": help_of(item),
        "show_default": item.default not in (None, MISSING),
        "rich_help_panel": item.metadata["group"],
    }
    names = [option_name(name) for name in (item.name, item.metadata["alias"]) if name]
    value_type: Any = kind.type | None if kind.optional else kind.type
    if item.default is MISSING:
        extra = typer.Argument(metavar=item.name.upper(), help=details["help"])
    elif kind.type is bool:
        extra = typer.Option(*(f"{name}/--no-{name[2:]}" for name in names), **details)
    elif item.metadata["unit"] == "bytes":
        extra = typer.Option(*names, parser=num_bytes, metavar="BYTES", **details)
    elif kind.type is str:  # choices too, so that the dataclass can name a bad one
        extra = typer.Option(*names, metavar="|".join(kind.choices) or "TEXT", **details)
    else:
        extra = number(*names, kind=kind.type, words=kind.choices, **details)
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if item.default is MISSING else item.default,
        annotation=Annotated[value_type, extra],
    )


HEADINGS = {"argument": "Arguments", "basic": "Options"} | {
    name: f"{name.capitalize()} options" for name in ("data", "speed", "solver")
}


def by_group(parameters: list[Any]) -> dict[str, list[Any]]:
    """The parameters of a command under the headings of its help, in order; empty groups are left out."""
    of = ["argument" if p.param_type_name == "argument" else p.rich_help_panel or "basic" for p in parameters]
    members = {name: [p for p, own in zip(parameters, of, strict=True) if own == name] for name in HEADINGS}
    return {HEADINGS[name]: some for name, some in members.items() if some}


def number(*names: str, kind: type = int, words: tuple[str, ...] = (), **details: Any) -> Any:
    """An option for a number or one of some words; unlike typer's own, its error names the bad value."""

    def parse(text: Any) -> Any:
        try:
            return text if text in words else kind(text)
        except ValueError as error:
            wanted = " or ".join([*words, "an integer" if kind is int else "a number"])
            raise typer.BadParameter(f"must be {wanted}, got {text!r}") from error

    return typer.Option(*names, parser=parse, metavar="|".join([kind.__name__.upper(), *words]), **details)


def num_bytes(text: Any) -> int:
    """Parse a size such as 2GiB, 512MB or 1000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", str(text).strip().lower())
    if not match:
        raise typer.BadParameter(f"must be a size such as 2GiB, 512MB or 1000000, got {text!r}")
    amount, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** (" kmgt".index(prefix) if prefix else 0)
    return int(float(amount) * unit) if "." in amount else int(amount) * unit


def from_options(options: Mapping[str, Any], *configs: type) -> list[Any]:
    """The options that a command received, as one instance of each of the dataclasses."""
    return [config(**{field.name: options[field.name] for field in fields(config)}) for config in configs]


def text(metavar: str, help: str, *names: str, **details: Any) -> Any:
    """An option for text or a path."""
    return typer.Option(*names, metavar=metavar, help=help, **details)


Out = Annotated[Path | None, text("FOLDER", "Folder for the results. Default: a folder under runs/.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Also write the metrics for TensorBoard.")]
Wandb = Annotated[bool, typer.Option("--wandb", help="Also send the metrics to Weights & Biases.")]
Chosen = Annotated[
    str | None,
    text(
        "NAME",
        "Allocation: an allocation.json, the folder of a run, the name of a published allocation or of a rule,"
        " dense, all_swa, or a .tsv of DuoAttention or PruLong. Without it, an error lists the names for MODEL.",
        "--allocation",
    ),
]
RULE_FIELDS = ("sparsity", "granularity", "window", "num_sink_tokens")  # of EvalConfig, for allocations that are rules


def boards(*, tensorboard: bool, wandb: bool) -> tuple[str, ...]:
    """The names in `consa.runs.display.BOARDS` of what was asked for."""
    return ("tensorboard",) * tensorboard + ("wandb",) * wandb


def existing(path: Path | None) -> Path | None:
    """Return a path that the user named, or refuse one that does not exist."""
    if path is not None and not os.path.exists(path):
        raise ConsaError(f"{path} does not exist; check the path")
    return path


Converted = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder that `consa convert` wrote.", callback=existing)
]


def _known_dtype(name: str | None) -> str | None:
    if name not in (None, "float32", "bfloat16"):
        raise ConsaError(f"dtype must be float32 or bfloat16, got {name!r}")
    return name


Device = Annotated[str | None, text("DEVICE", "Device, for example cpu or cuda:1. Default: the GPU if there is one.")]
SavedDtype = Annotated[
    str | None,
    text("float32|bfloat16", "Dtype of the model's weights. Default: as they are saved.", callback=_known_dtype),
]


DEFAULTS = "consa.defaults"  # key of a context's meta: names of options that the run of another command passed on


def was_given(ctx: typer.Context, name: str) -> bool:
    """Whether the user typed an option, or a file of settings holds it for this command."""
    source = ctx.get_parameter_source(name)
    in_file = source is not None and source.name == "DEFAULT_MAP" and name not in ctx.meta.get(DEFAULTS, ())
    return in_file or (source is not None and source.name == "COMMANDLINE")


def chosen(ctx: typer.Context, name: str | None, model: str, config: EvalConfig) -> Allocation:
    """Return the allocation that --allocation names, before MODEL is loaded; `config` holds the options of rules.

    Raises:
        ConsaError: as `consa.evaluation.suite.named`, or an option that the named allocation would ignore.
    """
    from consa import rules
    from consa.evaluation.suite import ALL_SWA, file_of, named, names_for
    from consa.model.load import read_layout

    if name is None:
        raise ConsaError(f"--allocation is missing: give a file or one of {', '.join(names_for(model))}")
    used = RULE_FIELDS if name in (ALL_SWA, *rules.RULES) else RULE_FIELDS[2:] if name.endswith(".tsv") else ()
    for field in RULE_FIELDS:
        if was_given(ctx, field) and field not in used:
            typed = option_name(field)
            raise ConsaError(f"{typed} applies to rules, and the allocation {name!r} is none; it keeps its own")
    file_of(name, model)
    layout = read_layout(model)
    found = named(name, model, layout, config)
    return found or rules.dense(*layout.shape, native_windows=layout.native_windows)
