"""What a picture is: one frozen record, from whose fields the call, the command, jobs and files are made.

No JAX. What these need to know of a field (its kind, its help, what its option is called) is its `Spec`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from sdjax.request import kinds
from sdjax.request.elsewhere import hint
from sdjax.request.kinds import Kind
from sdjax.request.values import (
    MAX_PICTURES,
    MAX_SEED,
    NOISE,
    PROMPT_SYNTAXES,
    UPSCALERS,
    Scale,
    is_listed,
    seeds,
    whole,
)

if TYPE_CHECKING:
    from sdjax.pictures.picture import Picture
    from sdjax.sampling import Scheduler

ID_BYTES = 10

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class Spec:
    """What surfaces need to know of a field."""

    name: str
    default: Any
    kind: Kind
    help: str
    option: str
    """of the command; "": it has none of its own"""
    label: str
    """in contact sheets; "": the value alone"""
    always: bool = False
    """whether files have it also at its default"""
    call: bool = True
    """whether it is an argument of the pipeline's call"""

    def check(self, value: Any, name: str | None = None) -> Any:
        """A value as the record has it; None, where that is the default, is the model's own.

        Raises ValueError that begins with the name, by default the field's.
        """
        return None if value is None and self.default is None else self.kind.check(name or self.name, value)

    def values(self, value: Any, name: str | None = None) -> Sequence[Any]:
        """The checked values of one value or a list of them; a range of seeds stays a range."""
        listed = [value] if self.kind.is_one(value) else value
        if self.kind is kinds.SEED:
            values = seeds(name or self.name, listed)
        else:
            values = tuple(self.check(one, name) for one in listed)
        if not len(values):
            raise ValueError(f"{name or self.name} is an empty list")
        return values

    def json(self, value: Any) -> Any:
        """A checked value as JSON, which `check` takes back."""
        return None if value is None else self.kind.json(value)


def _field(kind: Kind, help: str, default: Any = MISSING, **said: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help, **said})


def _size(what: str) -> Any:
    return _field(kinds.PAIR, f"SDXL is conditioned on {what}, HEIGHTxWIDTH in pixels", None)


class TableKey(NamedTuple):
    """The fields that a sampler's table depends on."""

    scheduler: "Scheduler | str | None"
    timestep_spacing: str | None
    num_inference_steps: int
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    guidance_interval: tuple[float, float] | None
    cfg_plus_plus: bool
    strength: float | None
    from_picture: bool
    has_mask: bool


