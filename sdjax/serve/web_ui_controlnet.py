"""The ControlNet extension of the web UI (Mikubill/sd-webui-controlnet): units of its script, and its lists."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from PIL import Image, ImageOps

from sdjax.fields import brief
from sdjax.pictures.picture import Picture
from sdjax.request.values import finite, flag, one_of, whole
from sdjax.serve import pictures
from sdjax.serve.fields import PREPROCESSORS, Reader
from sdjax.serve.networks import own_names
from sdjax.serve.studio import Studio

SCRIPT = "controlnet"
"""What the script is called in `alwayson_scripts`, in any case"""
UNITS = 8
MODULES = {"None": "none", "blur_gaussian": "blur"} | {name: name for name in PREPROCESSORS}
"""Preprocessors, by what they are called there"""
RESIZE_MODES = {"Just Resize": 0, "Crop and Resize": 1, "Resize and Fill": 2}
RESIZE_MODES |= {"Scale to Fit (Inner Fit)": 1, "Envelope (Outer Fit)": 2}
NOTHING = {
    "mask": ("",),
    "mask_image": ("",),
    "effective_region_mask": ("",),
    "control_mode": (0, "Balanced"),
    "hr_option": (0, "Both", "HiResFixOption.BOTH"),
    "guessmode": (False,),
    "inpaint_crop_input_image": (False, True),
    "advanced_weighting": ([],),
    "ipadapter_input": ([],),
    "union_control_type": ("Unknown", "All"),
}
"""Of what is not supported, the values that ask for nothing, beside null"""
COMMON = {"weight": 1.0, "guidance_start": 0.0, "guidance_end": 1.0}


def router(studio: Studio) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/controlnet", tags=["web UI"])

    @routes.get("/version")
    def version() -> dict[str, int]:
        """That of the extension whose requests are understood."""
        return {"version": 3}

    @routes.get("/settings")
    def settings() -> dict[str, int]:
        return {"control_net_unit_count": UNITS}

    @routes.get("/model_list")
    async def models() -> dict[str, list[str]]:
        pipe = (await studio.models.get()).pipe
        return {"model_list": [*own_names(pipe), *studio.controlnets.paths]}

    @routes.get("/module_list")
    def modules() -> dict[str, Any]:
        details = {name: {"model_free": False, "sliders": []} for name in PREPROCESSORS}
        return {"module_list": list(PREPROCESSORS), "module_detail": details}

    return routes


def fields_of(
    args: Any, size: tuple[Any, Any], reader: Reader, image: Picture | None, *, is_larger: bool
) -> dict[str, Any]:
    """The fields of a request that the arguments of the script stand for. Raises ValueError that begins with a field.

    size: width and height of the picture. image: what units without a picture are shown; None: nothing. is_larger:
    whether there is a second pass.
    """
    if not isinstance(args, list):
        raise ValueError(f"{SCRIPT}: args must be a list, not {brief(args)}")
    units = [unit for i, unit in enumerate(args) if _is_enabled(i, unit)]
    if not units:
        return {}
    if len(units) > UNITS:
        raise ValueError(f"{SCRIPT}: {len(units)} units; {UNITS} at most")
    values = [_unit(f"{SCRIPT} {i}", unit, reader, is_larger=is_larger) for i, unit in enumerate(units)]
    shown = [_shown(f"{SCRIPT} {i}", unit, size, reader, image) for i, unit in enumerate(units)]
    names = ("controlnet", "control_preprocessor", "controlnet_conditioning_scale")
    names += ("control_guidance_start", "control_guidance_end")
    return {"control_image": shown, **dict(zip(names, map(list, zip(*values, strict=True)), strict=True))}


def _is_enabled(i: int, unit: Any) -> bool:
    if not isinstance(unit, Mapping):
        raise ValueError(f"{SCRIPT} {i}: must be an object, not {brief(unit)}")
    return flag(f"{SCRIPT} {i}: enabled", unit.get("enabled", True))


def _unit(called: str, unit: Mapping[str, Any], reader: Reader, *, is_larger: bool) -> tuple[Any, ...]:
    """Model, preprocessor, weight, start and end."""
    for name, values in NOTHING.items():
        value = unit.get(name)
        if value is not None and value not in values and (is_larger or name != "hr_option"):
            raise ValueError(f"{called}: {name}: {brief(value)} is not supported here")
    model = unit.get("model") or "None"
    if not isinstance(model, str) or model == "None":
        raise ValueError(f"{called}: model: must be one of /controlnet/model_list, not {brief(model)}")
    name, bracket, rest = model.rpartition(" [")
    found = reader.controlnet(f"{called}: model", name if bracket and rest.endswith("]") else model)
    module = MODULES[one_of(f"{called}: module", unit.get("module") or "none", MODULES)]
    weight, start, end = (finite(f"{called}: {name}", unit.get(name, usual), 0, 2) for name, usual in COMMON.items())
    return found, module, weight, start, end


def _shown(
    called: str, unit: Mapping[str, Any], size: tuple[Any, Any], reader: Reader, image: Picture | None
) -> Picture:
    """The picture, of the shape of what is made."""
    given = unit.get("image") or unit.get("input_image")
    if isinstance(given, Mapping):
        if given.get("mask"):
            raise ValueError(f"{called}: mask: is not supported here")
        given = given.get("image")
    if not given and image is None:
        raise ValueError(f"{called}: image: is missing")
    picture = reader.sent(f"{called}: image", given) if given else image
    mode = unit.get("resize_mode", 1)
    mode = RESIZE_MODES.get(mode, mode) if isinstance(mode, str) else mode
    made = _RESIZED[whole(f"{called}: resize_mode", mode, 0, 2)](
        picture.rgb(), tuple(whole("width, height", side, 1, 16384) for side in size)
    )
    return pictures.of_image(called, made)


def _filled(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """Within it, and around it the median colour of its border."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return ImageOps.pad(image, size, color=tuple(int(value) for value in np.median(border, axis=0)))


_RESIZED = (Image.Image.resize, ImageOps.fit, _filled)
"""By resize_mode"""
