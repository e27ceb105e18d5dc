"""Aspect-ratio buckets: pictures of about one shape are cut to one size, so that a batch has one size.

NovelAI 2022, "Novel AI improvements on Stable Diffusion"; sizes as kohya's trainer has them.
"""

import math
from dataclasses import dataclass

import numpy as np

STEP = 64  # pixels, between the sides of buckets
LEAST, MOST = 1 / 2, 2  # sides of buckets, in parts of the resolution

Size = tuple[int, int]
"""(width, height) in pixels"""


@dataclass(frozen=True)
class Crop:
    """How a picture becomes one of its bucket: made of size `resized`, of which the part from (left, top) is kept."""

    size: Size
    """of the bucket"""
    original: Size
    """of the picture"""
    resized: Size
    left: int
    top: int

    def time_ids(self, *, mirrored: bool = False) -> tuple[int, ...]:
        """What SDXL is conditioned on: height and width of the original, top and left of the crop, height and width of
        the result (arXiv:2307.01952, section 2.2). The crop is one of the picture as it is seen, mirrored or not."""
        left = self.resized[0] - self.left - self.size[0] if mirrored else self.left
        return (*self.original[::-1], self.top, left, *self.size[::-1])


def step_of(resolution: int, multiple: int) -> int:
    """Pixels between the sides of buckets: STEP, less where that is more than an eighth of the resolution; always a
    multiple of what the model's sides are."""
    return max(1, min(STEP, resolution // 8) // multiple) * multiple


def sizes(resolution: int, step: int) -> list[Size]:
    """The buckets: sides are multiples of step, from half to twice the resolution, and areas at most its square."""
    side = resolution // step * step
    most = min(MOST * resolution, resolution**2 // step) // step * step
    first = math.ceil(LEAST * resolution / step) * step
    found = {(side, side)}
    for width in range(first, most + 1, step):
        height = min(resolution**2 // width // step * step, most)
        if height >= first:
            found |= {(width, height), (height, width)}
    return sorted(found)


def nearest(size: Size, buckets: list[Size]) -> Size:
    """The bucket whose aspect ratio is nearest, as a ratio of ratios; of several the largest."""
    ratios = np.array([math.log(width / height) for width, height in buckets])
    distance = np.abs(ratios - math.log(size[0] / size[1])).round(9)
    return min(zip(distance, (-w * h for w, h in buckets), buckets, strict=True))[2]


def crop(original: Size, bucket: Size, at: tuple[float, float] = (0.5, 0.5)) -> Crop:
    """The picture covers the bucket; what stands out is cut away. at: 0..1, where in x and y the crop lies."""
    scale = max(bucket[0] / original[0], bucket[1] / original[1])
    resized = tuple(max(side, round(own * scale)) for own, side in zip(original, bucket, strict=True))
    left, top = (round((large - small) * part) for large, small, part in zip(resized, bucket, at, strict=True))
    return Crop(bucket, original, resized, left, top)
