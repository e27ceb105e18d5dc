"""Edges: where they lie, and how it is measured that two pictures have the same."""

import numpy as np
import pytest
from edges import agreement, canny, random_edges


def disc(size=64, radius=20.0, height=1.0):
    """A bright disc [H W 3] whose edge is antialiased."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.repeat(height * np.clip(radius - np.hypot(x, y) + 0.5, 0, 1)[..., None], 3, axis=-1)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_the_edge_of_a_disc_is_its_circle(sigma):
    edges = canny(disc(), sigma)
    y, x = np.nonzero(edges) - np.float64((64 - 1) / 2)
    assert np.abs(np.hypot(x, y) - 20).max() < 1
    assert 100 < edges.sum() < 160  # 2 pi 20 is 126: one pixel wide, and closed


def test_a_step_of_one_channel_is_an_edge_if_it_is_high_enough():
    picture = disc(height=0.3) * [0, 0, 1]
    assert canny(picture, height=0.25).any()
    assert not canny(picture, height=0.4).any()
    assert not canny(np.full((16, 16, 3), 0.5)).any()


def test_weak_edges_count_where_they_are_connected_to_strong_ones():
    """A bar that fades from 1 to 0: its sides are edges down to 0.4 of the height, and none without the strong end."""
    picture = np.zeros((32, 64, 3))
    picture[12:20] = np.linspace(1, 0, 64)[:, None]
    ends = [np.nonzero(canny(part, height=0.5).any(axis=0))[0] for part in (picture, picture[:, 40:])]
    assert 46 <= ends[0].max() <= 54  # the step is 0.2 at 50
    assert len(ends[1]) == 0


def test_edges_that_are_drawn_have_gaps_and_width():
    rng, picture = np.random.default_rng(0), disc()
    drawn = np.array([random_edges(rng, picture, picture[..., 0]).sum() for _ in range(40)]) / canny(picture).sum()
    assert drawn.min() < 0.9 and drawn.max() > 2
    assert (np.abs(drawn - 1) < 0.05).mean() > 0.2


def test_agreement():
    line = np.eye(16, dtype=bool)
    assert agreement(line, line, 1) == 1
    assert agreement(np.roll(line, 1, 1)[1:, 1:], line[1:, 1:], 1) == 1
    assert agreement(np.roll(line, 3, 1), line, 1) == 0
    half = line & (np.arange(16) < 8)  # all of it is right, and 9 pixels of 16 are near it
    assert agreement(half, line, 1) == pytest.approx(2 / (1 + 16 / 9))
    assert agreement(np.zeros_like(line), line, 2) == 0
