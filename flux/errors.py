"""The one kind of error that is shown without a traceback, and what is shown of others."""


class UserError(ValueError):
    """What the user can mend: a file, an option, a prompt. The message names it and says what is accepted."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, for a message of ours that quotes it."""
    return str(error).strip().partition("\n")[0]
