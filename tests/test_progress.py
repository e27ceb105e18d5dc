"""The progress bar: there in a terminal, not elsewhere, and off on request."""

import io

import pytest
from rich.console import Console

from sdjax.batch import report
from sdjax.batch.progress import Tally, Written
from sdjax.runtime import progress


@pytest.fixture
def terminal(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(progress, "_console", lambda: Console(file=output, force_terminal=True, width=100))
    return output


def test_a_bar_counts_to_the_end_in_a_terminal(terminal):
    with progress.bar(3, show=True) as advance:
        for _ in range(3):
            advance()
    assert "3/3" in terminal.getvalue()


def test_there_is_none_on_request_or_without_a_terminal(terminal, monkeypatch):
    with progress.bar(3, show=False) as advance:
        assert advance is None
    monkeypatch.undo()
    with progress.bar(3, show=True) as advance:
        assert advance is None
    assert terminal.getvalue() == ""


def test_colours_that_are_asked_for_make_no_terminal(monkeypatch, capsys):
    """As the kernels of notebooks do, for the processes that they start."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.bar(3, show=True) as advance:
        assert advance is None
    with report.live() as on_progress:
        on_progress(Tally(10, 1, str).add(Written("0", [], 5, 0, [])))
    assert capsys.readouterr().err == "5 of 10 pictures\n"
