"""Pixels of examples: resized, cropped, mirrored."""

import numpy as np
from PIL import Image, ImageOps

from sdjax.training.data.buckets import Crop
from sdjax.training.data.examples import Example


def cut(image: Image.Image, crop: Crop, *, mirrored: bool = False) -> np.ndarray:
    """uint8 [H W C] of the bucket's size. An image of another size than the crop's original is resized all the same."""
    image = image.resize(crop.resized, Image.Resampling.LANCZOS)
    width, height = crop.size
    image = image.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    array = np.asarray(image, np.uint8).reshape(height, width, -1)
    return np.ascontiguousarray(array[:, ::-1]) if mirrored else array


def mask_of(example: Example) -> Image.Image:
    """Where a picture is learnt, "L": its own mask, else where it is not transparent, else everywhere."""
    if example.mask is not None:
        return example.mask.rgb().convert("L")
    if example.picture.path is None:
        return Image.new("L", example.picture.size, 255)
    with Image.open(example.picture.path) as image:
        return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")


def normalized(array: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in -1..1"""
    return array.astype(np.float32) / 255 * 2 - 1


def mask_of_latents(mask: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [H W 1] -> float32 [h w 1] in 0..1: the mean over each factor x factor pixels."""
    height, width = mask.shape[0] // factor, mask.shape[1] // factor
    return mask.reshape(height, factor, width, factor, 1).mean((1, 3), dtype=np.float32) / 255
