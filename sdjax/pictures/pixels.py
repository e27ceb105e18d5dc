"""Between a model's pictures, float in -1..1, and float in 0..1, uint8 and PIL."""

import numpy as np
from PIL import Image, ImageFilter

Box = tuple[int, int, int, int]
"""left, top, right, bottom, in pixels"""


def resized(
    image: Image.Image, width: int, height: int, kernel: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The picture, resized where it has another size."""
    return image if image.size == (width, height) else image.resize((width, height), kernel)


def normalize(image: Image.Image, width: int, height: int, *kernel: Image.Resampling) -> np.ndarray:
    """An RGB picture of any size -> float32 [H, W, 3] in -1..1: 2 x - 1. kernel: as of `resized`."""
    return np.asarray(resized(image, width, height, *kernel), np.float32) / 255 * 2 - 1


def grey(image: Image.Image, width: int, height: int, blur: float = 0) -> np.ndarray:
    """A picture of any size, its edges blurred by a Gaussian -> float32 [H, W, 1] in 0..1."""
    blurred = resized(image, width, height).convert("L").filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(blurred, np.float32)[..., None] / 255


def extended(image: Image.Image, margins: tuple[int, int, int, int], fill: int | None = None) -> Image.Image:
    """A picture with margins (left, top, right, bottom), of the grey `fill`, or as its edge goes on."""
    left, top, right, bottom = margins
    own = np.asarray(image)
    widths = [(top, bottom), (left, right), *[(0, 0)] * (own.ndim - 2)]
    filled = {"mode": "edge"} if fill is None else {"constant_values": fill}
    return Image.fromarray(np.pad(own, widths, **filled))


def region(mask: Image.Image, padding: int, aspect: float) -> Box:
    """Where a mask is not black, with so many pixels around, made higher or wider to this aspect (width / height).

    It ends where the picture does. Of a mask that is all black it is the whole picture.
    """
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    spans = [(max(0, left - padding), min(mask.width, right + padding))]
    spans.append((max(0, top - padding), min(mask.height, bottom + padding)))
    width, height = (end - start for start, end in spans)
    axis, wanted = (1, int(width / aspect)) if width / height > aspect else (0, int(height * aspect))
    (start, end), most = spans[axis], mask.size[axis]
    length = min(most, max(wanted, end - start))
    start = min(max(0, start - (length - end + start) // 2), most - length)
    spans[axis] = start, start + length
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def interpolated(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H W] at another size, float32: Keys's cubic convolution (doi:10.1109/TASSP.1981.1163711) with a = -3/4, of the
    four nearest on each axis whatever the size, the edges repeated: as `torch.nn.functional.interpolate` has it."""
    weights = [_cubic(n, m) for n, m in zip(values.shape, (height, width), strict=True)]
    return (weights[0] @ values.astype(np.float64) @ weights[1].T).astype(np.float32)


def _cubic(length: int, new_length: int) -> np.ndarray:
    """[new_length length] what each old value gives to each new one."""
    centre = (np.arange(new_length) + 0.5) * length / new_length - 0.5
    weights = np.zeros((new_length, length))
    for offset in (-1, 0, 1, 2):
        place = np.floor(centre) + offset
        x = np.abs(centre - place)
        near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(
            weights, (np.arange(new_length), np.clip(place, 0, length - 1).astype(int)), np.where(x <= 1, near, far)
        )
    return weights


def denormalize(images: np.ndarray) -> np.ndarray:
    """float32 in 0..1 from a model's -1..1: clip(x / 2 + 1/2, 0, 1)."""
    return (np.asarray(images, np.float32) / 2 + 0.5).clip(0, 1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """uint8 from float in -1..1, clipped and rounded to the nearest."""
    return (denormalize(images) * 255).round().astype(np.uint8)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """[B, H, W, 3] float in -1..1 -> B RGB pictures."""
    return [Image.fromarray(image) for image in to_uint8(images)]
