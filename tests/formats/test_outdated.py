"""Folders whose configs are old, full of other keys or at odds with model_index.json are read as PyTorch reads them."""

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import oracle
import pytest
import transformers
from references import assert_pictures, load, their_picture

from sdjax import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers

INDEX, SCHEDULER, UNET, VAE, TEXT = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
)
ABSENT = "(absent)"
OLD = {
    "_diffusers_version": "0.2.4",
    "clip_sample": True,
    "tensor_format": "pt",
    "timestep_values": None,
    "predict_epsilon": True,
    **dict.fromkeys(("steps_offset", "prediction_type", "timestep_spacing"), ABSENT),
}
"""What a scheduler's config of diffusers 0.2 says, and what not."""


def edit(path: Path, changes: dict[str, Any]) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ABSENT}))


def scheduled(folder: Path, class_name: str, changes: dict[str, Any]) -> Path:
    """The folder with another scheduler."""
    edit(folder / INDEX, {"scheduler": ["diffusers", class_name]})
    edit(folder / SCHEDULER, {"_class_name": class_name, **changes})
    return folder


def theirs(folder: Path, kind: type = diffusers.StableDiffusionPipeline, **kw: Any) -> diffusers.DiffusionPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what it corrects
        return kind.from_pretrained(folder, **kw)


@pytest.mark.parametrize(("class_name", "steps_offset"), [("PNDMScheduler", ABSENT), ("DDIMScheduler", 0)])
def test_old_folders_are_corrected(references, copied, tmp_path, class_name, steps_offset):
    folder = scheduled(copied("sd1"), class_name, OLD | {"steps_offset": steps_offset})
    edit(folder / UNET, {"_diffusers_version": "0.2.4"})
    reference = references("sd1")
    reference = reference._replace(picture=their_picture(theirs(folder), reference.call))
    corrected = "steps_offset 1 instead of 0, clip_sample False instead of True, sample_size 64 instead of 8"
    with pytest.warns(UserWarning) as warned:
        pipe = load(folder)
    assert [str(warning.message) for warning in warned] == [
        f"{folder}: outdated configs, read as PyTorch does: {corrected}"
    ]
    assert_pictures(pipe, reference)
    pipe.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (again.unet.config.sample_size, again.scheduler.config["steps_offset"]) == (64, 1)
    assert_pictures(again, reference)


@pytest.mark.parametrize(
    ("class_name", "spacing"),
    [
        ("DDPMScheduler", ABSENT),
        ("LMSDiscreteScheduler", ABSENT),
        ("EulerDiscreteScheduler", "leading"),
        ("DPMSolverMultistepScheduler", "leading"),
    ],
)
def test_old_schedulers_have_pytorchs_timesteps(copied, class_name, spacing):
    folder = scheduled(copied("sd1"), class_name, OLD | {"timestep_spacing": spacing})
    pipe = theirs(folder, text_encoder=None, unet=None, vae=None)
    pipe.scheduler.set_timesteps(7)
    with pytest.warns(UserWarning, match="steps_offset 1 instead of 0"):
        ours = load(folder).scheduler
    np.testing.assert_allclose(ours.timesteps(7), pipe.scheduler.timesteps, rtol=1e-6)
    assert ours.config["steps_offset"] == pipe.scheduler.config["steps_offset"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        *({"_diffusers_version": version} for version in ("0.8.1", "0.9.0.dev0", "0.10.2", ABSENT)),
        {"_diffusers_version": "0.2.4", "sample_size": [8, 16]},
        {"_diffusers_version": "0.2.4", "sample_size": 96},
    ],
    ids=str,
)
def test_which_sizes_are_corrected(copied, changes):
    folder = copied("sd1")
    edit(folder / UNET, changes)
    size = theirs(folder, text_encoder=None, vae=None).unet.config.sample_size
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pipe = load(folder)
    found = pipe.unet.config.sample_size
    assert (list(found) if isinstance(found, tuple) else found) == size
    assert len(warned) == (changes["_diffusers_version"] == "0.8.1")


