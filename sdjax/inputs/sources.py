"""What a batch starts from, on the host: noise or latents that are given, pictures and masks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from sdjax.inputs.clip_view import clip_view
from sdjax.inputs.given import Given
from sdjax.inputs.tasks import DEPTH, EDIT, ENLARGE, FROM_NOISE, INPAINT, LARGER, UPSCALE, VARY, task
from sdjax.pictures import pixels
from sdjax.pictures.picture import Picture, remembered
from sdjax.pictures.pixels import Box
from sdjax.request import Request
from sdjax.text import encoding

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

VARYING = ("image_encoder", "image_normalizer")
READ = 8  # pictures that are remembered: a batch may start from one many times


class Whole(NamedTuple):
    """The pictures of which the regions that are worked on are cut out, and into which they are put back."""

    pictures: np.ndarray
    """[B H W 3] in -1..1"""
    masks: np.ndarray
    """[B H W 1] as `Sources.masks`"""
    boxes: np.ndarray
    """[B 4] int32: left, top, right, bottom"""


class Sources(NamedTuple):
    """What a batch starts from. None: there is none of these."""

    noise: np.ndarray | None
    """[B h w C] the initial noise, in place of that of the seeds"""
    latents: np.ndarray | None = None
    """[B h w C] of the pictures"""
    pictures: np.ndarray | None = None
    """[B H W 3] in -1..1"""
    masks: np.ndarray | None = None
    """[B H W 1] 1 where the pictures are made anew, 0 where they are not, and what is between"""
    whole: Whole | None = None
    """where the pictures are regions of these"""
    depths: np.ndarray | None = None
    """[B h w 1] in -1..1, 1 where the picture is nearest"""
    shown: np.ndarray | None = None
    """[B h w 3] in -1..1, pictures that are made larger; or [B S S 3], pictures to vary as CLIP sees them"""


def sources(
    pipe: "DiffusionPipeline", requests: Sequence[Request], given: Given, shape: tuple[int, int, int]
) -> Sources:
    """The sources of a batch of latents of this shape [h w C]. Raises ValueError for what does not go together."""
    own = task(pipe)
    sides = tuple(side // (2 if own == ENLARGE else 1) for side in shape[:2])  # of the latents of its picture
    noise, latents = (
        None if value is None else encoding.array(name, value, (len(requests), *wanted, shape[2]))
        for name, value, wanted in (("latents", given.latents, shape[:2]), ("image", given.image, sides))
    )
    height, width = (side * pipe.vae.config.factor for side in sides)
    check_masks(requests)
    for request in requests:
        check_sources(pipe, request, has_latents=latents is not None)
    if own in FROM_NOISE and given.denoising_start:
        raise ValueError(
            "denoising_start: not with a UNet that edits, enlarges or varies pictures: it starts from noise"
        )
    if own == UPSCALE:
        return Sources(noise, shown=np.stack([_small(request.image, *shape[:2]) for request in requests]))
    if own == VARY:
        side = pipe.image_encoder.config.image_size
        return Sources(noise, shown=np.stack([clip_view(request.image, side) for request in requests]))
    pictures = masks = whole = None
    if latents is None and requests[0].image is not None:
        if pipe.vae.encoder is None:
            raise ValueError("image: this VAE has no encoder")
        boxes = [box_of(request, width, height) for request in requests]
        boxed = list(zip(requests, boxes, strict=True))
        if own == ENLARGE:
            pictures = np.stack([_small(one.image, height, width) for one in requests])
        else:
            pictures = np.stack([_picture(own.image, own.outpaint, box, width, height) for own, box in boxed])
        if requests[0].has_mask:
            masks = np.stack([mask_of(own, box, width, height) for own, box in boxed])
        if None not in boxes:
            whole = Whole(
                np.stack([_picture(own.image, own.outpaint, None, *own.whole_size) for own in requests]),
                np.stack([mask_of(own, None, *own.whole_size) for own in requests]),
                np.array(boxes, np.int32),
            )
    if given.denoising_start and (noise is not None or (latents is None and pictures is None)):
        raise ValueError("denoising_start: only with image, the latents to go on from, and without latents")
    depths = np.stack([_depth(request.depth_map, *shape[:2]) for request in requests]) if own == DEPTH else None
    return Sources(noise, latents, pictures, masks, whole, depths)


def check_sources(pipe: "DiffusionPipeline", request: Request, *, has_latents: bool = False) -> None:
    """Raises ValueError where the UNet does not take the pictures that a request has, or needs others.

    has_latents: whether the latents of its picture are given.
    """
    own, has_picture = task(pipe), request.image is not None and not has_latents
    if request.has_mask and not has_picture:
        raise ValueError("mask_image, outpaint: only with image, a picture, not latents")
    if own == INPAINT and not request.has_mask:
        raise ValueError("this UNet is for inpainting: give image, and mask_image, white where it is made anew")
    if own == INPAINT and request.soft_mask:
        raise ValueError("soft_mask: this UNet takes a mask that is cut")
    if own == EDIT and (not has_picture or request.has_mask):
        raise ValueError("this UNet edits whole pictures: give image, the picture to edit, and no mask")
    is_there = has_picture or (own == ENLARGE and has_latents)
    if own in LARGER and (not is_there or request.has_mask):
        raise ValueError("this UNet makes pictures larger: give image, the picture to make larger, and no mask")
    if own == VARY and (not has_picture or request.has_mask):
        raise ValueError("this UNet varies pictures: give image, the picture to vary, and no mask")
    if own == VARY and (absent := [name for name in VARYING if getattr(pipe, name) is None]):
        raise ValueError(f"this UNet varies pictures: the pipeline has no {' and no '.join(absent)}")
    if own == DEPTH and request.depth_map is None:
        raise ValueError("depth_map: this UNet takes one, brighter where the picture is nearer")
    if own == DEPTH and (request.has_mask or not (has_picture or has_latents)):
        raise ValueError("this UNet takes a depth_map beside image, and no mask")
    if own != DEPTH and request.depth_map is not None:
        raise ValueError("depth_map: only with a UNet that takes one, such as SD 2 depth")


def check_masks(requests: Sequence[Request]) -> None:
    """Raises ValueError where some have a mask and others none, or regions are of pictures of several sizes."""
    if len({request.has_mask for request in requests}) > 1:
        raise ValueError("mask_image, outpaint: the pictures of a batch all have a mask, or none does")
    sizes = {None if request.padding_mask_crop is None else request.whole_size for request in requests}
    if len(sizes) > 1:
        raise ValueError("padding_mask_crop: the pictures of a batch have one size, and all of them have it, or none")


def box_of(request: Request, width: int, height: int) -> Box | None:
    """What is worked on, at this size, of its picture; None: all of it."""
    if request.padding_mask_crop is None:
        return None
    mask = _whole_mask(request).filter(ImageFilter.GaussianBlur(request.mask_blur))
    return pixels.region(mask, request.padding_mask_crop, width / height)


def seen(picture: Picture, outpaint: Box | None, box: Box | None) -> Image.Image:
    """A picture, made larger, and of that the region."""
    image = picture.rgb()
    image = image if outpaint is None else pixels.extended(image, outpaint)
    return image if box is None else image.crop(box)


@remembered(READ)
def _picture(picture: Picture, outpaint: Box | None, box: Box | None, width: int, height: int) -> np.ndarray:
    return pixels.normalize(seen(picture, outpaint, box), width, height)


@remembered(READ)
def _small(picture: Picture, height: int, width: int) -> np.ndarray:
    return pixels.normalize(picture.rgb(), width, height, Image.Resampling.BICUBIC)


@remembered(READ)
def _depth(picture: Picture, height: int, width: int) -> np.ndarray:
    """[h w 1] of a depth map: as bicubic interpolation has it at this size, its smallest value -1, its largest 1."""
    depth = np.asarray(picture.rgb().convert("L"), np.float32)
    small = pixels.interpolated(depth, height, width)
    span = max(float(small.max() - small.min()), np.finfo(np.float32).tiny)
    return (2 * (small - small.min()) / span - 1)[..., None]


def mask_of(request: Request, box: Box | None, width: int, height: int) -> np.ndarray:
    """[H W 1] the mask of a request. That of a region is blurred before it is cut out."""
    mask, blur = _whole_mask(request), request.mask_blur
    if box is None:
        return pixels.grey(mask, width, height, blur)
    return pixels.grey(mask.filter(ImageFilter.GaussianBlur(blur)).crop(box), width, height)


def _whole_mask(request: Request) -> Image.Image:
    """Of its picture, white where that is made larger."""
    if request.mask_image is not None:
        mask = request.mask_image.rgb().convert("L")
    else:
        mask = Image.new("L", request.image.size)
    return mask if request.outpaint is None else pixels.extended(mask, request.outpaint, fill=255)
