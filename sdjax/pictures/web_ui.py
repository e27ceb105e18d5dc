"""The text that AUTOMATIC1111's Stable Diffusion web UI writes into its pictures, which other tools read and write too.

prompt
Negative prompt: ...
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 5, Size: 512x768, Clip skip: 2, RNG: CPU
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from sdjax.request import FIELDS
from sdjax.request.kinds import json_or_text
from sdjax.sampling import NAMES, name_of

SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s": "DPM++ 2S",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}
"""By their names here"""

CFG_PLUS_PLUS = " CFG++"
"""after the name of a sampler"""
DDIM_SCALE = 12.5  # of the CFG scale there, with "DDIM CFG++" alone, to that of the paper

SCHEDULES = {
    "Karras": "use_karras_sigmas",
    "Exponential": "use_exponential_sigmas",
    "Beta": "use_beta_sigmas",
}
"""Schedule types that are options of schedulers"""

AS_IT_IS = ("Automatic", "Uniform", "Normal", "DDIM", "")
"""Schedule types for which the checkpoint's own spacing stands"""

NOISE = {"torch": "CPU", "cuda": "NV"}
NEGATIVE = "Negative prompt: "
STEPS = re.compile(r"Steps: \d+")
PAIR = re.compile(r'\s*([^:,]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
READ = ("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Clip skip", "RNG")
WITHOUT_EFFECT = ("Model hash", "VAE hash", "Version", "Lora hashes", "TI hashes")


def parameters(settings: Mapping[str, Any]) -> str:
    """The text for the settings of a picture, see `sdjax.pictures.metadata.encode`."""
    skipped = settings.get("clip_skip")
    config = settings.get("scheduler") or {}
    values = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": _sampler(settings, config),
        "Schedule type": next((kind for kind, option in SCHEDULES.items() if config.get(option)), None),
        "CFG scale": _scale(settings, config),
        "Seed": settings.get("seed"),
        "Size": f"{settings['width']}x{settings['height']}",
        "Denoising strength": settings.get("strength", settings.get("hires_strength")),
        "Hires upscale": settings.get("hires_scale"),
        "Hires upscaler": settings.get("hires_upscaler"),
        "Model": settings.get("model"),
        "VAE": settings.get("vae"),
        "Clip skip": skipped + 1 if skipped else None,  # there 1 is all layers
        "RNG": NOISE.get(settings.get("noise")),
    }
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"{NEGATIVE}{settings['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None))
    return "\n".join(lines)


def _sampler(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    name = SAMPLERS.get(_plain(config), settings.get("sampler"))
    return f"{name}{CFG_PLUS_PLUS}" if settings.get("cfg_plus_plus") else name


def _scale(settings: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    is_scaled = settings.get("cfg_plus_plus") and _plain(config) == "ddim"
    return settings["guidance_scale"] * DDIM_SCALE if is_scaled else settings.get("guidance_scale")


def _plain(config: Mapping[str, Any]) -> str | None:
    """The sampler of a config, whatever its schedule type."""
    return name_of({**config, **dict.fromkeys(SCHEDULES.values(), False)}) if config else None


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False, allow_nan=False) if set(text) & set(",:\n") else text


def read(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings as `Request` has them, what else the text says by its names) of a picture's text.

    The sampler stands for its name here, with its schedule type. Noise is that of an NVIDIA GPU where the text does not
    say CPU, as in the web UI. Raises ValueError for a text without steps and for a sampler or a schedule type that has
    no counterpart here.
    """
    lines = text.strip().split("\n")
    if not STEPS.match(lines[-1]):
        raise ValueError("no parameters as the web UI writes them: its last line does not begin with 'Steps: '")
    values = {name.strip(): _unquoted(value.strip()) for name, value in PAIR.findall(lines[-1])}
    texts = "\n".join(lines[:-1])
    prompt, _, negative = f"\n{texts}".partition(f"\n{NEGATIVE}")
    settings: dict[str, Any] = {"prompt": prompt.removeprefix("\n"), "negative_prompt": negative}
    settings["noise"] = "torch" if values.get("RNG") == "CPU" else "cuda"
    for name, field in (("Steps", "num_inference_steps"), ("CFG scale", "guidance_scale"), ("Seed", "seed")):
        if name in values:
            settings[field] = FIELDS[field].check(json_or_text(values[name]), name)
    if "Sampler" in values:
        name = values["Sampler"].removesuffix(CFG_PLUS_PLUS)
        settings["scheduler"] = sampler(name, values.get("Schedule type", ""))
        if name != values["Sampler"]:
            settings["cfg_plus_plus"] = True
            if settings["scheduler"] == "ddim" and "guidance_scale" in settings:
                settings["guidance_scale"] /= DDIM_SCALE
    if size := re.fullmatch(r"(\d{1,6})x(\d{1,6})", values.get("Size", "")):
        settings |= {"width": int(size[1]), "height": int(size[2])}
    if values.get("Clip skip", "1").isdecimal() and int(values.get("Clip skip", "1")) > 1:
        settings["clip_skip"] = int(values["Clip skip"]) - 1
    return settings, {name: value for name, value in values.items() if name not in (*READ, *WITHOUT_EFFECT)}


def sampler(name: str, schedule: str = "") -> str:
    """("DPM++ 2M", "Karras") or ("DPM++ 2M Karras") -> "dpmpp_2m_karras".

    Raises ValueError for one that has no counterpart here.
    """
    plain, _, last = name.rpartition(" ")
    if last in SCHEDULES:
        name, schedule = plain, last
    ours = next((ours for ours, theirs in SAMPLERS.items() if theirs.lower() == name.lower()), None)
    if ours is None:
        raise ValueError(f"the sampler {name!r} has no counterpart here; name another one")
    if schedule in AS_IT_IS:
        return ours
    spaced = f"{ours}_{schedule.lower()}"
    if spaced not in NAMES:
        raise ValueError(f"the sampler {name!r} with the schedule type {schedule!r} has no counterpart here")
    return spaced


def _unquoted(text: str) -> str:
    return json.loads(text) if text.startswith('"') else text