def test_a_size_of_two_sides(copied):
    folder = copied("sd1")
    edit(folder / UNET, {"sample_size": [8, 16]})
    assert load(folder)("goose", num_inference_steps=1, output_type="latent").images.shape == (1, 8, 16, 4)


def test_an_inpainting_pipeline_skips_the_runge_kutta_steps(copied):
    folder = copied("sd1")
    edit(folder / INDEX, {"_class_name": "StableDiffusionInpaintPipeline"})
    edit(folder / SCHEDULER, {"skip_prk_steps": ABSENT})
    kind = diffusers.StableDiffusionInpaintPipeline
    assert theirs(folder, kind, text_encoder=None, vae=None).scheduler.config.skip_prk_steps
    with pytest.warns(UserWarning, match="skip_prk_steps True instead of False"):
        assert load(folder).scheduler.config["skip_prk_steps"]


@pytest.mark.parametrize("kind", ["sdxl", "lcm"])
def test_other_pipelines_are_not_corrected(references, copied, kind):
    folder = copied(kind)
    edit(folder / UNET, {"_diffusers_version": "0.2.4"})
    edit(folder / SCHEDULER, {"steps_offset": 0})
    reference = references(kind)
    pipe = theirs(folder, type(reference.pipe))
    assert_pictures(load(folder), reference._replace(picture=their_picture(pipe, reference.call)))
    edit(folder / SCHEDULER, {"_class_name": "DDIMScheduler", "clip_sample": True})
    assert load(folder).scheduler.config["clip_sample"]


@pytest.mark.parametrize(
    ("listed", "stated"),
    [
        ("DDIMScheduler", "PNDMScheduler"),
        ("DDIMScheduler", ABSENT),
        ("DDIMScheduler", "NoSuchScheduler"),
        ("LMSDiscreteScheduler", "LCMScheduler"),
        ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"),
        ("PNDMScheduler", "DDIMScheduler"),
    ],
)
def test_model_index_names_the_scheduler(references, copied, listed, stated):
    folder = scheduled(copied("sd1"), listed, {"_class_name": stated, "solver_type": "midpoint"})
    reference = references("sd1")
    pipe = theirs(folder, text_encoder=None, unet=None, vae=None)
    ours = load(folder)
    assert ours.scheduler.config["_class_name"] == type(pipe.scheduler).__name__ == listed
    pipe.scheduler.set_timesteps(7)
    np.testing.assert_allclose(ours.scheduler.timesteps(7), pipe.scheduler.timesteps, rtol=1e-6)
    if stated is ABSENT:
        assert_pictures(ours, reference._replace(picture=their_picture(theirs(folder), reference.call)))


def test_flax_classes_of_a_scheduler(copied):
    folder = scheduled(copied("sd1"), "FlaxDDIMScheduler", {"_class_name": "FlaxPNDMScheduler"})
    assert load(folder).scheduler.config["_class_name"] == "DDIMScheduler"


CLIP = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 7}


@pytest.mark.parametrize(
    "changes",
    [
        {VAE: {"_class_name": ABSENT}, UNET: {"_class_name": ABSENT}, TEXT: {"architectures": ABSENT}},
        {VAE: {"_class_name": "AutoencoderTiny"}, UNET: {"_class_name": "UNet2DModel"}, TEXT: {"architectures": None}},
        {TEXT: {"architectures": ["CLIPTextModelWithProjection"], "transformers_version": "4.21.0"}},
        {
            SCHEDULER: {
                "torch_dtype": "float16",
                "use_safetensors": True,
                "sample_max_value": 1.0,
                "of_tomorrow": None,
            },
            UNET: {"torch_dtype": "float16", "use_safetensors": True, "dropout": 0.1, "num_class_embeds": None}
            | {"decay": 0.9999, "inv_gamma": 1.0, "power": 0.7, "optimization_step": 9, "resnet_out_scale_factor": 1.0},
            VAE: {"dropout": 0.1, "latents_mean": None, "tensor_format": "pt", "of_tomorrow": False},
            TEXT: {"torch_dtype": "float16", "attention_dropout": 0.1, "initializer_range": 0.02},
        },
    ],
    ids=["no class", "another class", "another architecture", "other keys"],
)
def test_what_changes_no_picture(references, copied, changes):
    folder = copied("sd1")
    for file, keys in changes.items():
        edit(folder / file, keys)
    assert_pictures(load(folder), references("sd1"))


