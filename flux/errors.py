"""The one kind of error that is shown without a traceback."""


class UserError(ValueError):
    """What the user can mend: a file, an option, a prompt. The message names it and says what is accepted."""
