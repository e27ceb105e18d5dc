"""A progress bar in terminals and notebooks."""

import sys
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
    if not sys.stderr.isatty():  # rich takes FORCE_COLOR for one, which kernels of notebooks set
        return None
    from rich.console import Console

    return Console(stderr=True)


def duration(seconds: float) -> str:
    """45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h"""
    whole = round(seconds)
    for big, small, names in ((86400, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        if whole >= big:
            first, second = names.split()
            return f"{whole // big} {first} {whole % big // small} {second}"
    return f"{whole} s"
