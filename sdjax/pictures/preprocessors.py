"""What ControlNets are shown, made from pictures: edges, strokes, blurred pictures."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageFilter

CANNY = {"sigma": 1.0, "low_threshold": 0.1, "high_threshold": 0.2}
STROKE_RADIUS = 6  # pixels; strokes are darker than what is around them
BLUR_RADIUS = 9
TILE = 8
CONTROLNET_AUX = "controlnet_aux"


def canny(image: Image.Image) -> Image.Image:
    """Its edges (Canny 1986), white on black."""
    from skimage import feature

    grey = np.asarray(image.convert("L"), np.float32) / 255
    return Image.fromarray(np.uint8(feature.canny(grey, **CANNY)) * 255).convert("RGB")


def lineart(image: Image.Image) -> Image.Image:
    """Its strokes, white on black: how much darker it is than what is around, 1 where that is most."""
    around = np.asarray(image.filter(ImageFilter.GaussianBlur(STROKE_RADIUS)), np.float32)
    darker = (around - np.asarray(image, np.float32)).clip(0).min(axis=2)
    return Image.fromarray(np.uint8(255 * darker / max(darker.max(), 1))).convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    """It, blurred by a Gaussian."""
    return image.filter(ImageFilter.GaussianBlur(BLUR_RADIUS))


def tile(image: Image.Image) -> Image.Image:
    """It, as of an eighth of its size: for ControlNets that add details."""
    small = image.resize([max(1, side // TILE) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BICUBIC)


OWN: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "canny": canny,
    "lineart": lineart,
    "blur": blur,
    "tile": tile,
}
NONE, INPAINT = "none", "inpaint"
"""The picture as it is; and with -1 where it is made anew, which the mask of a request says"""


@cache
def preprocessor(name: str) -> Callable[[Image.Image], Image.Image]:
    """That of this name: one of OWN, NONE, or one of controlnet_aux's `Processor`, which fetches its network.

    Raises ValueError for a name that neither knows, and for what is not installed.
    """
    if name == NONE:
        return lambda image: image
    if name == "canny" and find_spec("skimage") is None:
        raise ValueError("control_preprocessor: canny needs scikit-image: pip install 'sdjax[control]'")
    if name in OWN:
        return OWN[name]
    if find_spec(CONTROLNET_AUX) is None:
        known = ", ".join((*OWN, INPAINT, NONE))
        raise ValueError(f"control_preprocessor: {name!r} is none of {known}; for others install controlnet_aux")
    from controlnet_aux import processor

    if name not in processor.MODELS:
        raise ValueError(f"control_preprocessor: {name!r} is unknown; controlnet_aux has {', '.join(processor.MODELS)}")
    found = processor.Processor(name)
    return lambda image: found(image).convert("RGB").resize(image.size)
