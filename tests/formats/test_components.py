"""Another component than the checkpoint's gives PyTorch's picture of the two together."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import oracle
import original_layout as layout
import pytest
import torch
from references import TOLERANCE, VAE_FILE, assert_pictures, load, load_file_of, with_component
from saved_formats import networks
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from sdjax import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers

OTHER = {
    "vae": lambda: oracle.vae(oracle.SD1.vae, 12),
    "unet": lambda: oracle.unet(oracle.SD1.unet, 11),
    "text_encoder": lambda: oracle.text_encoder(oracle.SD1.text, 13),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("given", ["folder", "pipeline", "model"])
def test_another_component(references, folders, tmp_path, name, given):
    module = OTHER[name]()
    expected = with_component(references("sd1"), **{name: module})
    assert np.abs(expected.picture - references("sd1").picture).max() > 0.01
    source = tmp_path / name if given == "folder" else tmp_path
    module.save_pretrained(tmp_path / name)
    if given == "model":
        source = getattr(load(folders("sd1"), **{name: tmp_path}), name)
    assert_pictures(load(folders("sd1"), **{name: source}), expected)


@pytest.mark.parametrize("name", ["vae", "unet", "text_encoder"])
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_another_component_in_one_file(singles, tmp_path, name, spelling):
    """Of a file that holds this model alone; in the original spelling with its prefix."""
    reference, configs, tensors = singles("sd1")
    module = oracle.randomised(layout.model(name, configs[name]), 20)
    states = {part: layout.state(model) for part, model in networks(reference.pipe).items()}
    part = states[name] = layout.state(module)
    if spelling == "original":
        prefix = {"vae": layout.VAE, "unet": layout.UNET}.get(name, "cond_stage_model.")
        part = {k: x for k, x in layout.original("sd1", states, configs).items() if k.startswith(prefix)}
    file = layout.written(tmp_path / "part", part)
    path = layout.written(tmp_path, tensors)
    assert_pictures(load(path, **{name: file}), with_component(reference, **{name: module}))


@pytest.mark.parametrize("given", ["replacement", "component"])
def test_the_text_encoder_of_a_whole_clip(references, copied, tmp_path, given):
    """As PyTorch reads it where the folder of a text encoder has all of CLIP."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=oracle.SD1.text, vision_config={**vision, "image_size": 32}, projection_dim=20)
    folder = copied("sd1")
    whole = folder / "text_encoder" if given == "component" else tmp_path / "clip"
    shutil.rmtree(folder / "text_encoder")
    oracle.randomised(CLIPModel(config), 14).save_pretrained(whole)
    text = CLIPTextModel.from_pretrained(whole).requires_grad_(False)
    pipe = load(folder, **({} if given == "component" else {"text_encoder": whole}))
    assert_pictures(pipe, with_component(references("sd1"), text_encoder=text))
    if given == "component":
        pipe.save_pretrained(tmp_path / "saved")
        assert len(CLIPTextModel.from_pretrained(tmp_path / "saved" / "text_encoder").state_dict()) == len(
            text.state_dict()
        )


def test_a_vae_file_has_the_scaling_factor_of_its_pipeline(references, singles, copied, tmp_path):
    """SD's and SDXL's are of one shape."""
    module = oracle.randomised(layout.model("vae", layout.TINY["sd1"]["vae"]), 30)
    module.register_to_config(scaling_factor=0.13025)
    file = layout.written(tmp_path / "vae", layout.state(module))
    expected = with_component(references("sdxl"), vae=module)
    folder = copied("sdxl")
    (folder / VAE_FILE).unlink()  # not needed
    pipe = load(folder, vae=file)
    assert pipe.vae.config.scaling_factor == 0.13025
    assert_pictures(pipe, expected)
    reference, _, tensors = singles("sdxl")
    without = {name: x for name, x in tensors.items() if not name.startswith(layout.VAE)}
    path = layout.written(tmp_path / "single", without)
    with pytest.raises(CheckpointError, match="holds no vae; give vae="):
        load(path)
    pipe = load(path, vae=file)
    assert pipe.vae.config.scaling_factor == 0.13025
    assert_pictures(pipe, with_component(reference, vae=module))


TAESD = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}


@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_tiny_autoencoder(references, folders, tmp_path, given):
    module = oracle.randomised(diffusers.AutoencoderTiny(**TAESD), 40)
    module.save_pretrained(tmp_path)
    source = tmp_path if given == "folder" else tmp_path / Path(VAE_FILE).name
    assert_pictures(load(folders("sd1"), vae=source), with_component(references("sd1"), vae=module))


