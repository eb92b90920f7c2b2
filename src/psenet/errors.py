"""The exceptions that mean "what you gave cannot be used" and "another process says what is wrong"."""


class InputError(ValueError):
    """Bad input from the user: a model, data, budget, path or setting that cannot be used.

    The message says what must hold, what came, where, and what to do. The command line prints it without a
    traceback and exits with code 2; every other exception is a failure of psenet and exits with code 1.
    """


class ElsewhereError(RuntimeError):
    """The main one of several processes that train together has failed; it says why, and this one stops, too."""


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message, shortened, to be part of another message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
