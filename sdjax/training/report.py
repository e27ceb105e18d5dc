"""How far a run is, on stderr: a live line in a terminal, elsewhere a line now and then."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdjax.runtime.progress import duration
from sdjax.training.steps import Progress

PARTS = 20  # lines of a whole run without a terminal

Report = Callable[[Progress | str], None]
"""of the progress, or of what is done before and between steps"""


def line(progress: Progress) -> str:
    """step 120 of 1,000, loss 0.1234, 2.31 steps a second, 6 min 20 s left"""
    parts = [f"step {progress.step:,} of {progress.steps:,}", f"loss {progress.loss:.4f}"]
    if progress.per_second:
        parts += [f"{progress.per_second:.3g} steps a second", f"{duration(progress.seconds_left)} left"]
    return ", ".join(parts)


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[Report]:
    """A function that keeps the line up to date; quiet: there is none."""
    if quiet:
        yield lambda progress: None
        return
    if not sys.stderr.isatty():  # rich takes FORCE_COLOR for one, which kernels of notebooks set
        yield _Sparse()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:

        def report(progress: Progress | str) -> None:
            text = progress if isinstance(progress, str) else line(progress)
            live.update(Text(text, no_wrap=True, overflow="ellipsis"))

        yield report


class _Sparse:
    """The first step, one in each part of the run, the last; and each other text that begins as no earlier one does."""

    def __init__(self) -> None:
        self._part, self._last = -1, ""

    def __call__(self, progress: Progress | str) -> None:
        if isinstance(progress, str):
            text, kind = progress, progress.rpartition(" ")[0]
            if kind != self._last:
                print(text, file=sys.stderr, flush=True)
            self._last = kind
            return
        part = PARTS * progress.step // progress.steps
        if part > self._part:
            self._part = part
            print(line(progress), file=sys.stderr, flush=True)
