"""Pictures that are not finite are reported and counted, and those of a float16 VAE that overflows decoded again."""

import json
import shutil
from contextlib import contextmanager
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import save_file

from sdjax import NotFiniteWarning, StableDiffusionPipeline
from sdjax.models import StableDiffusionSafetyChecker
from sdjax.pictures import finite
from sdjax.runtime import parallel, programs

CALL = {
    "scheduler": "ddim",
    "num_inference_steps": 2,
    "num_images_per_prompt": 2,
    "guidance_scale": 1.0,
    "height": 16,
    "width": 16,
}


@pytest.fixture(scope="module")
def pipe(one_level_folder, tmp_path_factory):
    """In float16, the VAE as well: one that does not ask for float32."""
    folder = shutil.copytree(one_level_folder / "vae", tmp_path_factory.mktemp("vae") / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    mesh = parallel.data_mesh(jax.devices()[:1])
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder, dtype="float16", vae=folder, mesh=mesh)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def scaled(factor, *parameters):
    """Parameters that are multiplied."""
    values = [parameter.get_value() for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.set_value(value * jnp.asarray(factor, value.dtype))
    try:
        yield
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.set_value(value)


def unet(pipe):
    return pipe.unet.conv_out.kernel, pipe.unet.conv_norm_out.scale


def text_encoder(pipe):
    return (pipe.text_encoder.text_model.final_layer_norm.scale,)


def vae(pipe):
    return pipe.vae.post_quant_conv.kernel, pipe.vae.decoder.conv_in.kernel


@pytest.mark.parametrize("parts", [unet, text_encoder])
def test_a_model_that_overflows(pipe, parts):
    with scaled(6e4, *parts(pipe)), pytest.warns(NotFiniteWarning, match=r"2 of 2 .* \(seed 8, 9\): .*try dtype"):
        made = pipe("goose", seed=8, **CALL)
    assert made.not_finite == [True, True]
    assert not np.any(made.images)
    assert pipe("goose", **CALL).not_finite == [False, False]


def test_a_lora_that_is_too_strong(pipe, tmp_path):
    name = "unet.mid_block.attentions.0.proj_out"
    ones = {f"{name}.lora_A.weight": torch.ones(1, 16, 1, 1), f"{name}.lora_B.weight": torch.ones(16, 1, 1, 1)}
    save_file(ones, tmp_path / "strong.safetensors")
    pipe.load_lora(tmp_path / "strong.safetensors", 6e4)
    with pytest.warns(NotFiniteWarning, match="smaller weights of LoRAs"):
        assert pipe("goose", **CALL).not_finite == [True, True]
    pipe.unload_loras()
    assert pipe("goose", **CALL).not_finite == [False, False]


WITH_ONE = np.stack([oracle.normal(4, 4, 4), np.full((4, 4, 4), 1e30, np.float32)])


@pytest.mark.parametrize("kind", ["pil", "np", "latent"])
def test_one_picture_of_a_batch(pipe, kind):
    good = pipe("goose", latents=WITH_ONE[[0, 0]], output_type=kind, **CALL).images[0]
    with pytest.warns(NotFiniteWarning, match=r"1 of 2 .* \(seed 1\)"):
        made = pipe("goose", latents=WITH_ONE, output_type=kind, **CALL)
    assert made.not_finite == [False, True]
    assert np.array_equal(made.images[0], good)
    assert np.any(made.images[1]) == (kind != "pil")


def test_on_the_devices_nothing_is_waited_for(pipe):
    """The flags are there to be fetched, and no warning is given before."""
    made = pipe("goose", latents=WITH_ONE, output_type="jax", **CALL)
    assert isinstance(made.not_finite, jax.Array)
    assert made.not_finite.tolist() == [False, True]
    again = made.mended()
    assert again.not_finite.tolist() == [False, True]
    assert np.array_equal(again.images[0], made.images[0])


def test_embeddings_out_of_range(pipe):
    embeds = np.stack([oracle.normal(77, 24), np.full((77, 24), 1e30, np.float32)])
    with pytest.warns(NotFiniteWarning, match="1 of 2"):
        assert pipe(prompt_embeds=embeds, **CALL | {"num_images_per_prompt": 1}).not_finite == [False, True]


def test_previews(pipe):
    seen = []
    with pytest.warns(NotFiniteWarning, match=r"\(seed 1\)"):
        pipe("goose", latents=WITH_ONE, callback=lambda *args: seen.append(args[2]()), **CALL)
    assert [[bool(np.any(picture)) for picture in pictures] for pictures in seen] == [[True, False]] * 2


def test_a_vae_that_overflows_is_decoded_again_in_float32(pipe, one_level_folder):
    """To what PyTorch decodes in float32."""
    made, factor = {}, 2.0**12
    with scaled(factor, *vae(pipe)):
        for kind in ("np", "pil"):
            with pytest.warns(UserWarning, match="the VAE overflowed in float16"):
                made[kind] = pipe("goose", output_type=kind, **CALL)
        made["jax"] = pipe("goose", output_type="jax", **CALL)
        assert made["jax"].not_finite.all()
        made["jax"] = made["jax"].mended()
    latents = pipe("goose", output_type="latent", **CALL).images / pipe.vae.config.scaling_factor
    theirs = diffusers.AutoencoderKL.from_pretrained(one_level_folder / "vae").half().float().requires_grad_(False)
    theirs.post_quant_conv.weight *= factor
    theirs.decoder.conv_in.weight *= factor
    expected = np.clip(oracle.nhwc(theirs.decode(oracle.nchw(latents)).sample) / 2 + 0.5, 0, 1)
    assert np.std(expected) > 0.02
    for kind in ("np", "jax"):
        assert not np.any(made[kind].not_finite)
        np.testing.assert_allclose(made[kind].images, expected, atol=1e-4)
    assert made["pil"].not_finite == [False, False] and np.any(made["pil"].images)


def test_pictures_that_are_finite_are_not_decoded_again(pipe):
    """In a batch of which one overflows in the VAE."""
    latents = WITH_ONE[[0, 0]] * np.array([1e-3, 1], np.float32).reshape(2, 1, 1, 1)
    decoded, decode = {}, partial(programs.decode, pipe.mesh)
    for kind, factor in (("fine", 1), ("overflowing", 1e3)):
        with scaled(factor, *vae(pipe)):
            x = parallel.split(latents, pipe.mesh)
            first = decode(*pipe.network("vae"), x)
            decoded[kind] = first, pipe._mended("vae", x, decode, first)
    first, mended = decoded["fine"]
    assert mended is first
    first, mended = decoded["overflowing"]
    assert first.lost.tolist() == [False, True] and not mended.not_finite.any()
    assert np.array_equal(first.pictures[0], mended.pictures[0])
    assert np.isfinite(mended.pictures).all()


def test_a_safety_checker_hides_nothing(pipe):
    """One that flags every picture, and black ones as well; nor does a preview show what it flags."""
    previews = []
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"projection_dim": 4, "vision_config": vision | {"image_size": 8, "patch_size": 4}}
    checker = StableDiffusionSafetyChecker.from_config(config)
    checker.concept_embeds_weights.set_value(jnp.full(17, -2.0))
    pipe.safety_checker = checker
    try:
        with pytest.warns(NotFiniteWarning):
            made = pipe("goose", latents=WITH_ONE, **CALL)
            pipe("goose", latents=WITH_ONE, callback=lambda *args: previews.extend(args[2]()), **CALL)
        kept = pipe("goose", latents=WITH_ONE, output_type="jax", **CALL)
    finally:
        pipe.safety_checker = None
    assert (made.nsfw_content_detected, made.not_finite) == ([True, False], [False, True])
    assert (kept.nsfw_content_detected.tolist(), kept.not_finite.tolist()) == ([True, False], [False, True])
    assert len(previews) == 4 and not any(np.any(picture) for picture in previews)


def test_the_message_is_short():
    text = finite.message([True] * 100, range(100))
    assert text.startswith("100 of 100 pictures not finite (seed 0, 1, 2, 3, 4, 5, 6, 7, …): ")
