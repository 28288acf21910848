"""What a user can cause, and how it is said."""


class ConsaError(ValueError):
    """A request that cannot be met: the message is one line that names the value received and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # values that are quoted may hold line breaks


def first_line(error: BaseException) -> str:
    """What another library's error says first, to be quoted in a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def missing_extra(what: str, extra: str, error: BaseException | None = None) -> ConsaError:
    """What to raise where `what` needs packages of one of consa's extras, which is not installed."""
    detail = f" ({first_line(error)})" if error else ""
    return ConsaError(f"{what} needs a package that is missing{detail}; run: pip install 'consa[{extra}]'")


class UnsupportedModelError(ConsaError):
    """A model whose attention consa cannot take over exactly; the message names the model and the reason."""


class InvalidAllocationError(ConsaError):
    """An allocation that does not add up, or that was made for another model; the message names the field."""
