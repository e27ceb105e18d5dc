"""What the bodies of the web UI's txt2img and img2img mean as fields of a `Request`.

A field that is known there and not supported here may have the values that ask for nothing; other values are errors.
Unknown fields pass, as they do there.
"""

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from sdjax.fields import brief
from sdjax.pictures import web_ui
from sdjax.pictures.picture import Picture
from sdjax.request.values import finite, flag, one_of, whole
from sdjax.sampling import NAMES
from sdjax.serve import pictures, web_ui_controlnet
from sdjax.serve.fields import Asked, Reader

COMMON: Mapping[str, Any] = {
    "prompt": "",
    "negative_prompt": "",
    "styles": [],
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "sampler_name": None,
    "sampler_index": "Euler",
    "scheduler": None,
    "batch_size": 1,
    "n_iter": 1,
    "steps": 50,
    "cfg_scale": 7.0,
    "width": 512,
    "height": 512,
    "restore_faces": None,
    "tiling": None,
    "eta": None,
    "s_churn": None,
    "s_tmax": None,
    "s_tmin": None,
    "s_noise": None,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "refiner_checkpoint": None,
    "refiner_switch_at": None,
    "disable_extra_networks": False,
    "alwayson_scripts": {},
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "infotext": None,
}
TXT2IMG = COMMON | {
    "denoising_strength": 0.75,
    "enable_hr": False,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "hr_scale": 2.0,
    "hr_upscaler": None,
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_sampler_name": None,
    "hr_scheduler": None,
    "hr_prompt": "",
    "hr_negative_prompt": "",
}
IMG2IMG = COMMON | {
    "init_images": None,
    "resize_mode": 0,
    "denoising_strength": 0.75,
    "image_cfg_scale": None,
    "mask": None,
    "mask_blur": 4,
    "mask_blur_x": None,
    "mask_blur_y": None,
    "inpainting_fill": 0,
    "inpaint_full_res": True,
    "inpaint_full_res_padding": 0,
    "inpainting_mask_invert": 0,
    "initial_noise_multiplier": None,
    "include_init_images": False,
}
"""The fields and their defaults there"""

NOTHING = {
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_churn": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None"),
    "disable_extra_networks": (False,),
    "script_name": ("",),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "initial_noise_multiplier": (1,),
}
"""Of what is not supported, the values that ask for nothing, beside null"""
NOTHING_HIRES = {
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
}
NOTHING_SETTINGS = {
    "sd_vae": ("", "Automatic", "None"),
    "eta_noise_seed_delta": (0,),
    "tiling": (False,),
    "s_churn": (0,),
    "token_merging_ratio": (0,),
}
CALLED = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "strength": "denoising_strength",
    "hires_strength": "denoising_strength",
    "hires_scale": "hr_scale",
    "image_guidance_scale": "image_cfg_scale",
    "padding_mask_crop": "inpaint_full_res_padding",
    "clip_skip": "override_settings: CLIP_stop_at_last_layers",
    "count": "batch_size, n_iter",
    "model": "override_settings: sd_model_checkpoint",
}
"""Fields here, and what messages call them"""
SAME = ("prompt", "negative_prompt", "seed", "width", "height")
HIRES_UPSCALERS = {"Latent": "latent", "Lanczos": "lanczos"}
MODEL_UPSCALER = "ESRGAN"
"""What that of the model is called"""
SOURCES = {"GPU": "cuda", "NV": "cuda", "CPU": "torch"}
"""Of noise, by what the web UI calls them"""
SCHEDULES = {name.lower(): name for name in (*web_ui.SCHEDULES, *web_ui.AS_IT_IS)}
LARGEST_STRENGTH = 0.999
FILLS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2))
"""Radii of blurs, and how often each is laid over what is masked"""


def txt2img(given: Mapping[str, Any], options: Mapping[str, Any], reader: Reader) -> Asked:
    """What the body asks for. Raises ValueError that begins with the name of the field that is wrong."""
    body = _body(given, TXT2IMG)
    found = _common(body, options)
    if is_larger := flag("enable_hr", body["enable_hr"] or False):
        found |= _hires(body, reader)
    found |= _controlled(body, reader, None, is_larger=is_larger)
    return reader.asked(found, CALLED)


def img2img(given: Mapping[str, Any], options: Mapping[str, Any], reader: Reader, *, takes_scale: bool) -> Asked:
    """As `txt2img`. takes_scale: whether the model is one that image_cfg_scale means something to."""
    body = _body(given, IMG2IMG)
    found = _common(body, options)
    images = body["init_images"]
    if not isinstance(images, list) or len(images) != 1:
        raise ValueError("init_images: must be a list of one picture; several are not supported")
    image = reader.sent("init_images", images[0])
    found |= _controlled(body, reader, image)
    found |= {"image": image, "strength": _strength(body, body["steps"])}
    if takes_scale:
        found["image_guidance_scale"] = body["image_cfg_scale"]
    if body["mask"] is not None:
        found |= _inpainting(body, image, reader)
    found["image"] = _resized(body, found["image"])
    if "mask_image" in found:
        found["mask_image"] = _resized(body, found["mask_image"])
    return reader.asked(found, CALLED)


