"""Every pipeline class of the installed diffusers that has the components of Stable Diffusion is read or refused."""

import inspect
import json
import re
import shutil

import diffusers
import numpy as np
import oracle
import pytest
from diffusers import pipelines as theirs

import sdjax
from sdjax.checkpoints.pipelines import READ_AS, SUPPORTED, kinds_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]
NOT_PICTURES = (
    "MarigoldDepthPipeline",
    "MarigoldIntrinsicsPipeline",
    "MarigoldNormalsPipeline",
    "TextToVideoZeroPipeline",
    "TextToVideoZeroSDXLPipeline",
)
OTHER_NETWORKS = (
    "StableDiffusionGLIGENPipeline",  # attention to boxes in the UNet
    "StableDiffusionGLIGENTextImagePipeline",
    "StableDiffusionLDM3DPipeline",  # six channels of the VAE
    "StableUnCLIPPipeline",
)
SAFE = ("StableDiffusionPipelineSafe",)  # whose guidance would be missed
KNOWN = {
    "self": None,
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "controlnet": ("ControlNetModel", "ControlNetUnionModel"),
    "adapter": "T2IAdapter",
}
REQUIRED = ("text_encoder", "tokenizer", "unet", "vae")


def classes():
    names = {name for own in theirs._import_structure.values() for name in own}
    found = {name: getattr(theirs, name, None) for name in names}
    return {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, diffusers.DiffusionPipeline)}


def has_our_components(kind):
    parameters = inspect.signature(kind.__init__).parameters
    types = {name: set(re.findall(r"\w+", str(own.annotation))) for name, own in parameters.items()}
    known = {name: {own} if isinstance(own, str) else {*own} for name, own in KNOWN.items() if own}
    fits = all(own & types[name] for name, own in known.items() if name in types)
    taken = {"UNetMotionModel", "MotionAdapter", "Blip2QFormerModel"}.isdisjoint(set().union(*types.values()))
    return fits and taken and all(name in types for name in REQUIRED)


def test_every_class_is_known():
    fitting = {name for name, kind in classes().items() if has_our_components(kind)}
    assert fitting == {*SUPPORTED, *READ_AS, *NOT_PICTURES, *OTHER_NETWORKS, *SAFE}
    assert set(READ_AS.values()) <= set(SUPPORTED)


def renamed(folder, name, **more):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name} | more))
    return folder


def test_a_folder_is_read_as_another_class(sd1_folder, tmp_path):
    folder = shutil.copytree(sd1_folder, tmp_path / "copied")
    for name, kind in READ_AS.items():
        assert kinds_of(renamed(folder, name)) == (name, kind)
    options = {"pag_applied_layers": "mid", "inverse_scheduler": ["diffusers", "DDIMInverseScheduler"]}
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(renamed(folder, "StableDiffusionDiffEditPipeline", **options))
    assert pipe.config["_class_name"] == "StableDiffusionPipeline" and options.keys().isdisjoint(pipe.config)


def test_others_are_refused_by_name(sd1_folder, tmp_path):
    folder = shutil.copytree(sd1_folder, tmp_path / "copied")
    for name in (*NOT_PICTURES, *OTHER_NETWORKS, *SAFE, "KolorsPAGPipeline", "AnimateDiffPipeline"):
        with pytest.raises(sdjax.CheckpointError, match=f"a {name} is not supported; supported: "):
            sdjax.StableDiffusionPipeline.from_pretrained(renamed(folder, name))


def test_what_pytorch_saves_of_pag_is_read_and_saved(sd1_folder, tmp_path):
    options = {"safety_checker": None, "pag_applied_layers": ["mid", "up_blocks.1"]}
    pag = diffusers.StableDiffusionPAGPipeline.from_pretrained(sd1_folder, **options)
    pag.set_progress_bar_config(disable=True)
    pag.save_pretrained(tmp_path / "pag")
    ours = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "pag")
    call = {"num_inference_steps": 3, "pag_scale": 2.0, "output_type": "np", "prompt": "a goose"}
    noise = oracle.normal(1, 8, 8, 4)
    expected = pag(latents=oracle.nchw(noise), **call).images
    made = ours(latents=noise, pag_applied_layers=["mid", "up_blocks.1"], **call).images
    np.testing.assert_allclose(made, expected, atol=1e-4)
    ours.save_pretrained(tmp_path / "saved")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is diffusers.StableDiffusionPipeline
