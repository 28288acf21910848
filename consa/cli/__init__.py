"""The command line."""

from consa.cli.commands import main as main
