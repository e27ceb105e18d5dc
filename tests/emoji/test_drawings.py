"""Drawings on backgrounds: placement, composition, colours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawings import COLORS, PALETTE, Placement, color_shares, compose, place, turn
from PIL import Image
from scenes import random_pictures


def test_pictures_stand_on_their_backgrounds_and_differ_by_the_key():
    rgba = np.zeros((4, 40, 40, 4), np.uint8)
    rgba[:, 10:30, 10:30] = (200, 0, 0, 255)
    colors, pictures = COLORS[:4], jax.jit(partial(random_pictures, size=32))
    first, second = (np.asarray(pictures(jax.random.key(i), rgba, rgba[:1], colors, chance=1.0)) for i in (0, 1))
    assert first.shape == (4, 32, 32, 3)
    np.testing.assert_allclose(first[:, 0, 0], 2 * colors - 1, atol=1e-6)
    assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 0.1
    upright = [np.asarray(pictures(jax.random.key(i), rgba, rgba[:1], colors, chance=0.0)) for i in (0, 1)]
    np.testing.assert_array_equal(*upright)
    np.testing.assert_allclose(upright[0], upright[0][:, ::-1], atol=1e-5)  # neither moved nor tilted
    red = np.abs(first[-1] - first[-1, 0, 0]).sum(-1) > 0.1  # the pair: something left, nothing in the middle, right
    assert red[:, :12].any() and not red[:, 15:17].any() and red[:, 20:].any()


def test_palette_colours_are_far_apart():
    colors = 255 * COLORS
    assert colors.shape == (len(PALETTE), 3)
    distance = np.linalg.norm(colors[:, None] - colors, axis=-1)
    assert distance[~np.eye(len(colors), dtype=bool)].min() > 60


def disc(size=40, radius=12):
    """A red disc, opaque in the middle, with an antialiased edge: uint8 [size, size, 4], not premultiplied."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    alpha = np.clip(radius - np.hypot(x, y) + 0.5, 0, 1)
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[..., 0] = 255
    rgba[..., 3] = np.round(255 * alpha)
    return rgba


def test_compose_is_pils_alpha_composite():
    color = (45, 105, 225)
    ground = Image.new("RGBA", (40, 40), (*color, 255))
    expected = np.asarray(Image.alpha_composite(ground, Image.fromarray(disc())))[..., :3]
    rgba = np.asarray(Image.fromarray(disc()).convert("RGBa"), np.float32) / 255
    np.testing.assert_allclose(compose(rgba, np.float32(color) / 255) * 255, expected, atol=1.5)


placed_at = jax.jit(place, static_argnums=1)


def centre_and_mass(alpha):
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]] + 0.5
    return np.array([(y * alpha).sum(), (x * alpha).sum()]) / alpha.sum(), alpha.sum()


def test_place_moves_and_resizes():
    rgba = jnp.asarray(np.asarray(Image.fromarray(disc()).convert("RGBa")) / 255, jnp.float32)
    _, mass = centre_and_mass(np.asarray(rgba[..., 3]))
    for zoom, shift in ((1.0, (0.0, 0.0)), (0.8, (3.0, -2.0)), (1.2, (-1.5, 0.5))):
        placed = placed_at(rgba, 32, Placement(zoom, jnp.array(shift) / 32))
        assert placed.shape == (32, 32, 4)
        centre, placed_mass = centre_and_mass(np.asarray(placed[..., 3]))
        np.testing.assert_allclose(centre, 16 + np.array(shift), atol=0.1)
        np.testing.assert_allclose(placed_mass, mass * (zoom * 32 / 40) ** 2, rtol=0.02)


def test_a_turn_is_pils():
    picture = Image.fromarray(disc()).convert("RGBa")
    rgba = np.asarray(picture) / np.float32(255) * np.linspace(0, 1, 40, dtype=np.float32)[:, None, None]
    turned = np.asarray(turn(jnp.asarray(rgba), np.pi / 2))
    np.testing.assert_allclose(turned, np.rot90(rgba), atol=1e-5)


def test_light_keeps_colours_below_alpha():
    rgba = jnp.full((8, 8, 4), 0.5).at[..., 0].set(0.3)
    placed = placed_at(rgba, 8, Placement(light=2.0))[4, 4]
    np.testing.assert_allclose(placed, [0.5, 0.5, 0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(placed_at(rgba, 8, Placement(light=0.5))[4, 4], [0.15, 0.25, 0.25, 0.5], atol=1e-5)


def test_color_shares():
    rgba = np.zeros((10, 10, 4), np.uint8)
    rgba[:4, :, :] = (*PALETTE["yellow"], 255)
    rgba[4:5, :, :] = (*PALETTE["blue"], 255)
    shares = dict(zip(PALETTE, color_shares(rgba), strict=True))
    assert shares["yellow"] == pytest.approx(0.8) and shares["blue"] == pytest.approx(0.2)