@dataclass(frozen=True, slots=True)
class Request:
    """What makes one picture, in the words of PyTorch diffusers; what is None is the model's own.

    The constructor takes values as they are; `Spec.check` checks them, and `from_settings` a whole record. Timesteps
    or sigmas say how many steps there are: `num_inference_steps` is their number, whatever is given.
    """

    prompt: str = _field(kinds.TEXT, "What the picture shows", label="", always=True)
    _: KW_ONLY
    negative_prompt: str | None = _field(
        kinds.TEXT, "What it should not show", None, option="--negative", label="negative", always=True
    )
    prompt_2: str | None = _field(kinds.TEXT, "What SDXL's second text encoder reads [default: the prompt]", None)
    negative_prompt_2: str | None = _field(
        kinds.TEXT, "The same of the negative prompt", None, option="--negative-2", label="negative 2"
    )
    prompt_syntax: str = _field(
        kinds.choice(PROMPT_SYNTAXES),
        "web-ui: (word:1.3), [word], any length; plain: all is text, cut at 77 tokens, as in PyTorch diffusers",
        "web-ui",
        label="",
    )
    seed: int = _field(kinds.SEED, "7, or 1,5,9, or 0:16 (0 to 15): a picture each", 0, option="--seeds", always=True)
    scheduler: "Scheduler | str | None" = _field(
        kinds.SAMPLER, "See `sdjax samplers` [default: the model's]", None, option="--sampler", label=""
    )
    timestep_spacing: str | None = _field(
        kinds.choice(("leading", "trailing", "linspace")),
        "Of the timesteps; turbo models want trailing [default: the model's]",
        None,
        option="--spacing",
        label="spacing",
    )
    num_inference_steps: int = _field(
        kinds.COUNT, "Sampling steps [default: 50]", 50, option="--steps", label="steps", always=True
    )
    timesteps: tuple[float, ...] | None = _field(
        kinds.NUMBERS, "Of the steps, descending, such as 999,749,499,249, in place of their number", None
    )
    sigmas: tuple[float, ...] | None = _field(
        kinds.NUMBERS, "Noise levels of the steps, descending, and that of the end, such as 14.6,2.1,0.4,0", None
    )
    guidance_scale: float | None = _field(
        kinds.NUMBER,
        "How closely to follow the prompt; 1: no guidance [default: the model's]",
        None,
        option="--guidance",
        label="guidance",
        always=True,
    )
    guidance_rescale: float = _field(
        kinds.SHARE, "How much of the contrast that guidance adds is taken back, 0 to 1 (arXiv:2305.08891)", 0.0
    )
    guidance_interval: tuple[float, float] | None = _field(
        kinds.INTERVAL,
        "Guidance at these noise levels alone, LOW:HIGH such as 0.3:5 or 0.3:inf: steps without take half the time",
        None,
    )
    cfg_plus_plus: bool = _field(
        kinds.FLAG,
        "CFG++ (arXiv:2406.08070), with ddim, euler or euler_ancestral: a guidance_scale of 0 to 1 [default: 0.6]",
        False,
        label="cfg++",
    )
    mimic_scale: float = _field(
        kinds.FACTOR,
        "Values as large as this guidance makes them, such as 7 with a guidance_scale of 20 (Dynamic Thresholding)",
        0.0,
    )
    threshold_percentile: float = _field(
        kinds.SHARE, "With it: the part of the values, 0 to 1, that are scaled; larger ones are cut", 1.0
    )
    perp_neg_scale: float = _field(
        kinds.FACTOR,
        "How much the negative prompt counts where it does not contradict the prompt (Perp-Neg); 1 is usual",
        0.0,
    )
    image: "Picture | None" = _field(kinds.PICTURE, "A picture to start from", None)
    mask_image: "Picture | None" = _field(kinds.PICTURE, "Where that picture is made anew: white, not black", None)
    mask_blur: int = _field(kinds.PIXELS, "Pixels over which the mask's edge is blurred", 0)
    soft_mask: bool = _field(
        kinds.FLAG,
        "Whether grey says how early a pixel is free (arXiv:2306.00950); else it is cut in the middle",
        False,
    )
    outpaint: tuple[int, int, int, int] | None = _field(
        kinds.MARGINS, "LEFT,TOP,RIGHT,BOTTOM: pixels by which the picture is made larger, such as 64,0,64,0", None
    )
    keep_unmasked: bool = _field(kinds.FLAG, "Whether the picture's own pixels stay where the mask is black", True)
    padding_mask_crop: int | None = _field(
        kinds.PIXELS, "Work on the masked region alone, with so many pixels around, and put it back", None
    )
    strength: float | None = _field(
        kinds.SHARE,
        "How much of its picture is made anew, 0 to 1 [default: 0.8, with SDXL 0.3; with a mask 1, with SDXL 0.9999]",
        None,
    )
    depth_map: "Picture | None" = _field(
        kinds.PICTURE, "For SD 2 depth: a picture that is brighter where the image is nearer", None
    )
    noise_level: int | None = _field(
        kinds.WHOLE,
        "How much noise is on the image that the x4 upscaler [default: 20, at most 350] or unCLIP [default: 0] sees",
        None,
    )
    image_guidance_scale: float | None = _field(
        kinds.NUMBER, "How closely InstructPix2Pix keeps to the picture, 1 or more [default: 1.5]", None
    )
    pag_scale: float = _field(
        kinds.FACTOR, "Guidance away from pictures whose parts do not see each other (PAG); 3 is usual", 0.0
    )
    pag_applied_layers: tuple[str, ...] = _field(
        kinds.ONE_WORDS, "Where they do not: parts of the names of the UNet's layers, such as mid,up_blocks.1", ("mid",)
    )
    freeu: tuple[float, ...] | None = _field(
        kinds.ROW_OF_FACTORS, "s1,s2,b1,b2 of FreeU (arXiv:2309.11497), such as 0.9,0.2,1.5,1.6 for SD 1", None
    )
    control_image: "tuple[Picture, ...] | None" = _field(
        kinds.PICTURES, "What a ControlNet or T2I-Adapter is shown, such as edges; a picture for each", None
    )
    control_mode: tuple[int, ...] | None = _field(
        kinds.TYPES, "Of which type each picture is that a ControlNet-Union is shown, such as 3 or 0,3", None
    )
    control_preprocessor: tuple[str, ...] = _field(
        kinds.WORDS,
        "What makes of that picture what each of them is shown: canny, lineart, blur, tile, inpaint, or another of "
        "controlnet_aux",
        ("none",),
        label="control by",
    )
    controlnet_conditioning_scale: tuple[float, ...] = _field(
        kinds.FACTORS, "The weight of each of them, such as 0.8,0.5", (1.0,), label="control"
    )
    control_guidance_start: tuple[float, ...] = _field(
        kinds.SHARES, "The part of the steps after which each of them acts", (0.0,), label="control from"
    )
    control_guidance_end: tuple[float, ...] = _field(
        kinds.SHARES, "The part of the steps after which it no longer does", (1.0,), label="control to"
    )
    guess_mode: bool = _field(
        kinds.FLAG, "Whether the ControlNets guess what is shown: they act on the prompt's branch alone", False
    )
    ip_adapter_image: "tuple[tuple[Picture, ...], ...] | None" = _field(
        kinds.PICTURES_EACH, "What an IP-Adapter is shown, as a prompt; a picture, or several, for each", None
    )
    ip_adapter_mask: "tuple[tuple[Picture, ...], ...] | None" = _field(
        kinds.PICTURES_EACH, "Where each picture that an IP-Adapter is shown acts: white, not black", None
    )
    ip_adapter_scale: tuple[Scale, ...] = _field(
        kinds.SCALES,
        "How much each IP-Adapter weighs, such as 0.6; 1: as much as the text; by block as in PyTorch diffusers",
        (1.0,),
        label="ip adapter",
    )
    width: int | None = _field(kinds.SIDE, "In pixels", None, option="", always=True)
    height: int | None = _field(kinds.SIDE, "In pixels", None, option="", always=True)
    hires_scale: float | None = _field(
        kinds.SCALE, "Make the picture again so many times as large, from the small one made larger", None
    )
    hires_strength: float | None = _field(kinds.SHARE, "How much of it is made anew then, 0 to 1 [default: 0.7]", None)
    hires_upscaler: str = _field(
        kinds.choice(UPSCALERS),
        "What makes it larger before: latent, lanczos, or model, the pipeline's upscaler (an ESRGAN)",
        "latent",
    )
    clip_skip: int | None = _field(
        kinds.WHOLE,
        'Text encoder layers to leave out: 1 is the web UI\'s "Clip skip: 2"',
        None,
    )
    noise: str = _field(
        kinds.choice(NOISE),
        "The noise that a seed has here (jax), in PyTorch on a CPU (torch) or on an NVIDIA GPU (cuda)",
        "jax",
    )
    cache_interval: int | None = _field(
        kinds.COUNT,
        "Compute the UNet in full at every so many steps, its outermost layers alone at the others",
        None,
    )
    vae_tiling: bool = _field(kinds.FLAG, "Decode in overlapping tiles what is too large for the memory", False)
    loras: tuple[tuple[str, float], ...] = _field(
        kinds.LORAS,
        "A LoRA: a file or a Hub id, such as style.safetensors:0.8; repeatable",
        (),
        option="--lora",
        label="",
        call=False,
    )
    original_size: tuple[int, int] | None = _size("the size of the original")
    crops_coords_top_left: tuple[int, int] | None = _size("where its crop begins")
    target_size: tuple[int, int] | None = _size("the size of the crop")
    aesthetic_score: float | None = _field(kinds.NUMBER, "SDXL's refiner is conditioned on it [default: 6]", None)
    negative_original_size: tuple[int, int] | None = _size("the size of the negative prompt's original")
    negative_crops_coords_top_left: tuple[int, int] | None = _size("where its crop begins")
    negative_target_size: tuple[int, int] | None = _size("the size of its crop")
    negative_aesthetic_score: float | None = _field(
        kinds.NUMBER, "SDXL's refiner is conditioned on it [default: 2.5]", None
    )

    def __post_init__(self) -> None:
        steps = len(self.timesteps or ()) or len(self.sigmas or ()) - 1
        if steps > 0:
            object.__setattr__(self, "num_inference_steps", steps)

    @property
    def table_key(self) -> TableKey:
        """What its table depends on."""
        own = (getattr(self, name) for name in TableKey._fields[:-2])
        return TableKey(*own, from_picture=self.image is not None, has_mask=self.has_mask)

    @property
    def has_mask(self) -> bool:
        """Whether a part of its picture is made anew, and the rest put back."""
        return self.mask_image is not None or self.outpaint is not None

    @property
    def whole_size(self) -> tuple[int, int]:
        """(width, height) of the picture that it starts from, made larger where it says so."""
        left, top, right, bottom = self.outpaint or (0, 0, 0, 0)
        width, height = self.image.size
        return width + left + right, height + top + bottom

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(width, height): its own, else those of the picture that it starts from, or that a ControlNet is shown; None:
        the model's."""
        width, height = None, None
        if self.image is not None:
            width, height = self.whole_size
        elif self.control_image is not None:
            width, height = self.control_image[0].size
        return self.width or width, self.height or height

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt may be read: for all that is known without the model."""
        return self.cfg_plus_plus or self.guidance_scale is None or self.guidance_scale > 1

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and those that files always have, as JSON."""
        values = ((spec, getattr(self, name)) for name, spec in FIELDS.items())
        return {spec.name: spec.json(value) for spec, value in values if spec.always or value != spec.default}

    def id(self, fingerprint: str) -> str:
        """20 hexadecimal digits of BLAKE2b of the settings and of what tells the model from others."""
        known = ((spec, getattr(self, name)) for name, spec in FIELDS.items() if spec.kind.content)
        own = {spec.name: spec.kind.content(value) for spec, value in known if value is not None}
        content = _encode([self.settings() | own, fingerprint])
        return hashlib.blake2b(content.encode(), digest_size=ID_BYTES).hexdigest()


