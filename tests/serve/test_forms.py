"""Forms of pictures that have compiled programs: not more than so many."""

from sdjax.serve import forms as module
from sdjax.serve.forms import MAPPED, MAPS, Forms


def test_one_too_many_drops_all():
    dropped = []
    forms = Forms(3, lambda: dropped.append(len(forms)), lambda: 0)
    for form in (1, 2, 3, 1, 2, 3):
        forms.use(form)
    assert not dropped
    forms.use(4)
    assert (dropped, len(forms)) == ([3], 1)
    for form in (4, 1, 2):
        forms.use(form)
    assert (dropped, len(forms)) == ([3], 3)


def test_too_many_regions_drop_all(monkeypatch):
    dropped, now = [], [MAPPED]
    forms = Forms(3, lambda: dropped.append(len(forms)), lambda: now[0])
    for form in (1, 2):
        forms.use(form)
    now[0] += 1
    forms.use(2)  # it looked a moment ago
    assert not dropped
    monkeypatch.setattr(module, "LOOK", 0)
    forms.use(2)
    assert (dropped, len(forms)) == ([2], 1)


def test_regions_are_counted(monkeypatch):
    dropped = []
    monkeypatch.setattr(module, "MAPPED", 10)
    Forms(3, lambda: dropped.append(1)).use(1)
    assert bool(dropped) == MAPS.exists()
