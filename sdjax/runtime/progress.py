"""A progress bar in terminals and notebooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdjax.notebooks.cell import is_notebook


@contextmanager
def bar(total: int, show: bool) -> Iterator[Callable[[], None] | None]:
    """A function that advances a bar of `total` steps on stderr, in a notebook inside the cell; None unless show, in a
    terminal or a notebook."""
    if show and is_notebook():
        from sdjax.notebooks.progress import Bar

        yield Bar(total).advance
    elif not show or not (console := _console()):
        yield None
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=total)
            yield lambda: progress.advance(task)


def _console():
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal else None
