"""What is shown in cells: places, progress, previews, tables. IPython is stood in for."""

import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from sdjax.notebooks import Previews, tables
from sdjax.notebooks.cell import Place, is_notebook
from sdjax.notebooks.progress import drawn
from sdjax.runtime import progress

COUNTS = itertools.count(1)  # of the cells that are run


@pytest.fixture
def cell(monkeypatch):
    """The kernel of a notebook, whose `outputs` are lists of what was shown in each place of all cells."""
    outputs = []
    shell = SimpleNamespace(kernel=object(), execution_count=next(COUNTS))

    def display(thing, display_id):
        assert display_id is True
        outputs.append([thing])
        return SimpleNamespace(update=outputs[-1].append)

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython, module.display = (lambda: shell), display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return SimpleNamespace(shell=shell, outputs=outputs)


def run(steps):
    with progress.bar(steps, show=True) as advance:
        for _ in range(steps):
            advance()


def test_there_is_no_notebook_without_a_kernel(cell, monkeypatch):
    assert is_notebook()
    cell.shell.kernel = None
    assert not is_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not is_notebook()
    Place().show("nothing")
    assert cell.outputs == []


def test_a_place_is_shown_anew(cell):
    place = Place()
    place.show("a")
    place.show("b")
    Place().show("c")
    assert cell.outputs == [["a", "b"], ["c"]]


def test_progress_is_a_bar_of_html_and_of_text(cell):
    run(3)
    [bar] = cell.outputs
    assert '<progress value="0" max="3"' in bar[0]._repr_html_()
    assert '<progress value="3" max="3"' in bar[-1]._repr_html_()
    assert repr(bar[-1]).startswith("3/3 steps, 0.")


def test_there_is_no_bar_on_request(cell):
    with progress.bar(3, show=False) as advance:
        assert advance is None
    assert cell.outputs == []


def test_the_bars_of_a_cell_share_a_place(cell):
    run(1)
    run(2)
    cell.shell.execution_count = next(COUNTS)
    run(3)
    assert [repr(place[-1])[:3] for place in cell.outputs] == ["2/2", "3/3"]


def test_a_bar_says_what_is_left():
    assert drawn(5, 20, 10.0).text == "5/20 steps, 10.0 s, 30.0 s left"
    assert drawn(0, 20, 0.0).text == "0/20 steps, 0.0 s"
    assert drawn(20, 20, 40.0).text == "20/20 steps, 40.0 s"


def pictures(step, count):
    return lambda: [Image.new("RGB", (48, 32), (step, index, 0)) for index in range(count)]


def test_previews_replace_each_other(cell):
    previews = Previews(every=4)
    for step in range(1, 11):
        previews(step, 10, pictures(step, 1))
    [shown] = cell.outputs
    assert [image.getpixel((0, 0))[0] for image in shown] == [4, 8, 10]
    assert [*previews.images] == [4, 8, 10]
    assert previews.sheet.width > 3 * 48
    previews(1, 1, pictures(1, 5))
    assert len(cell.outputs) == 2
    assert [*previews.images] == [1]


def test_previews_show_all_pictures_of_a_call(cell):
    Previews()(1, 1, pictures(1, 5))
    [[sheet]] = cell.outputs
    colors = {color for _, color in sheet.getcolors(1 << 16)}
    assert {(1, index, 0) for index in range(5)} <= colors


def test_previews_are_decoded_only_when_they_are_due(cell):
    def never():
        raise AssertionError

    Previews(every=3)(2, 10, never)
    with pytest.raises(ValueError, match="every: 1 step or more, not 0"):
        Previews(every=0)


def test_a_table_is_escaped():
    page = tables.html("Title", [("name", "a < b", "c & d")])
    assert "<b>Title</b>" in page
    assert ">name</th>" in page
    assert ">a &lt; b</td>" in page
    assert ">c &amp; d</td>" in page
