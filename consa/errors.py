"""Errors that a user can trigger."""


class ConsaError(ValueError):
    """An error that a user can trigger: one line with the bad value and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # quoted values may contain line breaks


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def missing_extra(what: str, extra: str, error: BaseException | None = None) -> ConsaError:
    """The error for `what` needing packages of one of consa's extras that are not installed."""
    detail = f" ({first_line(error)})" if error else ""
    return ConsaError(f"{what} needs a package that is missing{detail}; run: pip install 'consa[{extra}]'")


class UnsupportedModelError(ConsaError):
    """consa cannot take over this model's attention exactly; the message names the model and the reason."""


class InvalidAllocationError(ConsaError):
    """An allocation that is inconsistent, or was made for another model; the message names the field."""