def _specs() -> dict[str, Spec]:
    specs = {}
    for own in fields(Request):
        spelled = {"option": f"--{own.name.replace('_', '-')}", "label": own.name.replace("_", " ")}
        specs[own.name] = Spec(own.name, own.default, **{**spelled, **own.metadata})
    return specs


FIELDS: Mapping[str, Spec] = MappingProxyType(_specs())
"""By name, in order"""


def spec(name: Any) -> Spec:
    """Of the field of this name. Raises ValueError for another name, with the one that it may stand for."""
    if name not in FIELDS:
        raise ValueError(f"unknown: {str(name)[:80]!r}{hint(name, FIELDS)}")
    return FIELDS[name]


def from_settings(settings: Mapping[str, Any]) -> Request:
    """The request of settings by name, such as `Request.settings` gives. Raises ValueError that names what is wrong."""
    if "prompt" not in settings:
        raise ValueError("prompt is missing")
    return Request(**{name: spec(name).check(value) for name, value in settings.items()})


def image_count(prompts: int, num_images_per_prompt: Any, seed: Any) -> int:
    """How many images a call makes; of a single prompt as many as there are seeds. Raises ValueError for none."""
    if prompts == 0:
        raise ValueError("prompt: the list is empty; give at least one prompt")
    count = prompts * whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_PICTURES)
    return len(FIELDS["seed"].values(seed)) if count == 1 and is_listed(seed) else count


