"""The branches that guidance combines, and their weights, of requests."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sdjax.inputs.batches import column
from sdjax.inputs.tasks import EDIT, UPSCALE, VARY, task
from sdjax.request import Request
from sdjax.text import conditioning, prompts

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

DISTILLED_SCALE = 8.5  # of a UNet that is conditioned on the guidance scale: Luo et al. 2023
SCALES = {UPSCALE: 9.0, VARY: 10.0}
CFG_PLUS_PLUS_SCALE = 0.6  # which arXiv:2406.08070 compares with 7.5 without
LARGEST_CFG_PLUS_PLUS_SCALE = 2.0  # as ComfyUI's users take it; 1 in the paper, where it stands for 12.5
NEED_A_SCALE = ("perp_neg_scale", "mimic_scale")
IMAGE_SCALE = 1.5  # of InstructPix2Pix, arXiv:2211.09800, section 3.2.1


class Branch(NamedTuple):
    """What the network sees for one prediction."""

    prefix: str
    """of the prompt that it reads"""
    part: int | None = 0
    """which of the prompts between which is AND; None: no text, where there is a perp_neg_scale"""
    sees_picture: bool | None = None
    """whether the extra channels are there, or zeros; None: as they are, in all branches"""
    is_perturbed: bool = False
    """whether the pixels attend to themselves alone in some layers"""


class Guidance(NamedTuple):
    """The guided prediction is sum_n weights[n] * prediction[n]."""

    branches: tuple[Branch, ...]
    """the prompt's is the last; the first, if there are several, that of no prompt or of the negative one"""
    weights: np.ndarray
    """[B N] float32"""
    scales: np.ndarray
    """[B] float32, the guidance scales, 1 at least"""
    perpendicular: np.ndarray | None
    """[B] float32 how many times the perpendicular part of the negative prompt, the second branch, is taken off"""
    mimic: np.ndarray | None
    """[B 2] float32: the ratio of mimic_scale to the guidance scale, 0 without, and threshold_percentile"""


def guidance_scale(pipe: "DiffusionPipeline", *, cfg_plus_plus: bool = False) -> float:
    """What guidance_scale=None stands for: what model_index.json recommends, else 7.5, with SDXL 5.

    For a UNet that is conditioned on the scale it is 8.5, for the x4 upscaler 9, for unCLIP 10. With CFG++ it is
    CFG_PLUS_PLUS_SCALE instead.
    """
    if cfg_plus_plus:
        return CFG_PLUS_PLUS_SCALE
    config = pipe.unet.config
    usual = SCALES.get(task(pipe), conditioning.READINGS[config.addition_embed_type].guidance_scale)
    return float(pipe.config.get("guidance_scale", usual if conditioning.is_guided(config) else DISTILLED_SCALE))


