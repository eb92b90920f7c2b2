"""Progress bars with the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    description: str, *, total: int, done: int = 0, show: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Show a progress bar on the terminal.

    Args:
        description: What is going on.
        total: Steps in all.
        done: Steps done before.
        show: False to show nothing.

    Yields:
        `advance(done, note)`: tell how many steps are done and a short note.
    """
    if not show:
        yield lambda done, note: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
