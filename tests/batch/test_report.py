"""What is said of a job: the plan, the status, the live line."""

import pytest

from sdjax.batch import report
from sdjax.batch.plan import Estimate
from sdjax.batch.progress import Halved, Kept, Made, Tally, Written


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3725, "1 h 2 min"), (187_200, "2 d 4 h")],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def test_a_tally_counts_what_happens(monkeypatch):
    now = iter(range(100, 200, 2))
    monkeypatch.setattr("sdjax.batch.progress.time.monotonic", lambda: float(next(now)))
    tally = Tally(20, 4, lambda name: f"out/{name}")
    assert tally.add(None).seconds_left is None
    assert tally.add(Kept("a", 8)).done == 8
    for index in range(4):
        progress = tally.add(Made(index))
    assert (progress.done, progress.waiting, progress.per_second, progress.per_device) == (8, 4, 0.5, 0.125)
    assert progress.seconds_left == (20 - 8 - 4) / 0.5
    progress = tally.add(Written("b", ["x.png", "y.png"], 4, 1, []))
    assert (progress.done, progress.waiting, progress.last, tally.nsfw) == (12, 0, "out/y.png", 1)
    assert "12 of 20 pictures" in report._line(progress) and progress.last in report._line(progress)


def test_a_halved_batch_keeps_what_is_made():
    tally = Tally(4, 1, str)
    for event in (Made(0), Made(1), Halved(1), Made(2), Made(3), Written("a", ["x"], 4, 0, [])):
        progress = tally.add(event)
    assert (progress.done, progress.waiting) == (4, 0)


def test_pictures_that_fail_are_neither_done_nor_left(monkeypatch):
    now = iter(range(100, 200, 2))
    monkeypatch.setattr("sdjax.batch.progress.time.monotonic", lambda: float(next(now)))
    tally = Tally(8, 1, str)
    for event in (Made(0), Made(3), Written("a", ["x"], 2, 0, [1, 2]), Written("b", [], 0, 0, [4, 5])):
        progress = tally.add(event)
    assert (progress.done, progress.failed, progress.waiting, progress.last) == (2, 4, 0, "x")
    assert progress.seconds_left == 2 / progress.per_second
    assert tally.failed == [1, 2, 4, 5]


def test_a_plan():
    text = report.plan(Estimate(1000, 16, 125, 2, 1_500_000_000, 7200), 8, 4, "s3://b/out", 4)
    assert [line.split(maxsplit=1)[1] for line in text.splitlines()] == [
        "1,000",
        "125 of 8, 4 at a time",
        "16, 4 of them at s3://b/out already",
        "2",
        "about 1.5 GB",
        "about 1 h 30 min for what is missing",
    ]
