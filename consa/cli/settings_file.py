"""`--config FILE`: settings from YAML or JSON, which the command line overrides."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from consa.cli.options import DEFAULTS
from consa.config import with_present_names
from consa.errors import ConsaError, first_line
from consa.files import JsonObject, read_text
from consa.progress import note
from consa.settings import option_name

MAX_BYTES = 2**20
SECTIONS = ("run", "learn", "adapt", "eval", "sweep")  # of the config.json of a run
RECORDS = ("command", "hardware", "versions", "allocations")  # what else stands there, and is not a setting
FILES = ("config.json", "eval-config.json")  # in the folder of a run
SHARED = ("sparsity", "granularity", "window", "num_sink_tokens", "seq_len")  # that a run of another command passes on
HELP = "Options as a YAML or JSON file, or those of a run by its folder. What is typed overrides them."


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option `--config`, which it does not see itself."""
    signature = inspect.signature(command, eval_str=True)
    extra = typer.Option("--config", metavar="FILE", help=HELP, is_eager=True, callback=_read_into)
    given = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, extra]
    )

    @wraps(command)
    def run(*, config: str | None = None, **options: Any) -> None:
        command(**options)

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), given])  # pyright: ignore[reportAttributeAccessIssue]
    return run


def _read_into(ctx: typer.Context, value: str | None) -> str | None:
    """Make the file's settings the defaults of the command; what equals a default counts as not given."""
    if value is None:
        return None
    path = Path(value)
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).exists()), path / FILES[0])
    known = {one.name: one for one in ctx.command.params if one.name not in ("config", "help")}
    record, verb = _parsed(path), str(ctx.info_name)
    own = _flat(record, verb, known, path)
    settings = {name: given for name, given in own.items() if given != known[name].default}
    passed_on = {name: given for name, given in _passed_on(record, verb, known).items() if name not in own}
    if passed_on:
        note(f"Taken from {path}: {', '.join(f'{option_name(name)} {given}' for name, given in passed_on.items())}")
    ctx.default_map = passed_on | settings
    ctx.meta[DEFAULTS] = passed_on.keys()
    return value


def _passed_on(record: JsonObject, verb: str, known: dict[str, Any]) -> JsonObject:
    """What a run of another command says of its sequences and its hybrid: defaults, which files of allocations beat."""
    passed_on: JsonObject = {}
    for section in ("learn", "adapt", "eval", "allocation"):
        values = record.get(section)
        if section not in _own(verb) and isinstance(values, dict):
            passed_on |= {name: values[name] for name in SHARED if name in values and name in known}
            if values.get("kv_budget") is not None:  # which decided the sparsity
                passed_on.pop("sparsity", None)
    if verb == "sweep":  # which asks for several
        passed_on = {name: value for name, value in passed_on.items() if name not in ("sparsity", "granularity")}
    return passed_on


def _own(verb: str) -> tuple[str, ...]:
    return ("run", "eval", "sweep") if verb == "sweep" else ("run", verb)


def _parsed(path: Path) -> JsonObject:
    import yaml

    text = read_text(path, max_bytes=MAX_BYTES)
    try:
        record = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConsaError(f"{path} is neither YAML nor JSON: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise ConsaError(f"{path} must map options to values, got {type(record).__name__}")
    return with_present_names({str(name).removeprefix("--"): value for name, value in record.items()})


def _flat(record: JsonObject, verb: str, known: dict[str, Any], path: Path) -> JsonObject:
    """The settings for one command: its own section and that of the run, as far as it has them, and those outside."""
    settings: JsonObject = {}
    for section in (name for name in _own(verb) if name in SECTIONS):
        values = record.get(section) or {}
        if not isinstance(values, dict):
            raise ConsaError(f"{path}: {section} must hold settings, got {values!r}")
        settings |= {name: value for name, value in values.items() if name in known}
    if verb == "eval" and record.get("allocations"):
        settings["allocation"] = record["allocations"]
    for name, value in record.items():
        if name in (*SECTIONS, *RECORDS) or isinstance(value, dict):
            continue
        if name.replace("-", "_") not in known:
            raise ConsaError(f"{path}: {name!r} is no option of consa {verb}; see consa {verb} --help")
        settings[name.replace("-", "_")] = value
    return {name: _as_typed(value, known[name]) for name, value in settings.items() if value is not None}


def _as_typed(value: Any, parameter: Any) -> Any:
    """A list becomes what the command line takes: words with commas between, unless the option may be repeated."""
    repeated = getattr(parameter, "multiple", False) or parameter.nargs != 1
    if isinstance(value, list):
        return value if repeated else ",".join(map(str, value))
    return [value] if repeated else value
