"""How commands speak on a terminal: errors in one line, quiet libraries, help in groups, results as tables."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from consa.cli.options import FORMER_OPTIONS, by_group
from consa.errors import ConsaError

UsageError: Any = typer.BadParameter.__base__  # typer does not export it, and its click may be its own


# Remedies for too little memory: options of the command.
LIGHTER = {
    "adapt": "lower --micro-batch or --seq-len, or turn on --gradient-checkpointing",
    "behaviour": "lower --seq-len",
    "bench": "choose shorter --contexts or smaller --batch-sizes",
    "eval": "lower --batch-size, --seq-len or --lengths",
    "generate": "shorten the prompt",
    "learn": "lower --micro-batch or --seq-len, or turn on --gradient-checkpointing",
    "sweep": "lower --micro-batch, --batch-size, --seq-len or --lengths",
}
RESUMING = ("adapt", "demo", "learn", "sweep")
NAMES = 26  # width of the column of option names in help; longer names take a line of their own
INTERRUPTED = 130  # what shells say of a command that Ctrl-C has ended


class Command(TyperCommand):
    """A command whose help lists its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of each group under its heading."""
        for heading, parameters in by_group(self.get_params(ctx)).items():
            rows = [_help_row(row) for p in parameters if (row := p.get_help_record(ctx))]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows, col_max=NAMES)


def _help_row(row: tuple[str, str]) -> tuple[str, str]:
    """A row of help without the former names of options, nor the --no-... of a flag that is off by default."""
    names, text = row
    if "[default: no-" in text:
        names, text = names.partition(" / ")[0], text.partition("  [default: no-")[0]
    parts = [part.split(", ") for part in names.split(" / ")]
    kept = [", ".join(name for name in part if name not in FORMER_OPTIONS) for part in parts]
    return " / ".join(kept), text.replace("  [default:", " [default:")


class Commands(TyperGroup):
    """The group of all commands: turns errors that a user can trigger into one line on stderr and an exit code."""

    _interrupted: str | None = None  # the command that was

    def main(self, *args: Any, **options: Any) -> Any:
        """Parse, run, exit: 2 for what a command line gets wrong."""
        _quieten()
        try:
            status = super().main(*args, **options | {"standalone_mode": False})
        except UsageError as error:
            message = str(error.format_message()).rstrip(".")
            if "unexpected extra argument" in message:
                message = f"{message[:120]}; put quotes around a pattern such as 'texts/*.txt', or the shell expands it"
            elif "No such option" in message and error.ctx is not None and error.ctx.info_name == "serve":
                message = f"{message}; write options of `vllm serve` after --: consa serve FOLDER -- --port 8001"
            status = fail(message, 2)
        except typer.Abort:
            status = INTERRUPTED
        if status == INTERRUPTED:  # in a command, or in typer around it
            goes_on = "; the same command resumes from its last checkpoint" if self._interrupted in RESUMING else ""
            fail(f"interrupted{goes_on}", INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, then the commands of each group under its heading."""
        with formatter.section("Options"):
            formatter.write_dl([row for p in self.get_params(ctx) if (row := p.get_help_record(ctx))])
        shown: list[Any] = [command for command in self.commands.values() if not command.hidden]
        for group in dict.fromkeys(command.rich_help_panel for command in shown):
            members = [command for command in shown if command.rich_help_panel == group]
            with formatter.section(group):
                formatter.write_dl([(command.name, command.get_short_help_str(200)) for command in members])

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what it raises becomes a line."""
        try:
            return super().invoke(ctx)
        except ConsaError as error:
            raise typer.Exit(fail(_as_typed(str(error), self.commands.get(ctx.invoked_subcommand)), 2)) from None
        except KeyboardInterrupt:
            self._interrupted = ctx.invoked_subcommand
            raise typer.Exit(INTERRUPTED) from None
        except UnicodeEncodeError as error:  # half a surrogate pair stands for a byte of a name that is not UTF-8
            advice = "rename the file or folder to a name in UTF-8"
            raise typer.Exit(fail(f"a library cannot take the name {error.object!r}; {advice}", 2)) from None
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            raise typer.Exit(fail(f"{error.filename or 'the system'}: {error.strerror or error}", 2)) from None
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            advice = LIGHTER.get(ctx.invoked_subcommand, "use a machine with more")
            raise typer.Exit(fail(f"out of memory; {advice}", 2)) from None


def _as_typed(message: str, command: Any) -> str:
    """The message with options in place of the settings that it names; a name of one word only where it begins it."""
    for parameter in command.params if command else ():
        if parameter.param_type_name == "option":
            name, typed = parameter.name, parameter.opts[0]
            # Not within values, which stand in quotes or are paths.
            pattern = rf"(?<![\w./'\"-]){name}(?![\w./'\"-])" if "_" in name else rf"^{name}(?= must| is | \+| ')"
            message = re.sub(pattern, typed, message)
    return message


def fail(message: str, status: int) -> int:
    """Say what went wrong in a line on stderr; returns the exit status as given."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError by name, since torch is not imported here; other allocators have no class of their own.
    messages = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or any(text in str(error) for text in messages)


def _quieten() -> None:
    """Keep messages of libraries off the terminal; consa's warnings become one line each."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its talk of retries, where there is no network
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks; consa uses threads
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"consa\b")
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)


def show(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; what was learned stands out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(columns[0], box=box.SIMPLE_HEAD)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "learned" else None)
    # A file or a pipe has no width that a table would have to be cut to.
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 400).print(table)