def test_previews_of_the_tiny_autoencoder(references, folders, tmp_path):
    reference = references("sd1")
    module = oracle.randomised(diffusers.AutoencoderTiny(**TAESD), 40)
    module.save_pretrained(tmp_path)
    previews = []
    pipe = load(folders("sd1"), preview_vae=tmp_path, scheduler="euler")
    call = reference.call | {"callback": lambda step, total, preview: previews.append(preview())}
    latents = pipe(**call | {"output_type": "latent"}).images
    with torch.no_grad():
        shown = oracle.nhwc(module.decode(oracle.nchw(latents)).sample)
    [last] = previews[-1]
    np.testing.assert_allclose(np.asarray(last) / 255, (shown[0] / 2 + 0.5).clip(0, 1), atol=1 / 255)
    np.testing.assert_array_equal(
        pipe(**reference.call).images, load(folders("sd1"), scheduler="euler")(**reference.call).images
    )


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> tuple[diffusers.AutoencoderTiny, Path]:
    """As TAESD's repository has it: each half an nn.Sequential, the decoder's with a bound of the latents first."""
    module, folder = oracle.randomised(diffusers.AutoencoderTiny(**TAESD), 40), tmp_path_factory.mktemp("halves")
    torch.save(module.encoder.layers.state_dict(), folder / "taesd_encoder.pth")
    torch.save(
        torch.nn.Sequential(torch.nn.Identity(), *module.decoder.layers).state_dict(), folder / "taesd_decoder.pth"
    )
    return module, folder


@pytest.mark.parametrize("given", ["encoder", "decoder"])
def test_the_tiny_autoencoder_in_its_own_files(references, folders, halves, given):
    module, folder = halves
    pipe = load(folders("sd1"), vae=folder / f"taesd_{given}.pth")
    assert_pictures(pipe, with_component(references("sd1"), vae=module))
    images = oracle.normal(1, 16, 24, 3)
    with torch.no_grad():
        expected = oracle.nhwc(module.encode(oracle.nchw(images)).latents)
    oracle.assert_close(pipe.vae.encode(images).mean, expected, TOLERANCE)


@pytest.mark.parametrize("name", ["taesd_decoder.pth", "decoder.safetensors", "preview.PT"])
def test_a_decoder_alone_is_enough_for_previews(folders, halves, tmp_path, name):
    module, folder = halves
    shutil.copy(folder / "taesd_decoder.pth", tmp_path / name)
    previewer = load(folders("sd1"), preview_vae=tmp_path / name).preview_vae
    latents = oracle.normal(1, 8, 8, 4)
    with torch.no_grad():
        expected = oracle.nhwc(module.decode(oracle.nchw(latents)).sample)
    oracle.assert_close(previewer.decode(latents), expected, TOLERANCE)
    with pytest.raises(CheckpointError, match=f"{name}: a decoder alone, enough for preview_vae; for vae put"):
        load(folders("sd1"), vae=tmp_path / name)


def test_halves_of_a_tiny_autoencoder_that_do_not_do(folders, halves, tmp_path):
    _, folder = halves
    shutil.copy(folder / "taesd_encoder.pth", tmp_path)
    with pytest.raises(CheckpointError, match=r"taesd_encoder\.pth: TAESD's encoder alone, which cannot decode"):
        load(folders("sd1"), preview_vae=tmp_path / "taesd_encoder.pth")
    shutil.copy(folder / "taesd_encoder.pth", tmp_path / "taesd_decoder.pth")
    with pytest.raises(CheckpointError, match=r"taesd_decoder\.pth: is not the decoder of taesd_encoder\.pth"):
        load(folders("sd1"), preview_vae=tmp_path / "taesd_encoder.pth")


def test_without_a_text_encoder(references, folders):
    reference = references("sd1")
    pipe = load(folders("sd1"), text_encoder=None)
    with pytest.raises(ValueError, match="no text encoder: give prompt_embeds"):
        pipe("goose", height=32, width=32)
    states, negative = reference.pipe.encode_prompt("a blue goose", "cpu", 1, True, "goose")
    call = {k: v for k, v in reference.call.items() if "prompt" not in k}
    pictures = pipe(**call, prompt_embeds=states.numpy(), negative_prompt_embeds=negative.numpy()).images
    oracle.assert_close(pictures, reference.picture, TOLERANCE)


def test_components_that_cannot_be(folders, singles, tmp_path):
    folder = folders("sd1")
    with pytest.raises(ValueError, match="vae: a pipeline cannot be without"):
        load(folder, vae=None)
    with pytest.raises(ValueError, match="unknown: 'tokeniser'; known are text_encoder, "):
        load(folder, tokeniser=folder)
    with pytest.raises(ValueError, match="vae: must be AutoencoderKL or AutoencoderTiny, not UNet2DConditionModel"):
        load(folder, vae=load(folder).unet)
    file = layout.written(tmp_path, singles("sd1").tensors)
    with pytest.raises(ValueError, match="unet: a pipeline cannot be without"):
        load_file_of(file, unet=None)
    alone = {k: x for k, x in singles("sd1").tensors.items() if k.startswith(layout.VAE)}
    alone = layout.written(tmp_path / "vae", alone)
    with pytest.raises(CheckpointError, match=f"{alone}: holds no unet, only vae"):
        load(folder, unet=alone)
    with pytest.raises(CheckpointError, match=f"{alone}: holds no unet; give unet="):
        load(alone)
    with pytest.raises(FileNotFoundError, match=r"nest\.safetensors: no such file"):
        load(tmp_path / "nest.safetensors")
