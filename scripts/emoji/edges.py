"""Edges of pictures, and the ways in which those that people draw differ from them."""

import numpy as np
from scipy import ndimage

EIGHT = np.ones((3, 3), bool)
"""A pixel and its neighbours"""


def canny(picture: np.ndarray, sigma: float = 1.0, height: float = 0.2) -> np.ndarray:
    """Where a picture [H W C] in 0 to 1 changes abruptly: bool [H W], lines of one pixel (Canny 1986).

    Where the slope of the smoothed picture, of its channel with the steepest, is at a maximum along its own direction,
    and connected to where a step of that size would be at least `height` high, by pixels with 0.4 of that or more.
    """
    smooth = ndimage.gaussian_filter(picture, (sigma, sigma, 0), mode="nearest")
    slopes = np.stack(np.gradient(smooth, axis=(0, 1)))  # [2 H W C]
    steepest = np.hypot(*slopes).argmax(axis=-1)[None, ..., None]
    dy, dx = np.take_along_axis(slopes, steepest, axis=-1)[..., 0]
    step = np.hypot(dy, dx) * sigma * np.sqrt(2 * np.pi)  # a step h has the slope h / (sigma sqrt(2 pi)) when smoothed
    direction = np.stack([dy, dx]) / np.maximum(np.hypot(dy, dx), 1e-12)
    here = np.indices(step.shape)
    behind, ahead = (ndimage.map_coordinates(step, here + s * direction, order=1, mode="nearest") for s in (-1, 1))
    weak = (step >= behind) & (step > ahead) & (step > 0.4 * height)
    labels, _ = ndimage.label(weak, EIGHT)
    return weak & np.isin(labels, labels[weak & (step > height)])


def random_edges(rng: np.random.Generator, picture: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Edges of a picture [H W 3], in one of four cases of its outline [H W] alone, fine or coarse: bool [H W].

    Half of them have gaps, a third lines of three pixels.
    """
    if rng.random() < 1 / 4:
        edges = canny(alpha[..., None], 1.0, 0.5)
    else:
        edges = canny(picture, rng.uniform(0.6, 2.0), rng.uniform(0.08, 0.35))
    if rng.random() < 1 / 2:
        noise = ndimage.gaussian_filter(rng.standard_normal(edges.shape), 6)
        edges &= noise > np.quantile(noise, rng.uniform(0, 0.4))
    return ndimage.binary_dilation(edges) if rng.random() < 1 / 3 else edges


def agreement(edges: np.ndarray, expected: np.ndarray, within: int) -> float:
    """F1 of edges bool [H W]: a pixel is right if one of the other's is at most `within` pixels away in both axes."""
    near = [ndimage.binary_dilation(each, EIGHT, iterations=within) for each in (edges, expected)]
    precision, recall = (
        (near[1] & edges).sum() / max(edges.sum(), 1),
        (near[0] & expected).sum() / max(expected.sum(), 1),
    )
    return float(2 * precision * recall / max(precision + recall, 1e-12))
