"""The one kind of error that is shown without a traceback, and what is shown of others."""

from collections.abc import Iterable


class UserError(ValueError):
    """What the user can mend: a file, an option, a prompt. The message names it and says what is accepted."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, for a message of ours that quotes it."""
    return str(error).strip().partition("\n")[0]


def listed(names: Iterable[object], separator: str = ", ", most: int = 20) -> str:
    """Join names for a message: the first of them, and how many more there are."""
    names = [*map(str, names)]
    more = [f"... and {len(names) - most} more"] if len(names) > most else []
    return separator.join(names[:most] + more)