def _body(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """With defaults for what is not given, is null, or stands in `infotext`."""
    body = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    if body["infotext"]:
        if not isinstance(body["infotext"], str):
            raise ValueError(f"infotext: must be text, not {brief(body['infotext'])}")
        settings, _ = web_ui.read(body["infotext"])
        theirs = {name: name for name in SAME} | {"num_inference_steps": "steps", "guidance_scale": "cfg_scale"}
        body |= {name: settings[own] for own, name in theirs.items() if own in settings and name not in given}
        if "scheduler" in settings and not given.get("sampler_name"):
            body["sampler_name"] = settings["scheduler"]
    return body


def refuse(body: Mapping[str, Any], nothing: Mapping[str, tuple]) -> None:
    """Raises ValueError for what is known and not supported."""
    for name, values in nothing.items():
        value = body.get(name)
        if value is not None and value not in values:
            raise ValueError(f"{name}: {brief(value)} is not supported here")


def _common(body: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    refuse(body, NOTHING)
    _refuse_scripts(body["alwayson_scripts"])
    found = {name: body[name] for name in SAME}
    found |= {"num_inference_steps": body["steps"], "guidance_scale": body["cfg_scale"]}
    found["scheduler"] = sampler(body["sampler_name"] or body["sampler_index"], body["scheduler"])
    found |= _eta(body["eta"], found["scheduler"])
    found["count"] = whole("batch_size", body["batch_size"], 1) * whole("n_iter", body["n_iter"], 1)
    own = body["override_settings"]
    if not isinstance(own, Mapping):
        raise ValueError(f"override_settings: must be an object, not {brief(own)}")
    return found | of_settings({**options, **own})


def of_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that settings of the web UI stand for; what is unknown passes. Raises ValueError."""
    refuse(settings, NOTHING_SETTINGS)
    found: dict[str, Any] = {}
    if (layers := settings.get("CLIP_stop_at_last_layers")) is not None:
        skipped = whole("CLIP_stop_at_last_layers", layers, 1, 12) - 1
        found["clip_skip"] = skipped or None
    if (source := settings.get("randn_source")) is not None:
        found["noise"] = SOURCES[one_of("randn_source", source, SOURCES)]
    if model := settings.get("sd_model_checkpoint"):
        found["model"] = model_name(model)
    return found


def model_name(title: Any) -> str:
    """'name [hash]' -> 'name'."""
    if not isinstance(title, str):
        raise ValueError(f"sd_model_checkpoint: must be text, not {brief(title)}")
    name, bracket, rest = title.rpartition(" [")
    return name if bracket and rest.endswith("]") else title


def _refuse_scripts(scripts: Any) -> None:
    """Raises ValueError for scripts that would do something."""
    if not isinstance(scripts, Mapping):
        raise ValueError(f"alwayson_scripts: must be an object, not {brief(scripts)}")
    for name, script in scripts.items():
        if name.lower() == web_ui_controlnet.SCRIPT:
            continue
        args = script.get("args") if isinstance(script, Mapping) else script
        if args not in (None, [], {}, [False]):
            raise ValueError(f"alwayson_scripts: {brief(name)} is not supported here")


def sampler(name: Any, schedule: Any) -> str:
    """Ours of the web UI's. Raises ValueError that begins with the field."""
    for field, value in (("sampler_name", name), ("scheduler", schedule or "")):
        if not isinstance(value, str):
            raise ValueError(f"{field}: must be text, not {brief(value)}")
    if name in NAMES and not schedule:
        return name
    own = schedule or ""
    try:
        return web_ui.sampler(name[:80], SCHEDULES.get(own.lower(), own[:80]))
    except ValueError as error:
        raise ValueError(f"sampler_name: {error}") from None


def _eta(eta: Any, sampler: str) -> dict[str, Any]:
    """That of DDIM; others that add noise have 1. Raises ValueError for other values of these."""
    if eta is None or sampler == "ddim":
        return {"eta": eta or None}
    if finite("eta", eta) != 1 and ("ancestral" in sampler or "sde" in sampler):
        raise ValueError(f"eta: {eta:g} with {sampler} is not supported here; 1 is")
    return {}


def _strength(body: Mapping[str, Any], steps: Any) -> float:
    """The strength at which int(steps * strength) is int(min(denoising_strength, 0.999) * steps) + 1, as many steps as
    the web UI runs."""
    strength = finite("denoising_strength", body["denoising_strength"], 0, 1)
    steps = whole("steps", steps, 1, 10**6)
    wanted = min(steps, int(min(strength, LARGEST_STRENGTH) * steps) + 1)
    return strength if int(steps * strength) == wanted else min(1.0, round((wanted + 0.01) / steps, 6))


def _controlled(
    body: Mapping[str, Any], reader: Reader, image: Picture | None, *, is_larger: bool = False
) -> dict[str, Any]:
    """What the units of ControlNet ask for."""
    is_region = image is not None and body["mask"] is not None and body["inpaint_full_res"]
    units, size = [], image.size if is_region else (body["width"], body["height"])
    for name, script in body["alwayson_scripts"].items():
        if name.lower() == web_ui_controlnet.SCRIPT:
            units = script.get("args") if isinstance(script, Mapping) else script
    return web_ui_controlnet.fields_of(units or [], size, reader, image, is_larger=is_larger)


def _hires(body: Mapping[str, Any], reader: Reader) -> dict[str, Any]:
    refuse(body, NOTHING_HIRES)
    if body["hr_second_pass_steps"] not in (0, body["steps"]):
        raise ValueError("hr_second_pass_steps: other than steps is not supported here; give 0")
    upscaler = body["hr_upscaler"] or "Latent"
    names = [*HIRES_UPSCALERS, MODEL_UPSCALER, *reader.upscalers.paths]
    if upscaler not in names:
        raise ValueError(f"hr_upscaler: {brief(upscaler)} is not supported here; {', '.join(names)} are")
    found = {"hires_upscaler": HIRES_UPSCALERS.get(upscaler, "model")}
    if upscaler not in (*HIRES_UPSCALERS, MODEL_UPSCALER):
        found["upscaler"] = upscaler
    return found | {"hires_scale": _scale(body), "hires_strength": _strength(body, body["steps"])}


def _scale(body: Mapping[str, Any]) -> Any:
    """hr_scale, or what hr_resize_x and hr_resize_y are by."""
    sides = [(body[f"hr_resize_{axis}"], body[side]) for axis, side in (("x", "width"), ("y", "height"))]
    larger = [whole("hr_resize_x, hr_resize_y", side, 0) / whole("width, height", of, 1) for side, of in sides]
    scales = {scale for scale in larger if scale}
    if len(scales) > 1:
        raise ValueError("hr_resize_x, hr_resize_y: another shape than width and height is not supported here")
    return scales.pop() if scales else body["hr_scale"]


def _inpainting(body: Mapping[str, Any], image: Picture, reader: Reader) -> dict[str, Any]:
    mask = _mask(reader.opened("mask", pictures.decoded("mask", body["mask"]))).resize(image.size)
    if whole("inpainting_mask_invert", int(body["inpainting_mask_invert"] or 0), 0, 1):
        mask = ImageOps.invert(mask)
    fill = whole("inpainting_fill", body["inpainting_fill"], 0, 3)
    if fill > 1:
        raise ValueError("inpainting_fill: 2 and 3 are not supported here; 0 (fill) and 1 (original) are")
    blurs = [body["mask_blur_x"], body["mask_blur_y"]]
    if any(blur is not None for blur in blurs) and blurs[0] != blurs[1]:
        raise ValueError("mask_blur_x, mask_blur_y: that differ are not supported here")
    found = {"mask_image": pictures.of_image("mask", mask)}
    found["mask_blur"] = body["mask_blur"] if blurs[0] is None else blurs[0]
    if body["inpaint_full_res"]:
        found["padding_mask_crop"] = body["inpaint_full_res_padding"]
    if fill == 0:
        found["image"] = pictures.of_image("init_images", filled(image.rgb(), mask))
    return found


def _mask(image: Image.Image) -> Image.Image:
    """Grey, white where the picture is made anew: of a picture with transparency its opacity."""
    try:
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema()[0] < 255:
                return alpha
        return image.convert("L")
    except Exception:  # of many types, by codec
        raise ValueError("mask: is damaged") from None


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, with colours of what is around where the mask is white: blurred more and more narrowly."""
    kept = Image.new("RGBA", image.size)
    kept.paste(image, mask=ImageOps.invert(mask.point(lambda grey: 255 * (grey > 127))))
    result = Image.new("RGBA", image.size)
    for radius, times in FILLS:
        blurred = kept.convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(blurred)
    result.alpha_composite(kept)
    return result.convert("RGB")


def _resized(body: Mapping[str, Any], picture: Picture) -> Picture:
    """Cut to the shape of what is made, where resize_mode 1 asks for it."""
    mode = whole("resize_mode", body["resize_mode"], 0, 3)
    if mode > 1:
        raise ValueError("resize_mode: 2 and 3 are not supported here; 0 (resize) and 1 (crop and resize) are")
    if mode == 0:
        return picture
    sides = [whole(name, body[name], 1, 16384) for name in ("width", "height")]
    scale = max(one / own for one, own in zip(sides, picture.size, strict=True))
    size = tuple(min(own, round(one / scale)) for one, own in zip(sides, picture.size, strict=True))
    if not min(size):
        raise ValueError("init_images: too small for that shape")
    return pictures.of_image("init_images", ImageOps.fit(picture.rgb(), size))
