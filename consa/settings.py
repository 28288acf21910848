"""How a setting is declared: its default, help and bounds stand at the field, and one function checks them all."""

from __future__ import annotations

import math
import shlex
import types
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from consa.errors import ConsaError

Group = Literal["basic", "data", "speed", "solver"]
LARGEST = 2**63  # integers stay below: torch and numpy hold no larger ones


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    unit: Literal["bytes"] | None = None,
    group: Group = "basic",
    alias: str | None = None,
) -> Any:
    """A dataclass field that is also an option of the command line.

    Args:
        default: the default value; `None` only for a field whose type allows it; `...` for a required field.
        help: a phrase that can be read alone, with the unit.
        ge: smallest value allowed.
        gt: bound that the value must exceed.
        le: largest value allowed.
        unit: "bytes" lets the command line take sizes such as 2GiB.
        group: heading under which help lists the option.
        alias: former name of the option, which the command line still takes.
    """
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "unit": unit, "group": group, "alias": alias}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Kind:
    """What values a field takes."""

    type: type  # bool, int, float or str
    optional: bool  # whether None is allowed
    choices: tuple[str, ...]  # the words of a Literal, the only values of text, and allowed beside numbers


@cache
def kinds(config: type) -> dict[str, Kind]:
    """The kind of every field of a config dataclass, by name."""
    hints = get_type_hints(config)
    return {item.name: _kind(hints[item.name]) for item in fields(config)}


def _kind(hint: Any) -> Kind:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = tuple(word for one in members if get_origin(one) is Literal for word in get_args(one))
    plain = [one for one in members if isinstance(one, type) and one is not type(None)]
    return Kind(plain[0] if plain else str, type(None) in members, choices)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one subject: fields that `option` declares, checked when they are made.

    Raises:
        ConsaError: a value is out of range; the message names it and what is allowed.
    """

    def __post_init__(self) -> None:
        check(self)


def check(config: Any) -> None:
    """Raise ConsaError if a field of a config dataclass does not fit its type and bounds."""
    known = kinds(type(config))
    for item in fields(config):
        value, kind = getattr(config, item.name), known[item.name]
        if (value is None and kind.optional) or _fits(value, kind, item.metadata):
            continue
        if kind.type is int and isinstance(value, int) and value >= LARGEST:
            raise ConsaError(f"{item.name} must be below 2**63, got {value}")
        raise ConsaError(f"{item.name} must be {_wanted(kind, item.metadata)}, got {value!r}")


def _fits(value: Any, kind: Kind, bounds: Any) -> bool:
    if kind.choices and (isinstance(value, str) or kind.type is str):
        return value in kind.choices
    if kind.type in (bool, str):
        return isinstance(value, kind.type)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind.type is float else int):
        return False
    least, above, most = (bounds.get(name) for name in ("ge", "gt", "le"))
    in_range = (least is None or value >= least) and (above is None or value > above)
    held = value < LARGEST if kind.type is int else math.isfinite(value)
    return in_range and held and (most is None or value <= most)


def _wanted(kind: Kind, bounds: Any) -> str:
    """What a value must be, for a message."""
    if kind.choices and kind.type is str:
        return f"one of {', '.join(kind.choices)}"
    if kind.choices:
        return f"{' or '.join(kind.choices)}, or {_wanted(replace(kind, choices=()), bounds)}"
    if kind.type in (bool, str):
        return "True or False" if kind.type is bool else "text"
    noun = "an integer" if kind.type is int else "a number"
    match bounds.get("ge"), bounds.get("gt"), bounds.get("le"):
        case (0, None, 1) if kind.type is float:
            return "a share in [0, 1]"
        case (None, 0, None) if kind.type is float:
            return "a positive number"
        case (None, None, None):
            return "an integer" if kind.type is int else "a finite number"
        case (least, None, None):
            return f"{noun} >= {least}"
        case _:
            return f"{noun} {' and '.join(_limits(bounds))}"


def _limits(bounds: Any) -> list[str]:
    parts = (("at least", "ge"), ("above", "gt"), ("at most", "le"))
    return [f"{word} {bounds[key]}" for word, key in parts if bounds[key] is not None]


def parse(text: str, kind: Kind, name: str) -> Any:
    """A value of this kind from text; ConsaError, naming the setting, if the text is no such value."""
    if kind.type is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConsaError(f"{name} must be true or false, got {text!r}")
    try:
        return text if text in kind.choices else kind.type(text)
    except ValueError as error:
        wanted = "an integer" if kind.type is int else "a number"
        raise ConsaError(f"{name} must be {wanted}, got {text!r}") from error


def help_of(item: Any) -> str:
    """A field's help, with its bounds after the first sentence: "Optimizer steps (at least 1)."."""
    ge, le = item.metadata["ge"], item.metadata["le"]
    bounds = _limits(item.metadata) if None in (ge, le) else [f"between {ge} and {le}"]
    first, _, rest = item.metadata["help"].partition(". ")
    if bounds:
        first = f"{first.removesuffix('.')} ({', '.join(bounds)})"
    return f"{first.removesuffix('.')}.{' ' * bool(rest)}{rest}"


def words_of(text: str | None) -> tuple[str, ...]:
    """The words of a setting that takes several, separated by commas; each once."""
    return tuple(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))


def option_name(field: str) -> str:
    """The option of a field."""
    return f"--{field.replace('_', '-')}"


def command_line(verb: str, *configs: Any) -> str:
    """The command that gives these settings; defaults are left out."""
    words = ["consa", verb]
    for config in configs:
        for item in fields(config):
            value, name = getattr(config, item.name), option_name(item.name)
            if item.default is MISSING:
                words.append(str(value))
            elif value != item.default:
                flag = [name if value else f"--no-{name[2:]}"]
                words += flag if isinstance(value, bool) else [name, str(value)]
    return shlex.join(words)
