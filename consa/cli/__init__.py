"""The command line."""


def main() -> None:
    """The entry point of `consa`."""
    from consa.cli import commands

    commands.main()
