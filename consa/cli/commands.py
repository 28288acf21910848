"""The command line put together: its verbs in groups, `--version`, and the reference in docs/cli.md."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import consa
from consa.cli import learn, look, measure, use
from consa.cli.options import FORMER_OPTIONS, by_group
from consa.cli.settings_file import with_config
from consa.cli.terminal import INTERRUPTED, Command, Commands, fail

VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "Learn": {"learn": learn.learn, "demo": learn.demo, "adapt": learn.adapt},
    "Choose": {"rules": learn.rules, "sweep": learn.sweep},
    "Measure": {"eval": measure.evaluate, "bench": measure.bench, "behaviour": measure.behaviour},
    "Look": {"inspect": look.inspect, "compare": look.compare, "report": look.report},
    "Use": {"convert": use.convert, "generate": use.generate, "serve": use.serve},
}

app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(consa.__doc__ or "").partition("\n")[0],
)
for group, verbs in VERBS.items():
    for verb, function in verbs.items():
        app.command(verb, cls=Command, rich_help_panel=group)(with_config(function))


@app.callback(invoke_without_command=True)
def _consa(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False
) -> None:
    if version:
        print(f"consa {consa.__version__}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command(hidden=True)
def cli_docs() -> None:
    """Print this reference as Markdown; docs/cli.md is what it printed last."""
    print(f"# Command line\n\n{app.info.help} Generated from the commands by `make docs`; do not edit.")
    former = ", ".join(f"`{old}` for `{new}`" for old, new in FORMER_OPTIONS.items() if "--no-" not in old)
    print(f"Former names of options still work: {former}.")
    commands: Any = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for name in (name for names in VERBS.values() for name in names):
        command = commands[name]
        arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
        print(f"\n## {' '.join(['consa', name, *arguments])}\n\n{inspect.getdoc(command.callback)}")
        for heading, parameters in by_group(command.params).items():
            print(f"\n{heading}:\n")
            print("\n".join(_described(parameter) for parameter in parameters))
        if name == "sweep":
            _print_methods()


def _described(parameter: Any) -> str:
    """An option or argument, as an item of a Markdown list."""
    if parameter.param_type_name == "argument":
        return f"- `{parameter.metavar}`: {parameter.help}"
    names = " / ".join(name for name in (*parameter.opts, *parameter.secondary_opts) if name not in FORMER_OPTIONS)
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    has_default = parameter.default is not None and parameter.default is not False
    default = f" (default `{parameter.default}`)" if has_default else " (required)" if parameter.required else ""
    return f"- `{names}{value}`: {parameter.help}{default}"


def _print_methods() -> None:
    """The methods that come with consa, and what `--settings` may change of each."""
    from dataclasses import fields

    from consa.methods import METHODS
    from consa.methods.choice import method_named
    from consa.settings import help_of

    print("\nMethods, with the settings that `--settings` takes:")
    for name in METHODS:
        method = method_named(name)
        print(f"\n`{name}`: {(type(method).__doc__ or '').partition(chr(10))[0]}\n")
        for item in fields(method):
            print(f"- `{name}.{item.name}`: {help_of(item)} (default `{item.default}`)")


def main() -> None:
    """Run the command that was typed."""
    try:
        app(prog_name="consa")
    except KeyboardInterrupt:  # while typer was making the commands
        sys.exit(fail("interrupted", INTERRUPTED))
