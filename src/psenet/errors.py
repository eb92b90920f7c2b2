"""The one exception that means "what you gave cannot be used"."""


class InputError(ValueError):
    """Bad input from the user: a model, data, budget, path or setting that cannot be used.

    The message says what must hold, what came, where, and what to do. The command line prints it without a
    traceback and exits with code 2; every other exception is a failure of psenet and exits with code 1.
    """