@pytest.mark.parametrize("key", ["text_config", "text_config_dict"])
def test_the_config_of_a_whole_clip(references, copied, key):
    folder = copied("sd1")
    own = json.loads((folder / TEXT).read_text())
    (folder / TEXT).write_text(json.dumps(CLIP | {key: own}))
    assert theirs(folder, unet=None, vae=None).text_encoder.config.hidden_size == own["hidden_size"]
    assert_pictures(load(folder), references("sd1"))


@pytest.mark.parametrize("architectures", [ABSENT, ["CLIPTextModel"]])
def test_model_index_names_the_text_encoder_with_a_projection(references, copied, architectures):
    folder = copied("sdxl")
    edit(folder / "text_encoder_2" / "config.json", {"architectures": architectures})
    assert_pictures(load(folder), references("sdxl"))


def test_a_projection_that_model_index_does_not_name_is_left_out(references, copied):
    folder = copied("sd1")
    config = json.loads((folder / TEXT).read_text())
    projected = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    projected.text_model.load_state_dict(references("sd1").pipe.text_encoder.state_dict())
    projected.save_pretrained(folder / "text_encoder")
    assert_pictures(load(folder), references("sd1"))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (INDEX, {"vae": ["diffusers", "ConsistencyDecoderVAE"]}, "vae: a ConsistencyDecoderVAE is not supported"),
        (INDEX, {"text_encoder": ["transformers", "T5EncoderModel"]}, "only CLIPTextModel or CLIPTextModelWithProj"),
        (INDEX, {"unet": ["diffusers"]}, "model_index.json: unet: .* is no library and class"),
        (INDEX, {"scheduler": "PNDMScheduler"}, "model_index.json: scheduler: .* is no library and class"),
        (INDEX, {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "scheduler_config.json: unknown sampler 'EDMEuler"),
        (SCHEDULER, {"predict_epsilon": False}, "does not support predict_epsilon=False"),
        (SCHEDULER, {"of_tomorrow": 1}, "no option 'of_tomorrow'"),
        (UNET, {"of_tomorrow": True, "center_input_sample": True}, "center_input_sample=True, of_tomorrow=True"),
        (VAE, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 3}, r"latents_mean=\(0.1, .*, latents_std=\(2.0, "),
        (TEXT, {"use_attention_mask": True}, "use_attention_mask=True"),
        (TEXT, {"text_config": "clip"}, "text_config='clip': must be an object"),
    ],
    ids=str,
)
def test_what_would_change_a_picture_is_refused(copied, file, changes, message):
    folder = copied("sd1")
    edit(folder / file, changes)
    with pytest.raises(CheckpointError, match=f"(?s)copied.*{message}"):
        load(folder)


def test_a_unet_in_place_of_another_is_corrected(folders, tmp_path):
    unet = oracle.unet(oracle.SD1.unet, 11)
    unet.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", {"_diffusers_version": "0.2.4"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            folders("sd1"), unet=diffusers.UNet2DConditionModel.from_pretrained(tmp_path), text_encoder=None
        )
    assert pipe.unet.config.sample_size == 64
    with pytest.warns(UserWarning, match="sample_size 64 instead of 8"):
        assert load(folders("sd1"), unet=tmp_path).unet.config.sample_size == 64