def guidance_of(pipe: "DiffusionPipeline", requests: Sequence[Request]) -> Guidance:
    """u + g (c - u) of the negative prompt's prediction u and the prompt's c (arXiv:2207.12598); for InstructPix2Pix
    u + s (i - u) + g (c - i), i: of the negative prompt with the picture, which u does not see (eq. 3). Where there is
    a pag_scale p, p (c - d) is added, d: of the prompt with perturbed self-attention (PAG, arXiv:2403.17377, eq. 13).
    Of several prompts, between which is AND, g (c - u) is the sum of g w (c - u) of each (composable diffusion,
    arXiv:2206.01714, eq. 11). Where there is a perp_neg_scale w, u is of no text, and g w times what the negative
    prompt's n - u has perpendicular to c - u is taken off (Perp-Neg, arXiv:2304.04968). A mimic_scale m is that to
    which the range of values is then brought back. With CFG++ the table's rows have their part in it, see
    `table.cfg_plus_plus`.

    The prompt's branch alone where no image has guidance. Raises ValueError as `check_guidance`, and for AND in one
    prompt beside a perp_neg_scale of another image.
    """
    for request in requests:
        check_guidance(pipe, request)
    is_plus = column(requests, "cfg_plus_plus", False)
    scales = np.array([_scale(pipe, request) for request in requests])
    scales = np.where(is_plus, scales, np.maximum(scales, 1))
    is_edit = task(pipe) == EDIT
    image_scales = column(requests, "image_guidance_scale", IMAGE_SCALE)
    g = np.where(is_edit & (image_scales < 1), 1, scales)
    shares, perpendicular = _shares(requests), None
    scales_of_negative = column(requests, "perp_neg_scale", 0.0)
    is_guided = conditioning.is_guided(pipe.unet.config)
    if shares.shape[1] > 1:
        if scales_of_negative.any():
            raise ValueError("perp_neg_scale: no picture of a batch has it beside one with AND in its prompt")
        branches = (Branch("negative_"), *(Branch("", part) for part in range(1, shares.shape[1])), Branch(""))
        weights = np.column_stack([1 - g * shares.sum(axis=1), g[:, None] * np.roll(shares, -1, axis=1)])
    elif not is_guided or not (is_plus | (g > 1)).any():
        branches, weights = (Branch("", sees_picture=is_edit or None),), np.ones((len(g), 1))
    elif is_edit:
        s = np.where(g > 1, image_scales, 1)
        branches = tuple(
            Branch(prefix, sees_picture=sees)
            for prefix, sees in (("negative_", False), ("negative_", True), ("", True))
        )
        weights = np.stack([1 - s, s - g, g], axis=1)
    elif scales_of_negative.any():
        branches, perpendicular = (Branch("negative_", None), Branch("negative_"), Branch("")), g * scales_of_negative
        weights = np.stack([1 - g, 0 * g, g], axis=1)
    else:
        branches, weights = (Branch("negative_"), Branch("")), np.stack([1 - g, g], axis=1)
    if (p := column(requests, "pag_scale", 0.0)).any():
        branches = (*branches[:-1], branches[-1]._replace(is_perturbed=True), branches[-1])
        weights = np.concatenate([weights[:, :-1], -p[:, None], weights[:, -1:] + p[:, None]], axis=1)
    mimic = column(requests, "mimic_scale", 0.0) / np.where(g > 0, g, 1)
    mimic = np.column_stack([mimic, column(requests, "threshold_percentile", 1.0)]) if mimic.any() else None
    given = (None if own is None else own.astype(np.float32) for own in (weights, scales, perpendicular, mimic))
    return Guidance(branches, *given)


def _scale(pipe: "DiffusionPipeline", request: Request) -> float:
    usual = guidance_scale(pipe, cfg_plus_plus=request.cfg_plus_plus)
    return usual if request.guidance_scale is None else request.guidance_scale


def check_guidance(pipe: "DiffusionPipeline", request: Request) -> None:
    """Raises ValueError for what guidance has no use for, and for several prompts without guidance to add up."""
    is_edit, is_single = task(pipe) == EDIT, len(prompts.parts(request.prompt, request.prompt_syntax)) == 1
    takes_none = is_edit or not conditioning.is_guided(pipe.unet.config)
    scale = _scale(pipe, request)
    is_guided = request.cfg_plus_plus or scale > 1
    if not is_edit and request.image_guidance_scale is not None:
        raise ValueError("image_guidance_scale: only with a UNet of InstructPix2Pix")
    for name in ("cfg_plus_plus", *NEED_A_SCALE):
        if getattr(request, name) and takes_none:
            raise ValueError(f"{name}: not with a UNet that edits, or takes no guidance")
    for name in NEED_A_SCALE:
        if getattr(request, name) and not is_guided:
            raise ValueError(f"{name}: only with a guidance_scale above 1")
    if request.threshold_percentile != 1 and not request.mimic_scale:
        raise ValueError("threshold_percentile: only with mimic_scale")
    if request.cfg_plus_plus and not 0 <= scale <= LARGEST_CFG_PLUS_PLUS_SCALE:
        most = f"{LARGEST_CFG_PLUS_PLUS_SCALE:g}"
        raise ValueError(f"guidance_scale: with cfg_plus_plus from 0 to {most}, such as 0.6, not {scale:g}")
    if is_single:
        return
    if takes_none:
        raise ValueError(
            "prompt: AND, which guidance adds up, does not go with a UNet that edits, or takes no guidance"
        )
    if request.perp_neg_scale:
        raise ValueError("prompt: AND, which guidance adds up, does not go with a perp_neg_scale")
    if request.guidance_interval is not None:
        raise ValueError("prompt: AND, which guidance adds up, does not go with a guidance_interval")
    if not is_guided:
        raise ValueError("prompt: AND needs a guidance_scale above 1, which adds the prompts up")


def _shares(requests: Sequence[Request]) -> np.ndarray:
    """[B P] the weights of the prompts of each request; 0 for those that it has less than another."""
    own = [[weight for _, weight in prompts.parts(request.prompt, request.prompt_syntax)] for request in requests]
    most = max(map(len, own))
    return np.array([weights + [0.0] * (most - len(weights)) for weights in own])
