"""sdjax.pictures.grids: plain grids and labelled sheets."""

import numpy as np
import pytest
from PIL import Image

from sdjax.pictures.grids import contact_sheet, image_grid


def picture(color="blue", size=(48, 32)):
    return Image.new("RGB", size, color)


def test_grid_runs_along_rows():
    colors = ["red", "lime", "blue", "white", "black", "yellow"]
    grid = image_grid([picture(color) for color in colors], rows=2, cols=3)
    assert grid.size == (3 * 48, 2 * 32)
    for index, color in enumerate(colors):
        row, col = divmod(index, 3)
        box = (col * 48, row * 32, (col + 1) * 48, (row + 1) * 32)
        np.testing.assert_array_equal(grid.crop(box), picture(color))


def test_grid_refuses_another_number_or_unequal_sizes():
    with pytest.raises(ValueError, match="2 rows and 2 columns needs 4 pictures, not 3"):
        image_grid([picture()] * 3, 2, 2)
    with pytest.raises(ValueError, match="one size"):
        image_grid([picture(), picture(size=(32, 48))], 1, 2)
    with pytest.raises(ValueError, match="needs 0 pictures"):
        image_grid([], 0, 3)


def boxes(sheet, colors):
    """Where each colour is: (left, top, right, bottom)."""
    pixels = np.asarray(sheet)
    found = []
    for color in colors:
        ys, xs = np.nonzero((pixels == color).all(-1))
        found.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return found


def is_blank(sheet, box):
    return (np.asarray(sheet.crop(box)) == 255).all()


COLORS = [(200, 0, 10 * i) for i in range(6)]


def test_a_sheet_has_its_pictures_in_rows_and_columns_beside_their_labels():
    pictures = [picture(color, (120, 100)) for color in COLORS]
    sheet = contact_sheet(pictures, ["steps 10", "steps 20"], ["euler", "ddim", "heun"], "guidance 7.5")
    places = boxes(sheet, COLORS)
    assert all((right - left, bottom - top) == (120, 100) for left, top, right, bottom in places)
    tops, lefts = [top for _, top, _, _ in places], [left for left, *_ in places]
    assert tops[0] == tops[1] == tops[2] < tops[3] - 100 and tops[3] == tops[4] == tops[5]
    assert lefts[:3] == lefts[3:] and lefts[0] < lefts[1] - 119 and lefts[1] < lefts[2] - 119
    for left, top, right, bottom in places[:3]:
        assert not is_blank(sheet, (left, top - 30, right, top))  # a column's label
        assert is_blank(sheet, (left, bottom, right, bottom + 8))
    for left, top, _, bottom in places[::3]:
        assert not is_blank(sheet, (0, top, left, bottom))  # a row's label
    assert not is_blank(sheet, (0, 0, 80, 28))  # the title


def test_a_long_label_takes_no_more_than_its_place():
    pictures = [picture(color, (120, 100)) for color in COLORS]
    prompt = "a goose with a " + "very " * 100 + "long neck"
    sheet = contact_sheet(pictures, [prompt, "word" * 100], [prompt, "word" * 100, "short"], prompt)
    (left, top, *_), *_ = places = boxes(sheet, COLORS)
    assert [(right - left, bottom - top) for left, top, right, bottom in places] == [(120, 100)] * 6
    assert left < 300 and top < 160 and sheet.width < 700
    assert is_blank(sheet, (left - 6, top, left, sheet.height))  # between a row's label and its picture
    assert is_blank(sheet, (0, places[0][3], sheet.width, places[3][1]))


def test_a_sheet_takes_pictures_of_any_size_and_gaps():
    sheet = contact_sheet(
        [picture(COLORS[0], (1024, 512)), None, picture(COLORS[1], (16, 16)), picture(COLORS[2], (64, 640))],
        ["", ""],
        ["", ""],
    )
    sizes = [(right - left, bottom - top) for left, top, right, bottom in boxes(sheet, COLORS[:3])]
    assert sizes == [(256, 128), (16, 16), (26, 256)]
    assert sheet.size == (8 + 2 * 264, 8 + 2 * 264)


def test_a_sheet_refuses_another_number():
    with pytest.raises(ValueError, match="2 rows and 2 columns needs 4 pictures, not 3"):
        contact_sheet([picture()] * 3, ["a", "b"], ["c", "d"])
