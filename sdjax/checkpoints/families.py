"""The families of Stable Diffusion by their published folders: what does not follow from a checkpoint's tensors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdjax.checkpoints.configs import TIME_ID_WIDTH
from sdjax.checkpoints.errors import CheckpointError

EOS, BANG = "<|endoftext|>", "!"
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"steps_offset": 1, "timestep_spacing": "leading"}
PIPELINES = {
    4: "StableDiffusionPipeline",
    5: "StableDiffusionDepth2ImgPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    9: "StableDiffusionInpaintPipeline",
}
XL_PIPELINES = {
    4: "StableDiffusionXLPipeline",
    8: "StableDiffusionXLInstructPix2PixPipeline",
    9: "StableDiffusionXLInpaintPipeline",
}
OTHER_CHANNELS = {7: "the x4 upscaler in one file"}
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


@dataclass(frozen=True)
class Family:
    """pipelines: UNet's input channels -> class. tokenizers: name -> padding token. sample_size: of the latents.
    time_ids: how many of them SDXL's UNet is conditioned on. index, unet: further entries of these configs.
    distilled: pattern of the names of models that were distilled to few steps -> their scheduler."""

    pipelines: Mapping[int, str]
    scheduler: Mapping[str, Any]
    scaling_factor: float
    sample_size: int
    tokenizers: Mapping[str, str]
    time_ids: int = 0
    index: Mapping[str, Any] = field(default_factory=dict)
    unet: Mapping[str, Any] = field(default_factory=dict)
    distilled: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        """The models that a pipeline of this family needs."""
        return ("unet", "vae", *(name.replace("tokenizer", "text_encoder") for name in self.tokenizers))


UNCHECKED = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
EULER = {"_class_name": "EulerDiscreteScheduler", **SCHEDULE, **LEADING, "interpolation_type": "linear"}
TRAILING_EULER = {**EULER, "timestep_spacing": "trailing"}
LCM = {"_class_name": "LCMScheduler", **SCHEDULE, **LEADING, "original_inference_steps": 50, "set_alpha_to_one": True}
LCM_PIPELINES = {"StableDiffusionPipeline": "LatentConsistencyModelPipeline"}
SD1 = Family(
    PIPELINES,
    {"_class_name": "PNDMScheduler", **SCHEDULE, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True},
    scaling_factor=0.18215,
    sample_size=64,
    tokenizers={"tokenizer": EOS},
    index=UNCHECKED,
)
SD2 = Family(
    PIPELINES,
    {"_class_name": "DDIMScheduler", **SCHEDULE, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    scaling_factor=0.18215,
    sample_size=64,
    tokenizers={"tokenizer": BANG},
    index=UNCHECKED,
    unet={"upcast_attention": True},
    distilled={r"(sd|stable[-_ ]diffusion)[-_ ]?turbo": {**TRAILING_EULER, "prediction_type": "epsilon"}},
)
XL = r"(sd|stable[-_ ]diffusion)[-_ ]?xl[-_ ]?"
SDXL = Family(
    XL_PIPELINES,
    EULER,
    scaling_factor=0.13025,
    sample_size=128,
    tokenizers={"tokenizer": EOS, "tokenizer_2": BANG},
    time_ids=6,  # original size, crop, target size
    index={"force_zeros_for_empty_prompt": True},
    distilled={
        rf"{XL}turbo": {
            "_class_name": "EulerAncestralDiscreteScheduler",
            **SCHEDULE,
            **LEADING,
            "timestep_spacing": "trailing",
        },
        rf"{XL}lightning[-_ ]1[-_ ]?step": {**TRAILING_EULER, "prediction_type": "sample"},
        rf"({XL}|koala[-_ ])lightning": TRAILING_EULER,
    },
)
REFINER = Family(
    {4: "StableDiffusionXLImg2ImgPipeline"},
    EULER,
    scaling_factor=0.13025,
    sample_size=128,
    tokenizers={"tokenizer_2": BANG},
    time_ids=5,  # original size, crop, aesthetic score
    index={
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
    },
)
SD2_VELOCITY_SIZE = 96


def recognised(unet: Mapping[str, Any], pooled_width: int | None) -> Family:
    """The family of a UNet's config; pooled_width: of the second text encoder's pooled state, None if it is not there.

    SDXL takes pooled text; its refiner reads the second text encoder's states alone, which are as wide. SD 2 has linear
    projections.
    """
    if "addition_embed_type" in unet:
        added, width = unet["projection_class_embeddings_input_dim"], unet["cross_attention_dim"]
        pooled_width = pooled_width or added - REFINER.time_ids * TIME_ID_WIDTH
        return REFINER if width == pooled_width else SDXL
    return SD2 if unet["use_linear_projection"] else SD1


def model_index(family: Family, in_channels: int, scheduler_class: str, *, source: Path) -> dict[str, Any]:
    """model_index.json. Raises CheckpointError for a UNet with a number of channels that no pipeline here feeds."""
    if in_channels not in family.pipelines:
        known = OTHER_CHANNELS.get(in_channels, "an unknown kind of model")
        raise CheckpointError(f"{source}: its UNet takes {in_channels} channels: {known}, which is not supported")
    names, pipeline = (*family.components, *family.tokenizers), family.pipelines[in_channels]
    if scheduler_class == LCM["_class_name"]:
        pipeline = LCM_PIPELINES.get(pipeline, pipeline)
    index = {"_class_name": pipeline, **{name: CLASSES[name] for name in names}}
    return {**index, "scheduler": ["diffusers", scheduler_class], **family.index}


def distilled(family: Family, unet: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """The scheduler of a model that was distilled to few steps, as it was published; empty for any other.

    An LCM's UNet takes the guidance scale. Others have no other tensors than the model that they were made of: these
    are known by the names that they were published under. names: of the file, and what its header calls it.
    """
    if "time_cond_proj_dim" in unet:
        return LCM
    text = "\n".join(names).lower()
    found = (own for name, own in family.distilled.items() if re.search(rf"(?<![a-z0-9])({name})(?![a-z])", text))
    return next(found, {})


def scheduler(family: Family, distilled: Mapping[str, Any], prediction_type: str, *, zero_snr: bool) -> dict[str, Any]:
    """scheduler_config.json; zero_snr: the model was trained to zero terminal SNR (arXiv:2305.08891)."""
    if not zero_snr:
        return {**(distilled or family.scheduler), "prediction_type": prediction_type}
    known = distilled or (SD2.scheduler if family is SD1 else family.scheduler)  # PNDM knows no zero SNR
    trained = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**known, "prediction_type": prediction_type, **trained}


def completed(family: Family, models: Mapping[str, dict], prediction_type: str) -> dict[str, dict[str, Any]]:
    """The configs of the UNet and, if it is there, of the VAE, with what the family adds to them."""
    unet, vae = models["unet"], models.get("vae")
    velocity = family is SD2 and prediction_type == "v_prediction"
    size = SD2_VELOCITY_SIZE if velocity else family.sample_size
    unet = {**unet, "sample_size": size, **family.unet}
    if family.time_ids:
        pooled_width = models.get("text_encoder_2", {}).get("projection_dim")
        added = unet["projection_class_embeddings_input_dim"]
        width = (added - pooled_width) // family.time_ids if pooled_width else TIME_ID_WIDTH
        unet["addition_time_embed_dim"] = width
    if vae is None:
        return {"unet": unet}
    pixels = size * 2 ** (len(vae["block_out_channels"]) - 1)
    return {"unet": unet, "vae": {**vae, "sample_size": pixels, "scaling_factor": family.scaling_factor}}
