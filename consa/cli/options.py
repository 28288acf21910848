"""Command-line options made from config dataclasses, so that defaults and help are stated once."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo


def with_fields_of(*configs: type, only: tuple[str, ...] = ()) -> Callable[..., Callable[..., None]]:
    """Give a command an option for every field of the dataclasses; a field without default becomes an argument.

    The command receives them in its `**options`. A field's metadata holds its "help".

    Args:
        configs: the dataclasses.
        only: names of the fields to take; all if empty.
    """
    made = [
        _parameter(field, get_type_hints(config)[field.name])
        for config in configs
        for field in fields(config)
        if not only or field.name in only
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        # Arguments first: help lists parameters in this order.
        command.__signature__ = inspect.Signature(sorted([*made, *own], key=_is_option))  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return decorate


def _is_option(parameter: inspect.Parameter) -> bool:
    return not any(
        isinstance(extra, ArgumentInfo) for extra in getattr(parameter.annotation, "__metadata__", ())
    )


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    members = [member for member in (get_args(kind) or (kind,)) if member is not type(None)]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if len(members) == 1 and get_origin(members[0]) is Literal:  # Literal[...] | None
        choices = get_args(members[0])
    details: dict[str, Any] = {
        "help": field.metadata["help"],
        "show_default": field.default not in (None, MISSING),
    }
    name = f"--{field.name.replace('_', '-')}"
    if field.default is MISSING:
        annotation = Annotated[kind, typer.Argument(metavar=field.name.upper(), **details)]
    elif choices:  # taken as text, so that the dataclass says what is wrong with a bad one
        kind = str if field.default is not None else str | None
        annotation = Annotated[kind, typer.Option(name, metavar="|".join(choices), **details)]
    elif kind is bool:
        annotation = Annotated[kind, typer.Option(f"{name}/--no-{name[2:]}", **details)]
    elif field.metadata.get("unit") == "bytes":
        annotation = Annotated[kind, typer.Option(name, parser=num_bytes, metavar="BYTES", **details)]
    elif members[0] is str:
        annotation = Annotated[kind, typer.Option(name, metavar="TEXT", **details)]
    else:
        annotation = Annotated[kind, number(name, kind=members[0], **details)]
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if field.default is MISSING else field.default,
        annotation=annotation,
    )


def number(*names: str, kind: type = int, **details: Any) -> Any:
    """An option for a number; unlike typer's own, it names a value that is none."""

    def parse(text: Any) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            wanted = "an integer" if kind is int else "a number"
            raise typer.BadParameter(f"must be {wanted}, got {text!r}") from error

    return typer.Option(*names, parser=parse, metavar=kind.__name__.upper(), **details)


def num_bytes(text: Any) -> int:
    """Parse a size such as 2GiB, 512MB or 1000000.

    Raises:
        BadParameter: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", str(text).strip().lower())
    if not match:
        raise typer.BadParameter(f"must be a size such as 2GiB, 512MB or 1000000, got {text!r}")
    amount, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** (" kmgt".index(prefix) if prefix else 0)
    return int(float(amount) * unit) if "." in amount else int(amount) * unit


def from_options(options: dict[str, Any], *configs: type) -> list[Any]:
    """What a command received, as one instance of each of the dataclasses."""
    return [config(**{field.name: options[field.name] for field in fields(config)}) for config in configs]


def command_line(verb: str, *configs: Any) -> str:
    """The command that gives these settings, without what is default anyway."""
    words = ["consa", verb]
    for config in configs:
        for field in fields(config):
            value = getattr(config, field.name)
            name = f"--{field.name.replace('_', '-')}"
            if field.default is MISSING:
                words.append(str(value))
            elif value != field.default:
                flag = [name if value else f"--no-{name[2:]}"]
                words += flag if isinstance(value, bool) else [name, str(value)]
    return shlex.join(words)


def described(parameter: Any) -> str:
    """An option or argument of a command, as an item of a Markdown list."""
    if parameter.param_type_name == "argument":
        return f"- `{parameter.metavar}`: {parameter.help}"
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    has_default = parameter.default is not None and parameter.default is not False
    default = (
        f" (default `{parameter.default}`)" if has_default else " (required)" if parameter.required else ""
    )
    return f"- `{names}{value}`: {parameter.help}{default}"
