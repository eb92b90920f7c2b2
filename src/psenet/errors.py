"""The exceptions that mean "what you gave cannot be used" and "another process says what is wrong"."""

_MAX_LINES, _MAX_CHARACTERS = 16, 1600
"""Of a message on a terminal: a screen of 20 lines of 100 characters, less what stands around it."""


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


def one_screen(message: str) -> str:
    """Return a message cut to what fits on a screen; what it leaves out is said to be left out.

    Messages end with what others have said, such as torch on a state dict that does not fit: of any length.

    Example:
        >>> one_screen("short")
        'short'
    """
    lines = message.strip().splitlines()
    text = "\n".join(lines[:_MAX_LINES])
    if len(text) > _MAX_CHARACTERS or len(lines) > _MAX_LINES:
        return f"{text[:_MAX_CHARACTERS].rstrip()} ... (cut; `psenet --debug ...` shows all of it)"
    return text