def for_images(given: Mapping[str, Any], prompts: int, images: int) -> list[Request]:
    """A request for each image, from arguments that have one value, one for each prompt or one for each image.

    A single seed counts up. Raises ValueError that names the argument.
    """
    if other := next((name for name in given if not spec(name).call), None):
        raise ValueError(f"unknown: {other!r}{hint(other, ())}")
    counts = (prompts, images)
    columns = {
        name: image_seeds(value, images) if name == "seed" else spread(name, spec(name).values(value), counts, "images")
        for name, value in given.items()
    }
    return [Request(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def image_seeds(value: int | Iterable[int], images: int) -> list[int]:
    """A seed for each image; a single one counts up. Raises ValueError for another number of them."""
    found = FIELDS["seed"].values(value)
    if FIELDS["seed"].kind.is_one(value):
        return [(found[0] + i) & MAX_SEED for i in range(images)]
    if len(found) != images:
        raise ValueError(f"seed: {len(found)} seeds for {images} images; give one seed, or one for each image")
    return list(found)


def spread(name: str, values: Sequence[Any], counts: Sequence[int], of: str) -> list[Any]:
    """The values of so many as the last count is: one for all, one for each, or as many as an earlier count, of which
    each is repeated. Raises ValueError for another number of them.
    """
    if len(values) not in (1, *counts):
        choices = " or ".join(str(n) for n in sorted({1, *counts}))
        raise ValueError(f"{name}: {len(values)} values for {counts[-1]} {of}; give {choices}")
    return [value for value in values for _ in range(counts[-1] // len(values))]
