"""`psenet`: the entry point, and what becomes of errors."""

import functools
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from psenet.cli import bench, compare, env, export, finetune, init, inspect, prune, report, search, train
from psenet.errors import ElsewhereError, InputError, one_screen
from psenet.masking import without_passwords

USER_MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130


class _StoppedError(Exception):
    """Ctrl-C in a subcommand."""


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """Carry Ctrl-C past typer, which would end the program without a word."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
            _part()
        except KeyboardInterrupt as error:
            raise _StoppedError from error

    return run


def _part() -> None:
    """Part from the processes that this one was started with, if any."""
    from psenet import ranks

    ranks.leave()


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a convolutional network smaller by choosing how many channels each layer keeps.",
)
for command in (
    *(prune.prune, init.init, inspect.inspect),
    *(train.train, search.search, finetune.finetune, export.export),
    *(bench.bench, compare.compare, report.report, env.env),
):
    app.command(command.__name__)(_stoppable(command))


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the full traceback of an error (before the subcommand)."),
) -> None:
    """Take the options that stand before the subcommand."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors become one message and an exit code.

    Exit codes: 2 for what the user can mend, 1 for a failure, 130 for Ctrl-C. `psenet --debug ...` shows the traceback
    besides and changes nothing else.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    try:
        app(arguments, standalone_mode=True, obj=without_passwords(shlex.join(["psenet", *arguments])))
    except _StoppedError:
        print("\nstopped; what is finished is kept: the same command with --resume continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except InputError as error:
        _tell(f"psenet: {one_screen(str(error))}", debug=debug)
        sys.exit(USER_MISTAKE)
    except ElsewhereError:
        if debug:
            raise
        sys.exit(FAILURE)
    except Exception as error:  # the last stop before the terminal
        _tell(f"psenet: {type(error).__name__}: {one_screen(str(error))}", debug=debug)
        if isinstance(error, OSError):
            print("psenet: what is finished is kept; once that is mended, --resume continues", file=sys.stderr)
        if not debug:
            print("psenet: `psenet --debug ...` shows where it came from", file=sys.stderr)
        sys.exit(FAILURE)


def _tell(message: str, *, debug: bool) -> None:
    """Print the message of the exception at hand, below its traceback where that is wanted."""
    text = f"{traceback.format_exc()}{message}" if debug else message
    print(without_passwords(text), file=sys.stderr)
