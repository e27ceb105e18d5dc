"""The pipeline: PyTorch's pictures, what compiles, what a seed is, what an argument may be."""

import diffusers
import jax
import numpy as np
import oracle
import pytest
from compilations import compilations
from flax import nnx

import sdjax
from sdjax import sampling
from sdjax.runtime import parallel
from sdjax.sampling import loop

SIZE = {"height": 16, "width": 16}


def load(folder, devices=1, **kw):
    return sdjax.StableDiffusionPipeline.from_pretrained(folder, mesh=parallel.data_mesh(jax.devices()[:devices]), **kw)


@pytest.fixture(scope="module")
def pipe(one_level_folder):
    return load(one_level_folder)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_pictures_are_those_of_pytorch(family, request):
    folder = request.getfixturevalue(f"{family}_folder")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    latents = oracle.normal(2, 12, 8, 4)
    factor = theirs.vae_scale_factor
    call = {
        "prompt": ["a blue goose", "Goose, goose!"],
        "negative_prompt": ["", "blue"],
        "height": 12 * factor,
        "width": 8 * factor,
        "num_inference_steps": 6,
        "guidance_scale": 5.0,
        "output_type": "np",
    }
    expected = theirs(**call, latents=oracle.nchw(latents)).images
    pictures = load(folder)(**call, latents=latents).images
    assert pictures.shape == (2, 12 * factor, 8 * factor, 3)
    np.testing.assert_allclose(pictures, expected, atol=1e-4)


def test_prompts_seeds_samplers_steps_and_guidance_compile_nothing(pipe):
    pipe("goose", **SIZE)
    with compilations() as compiled:
        pipe("blue", negative_prompt="goose", seed=2**40, num_inference_steps=3, guidance_scale=3.0, **SIZE)
        for name in sampling.NAMES:
            pipe("goose", scheduler=name, num_inference_steps=11, **SIZE)
        pipe("goose", callback=lambda *_: None, num_inference_steps=2, **SIZE)
        pipe("goose", scheduler="dpmpp_2m", timesteps=[999, 650, 300], **SIZE)
        pipe("goose", scheduler="euler", sigmas=[14.6, 2.0, 0.5, 0.0], **SIZE)
        for own in ({"_class_name": "DDIMScheduler", "clip_sample": True}, {"_class_name": "PNDMScheduler"}):
            pipe("goose", scheduler=own, num_inference_steps=4, **SIZE)
    assert compiled == []
    with compilations() as compiled:
        pipe("goose", guidance_scale=1.0, **SIZE)
    assert any("denoise" in name for name in compiled)  # the counter counts: without guidance is another program


@pytest.mark.parametrize("name", ["euler_ancestral", "ddpm", "lcm"])
def test_a_refiner_goes_on_with_the_noise_of_the_base(pipe, name):
    call = {**SIZE, "seed": 7, "num_inference_steps": 10, "scheduler": name, "output_type": "latent"}
    whole = pipe("goose", **call).images
    with compilations() as compiled:
        half = pipe("goose", denoising_end=0.8, **call).images
        assert np.array_equal(pipe("goose", image=half, denoising_start=0.8, **call).images, whole)
    assert compiled == []


def test_a_seed_is_an_image(one_level_folder, pipe):
    """Alone, in a batch of 5, at another position, on 1 and 2 devices; with a sampler that adds noise."""
    call = {**SIZE, "num_inference_steps": 4, "scheduler": "euler_ancestral", "output_type": "np"}
    alone = pipe("goose", seed=7, **call).images[0]
    assert alone.std() > 0.05
    for devices in (1, 2):
        on = load(one_level_folder, devices)
        for seeds in (range(5, 10), [7, 1, 2, 3, 4]):
            images = on("goose", seed=seeds, num_images_per_prompt=5, **call).images
            np.testing.assert_allclose(images[list(seeds).index(7)], alone, atol=1 / 255)
            assert np.abs(images[0] - images[1]).max() > 0.05


def test_no_requests(pipe):
    with pytest.raises(ValueError, match="at least one request"):
        pipe.sample([])


def test_lists_give_each_image_its_own(pipe):
    call = {**SIZE, "num_inference_steps": 2, "output_type": "np"}
    both = pipe(["goose", "blue"], negative_prompt=["blue", ""], guidance_scale=[2.0, 9.0], seed=[3, 11], **call)
    assert both.seeds == [3, 11]
    for i, (prompt, negative, scale, seed) in enumerate([("goose", "blue", 2.0, 3), ("blue", "", 9.0, 11)]):
        one = pipe(prompt, negative_prompt=negative, guidance_scale=scale, seed=seed, **call).images[0]
        np.testing.assert_allclose(both.images[i], one, atol=1 / 255)


def test_one_call_mixes_samplers_and_steps(pipe):
    call = {**SIZE, "output_type": "np"}
    given = [("euler_ancestral", 3, None), ("heun", 5, (0.3, 8)), (None, 2, None)]
    names, steps, intervals = zip(*given, strict=True)
    mixed = pipe(
        "goose", seed=[3, 4, 5], scheduler=names, num_inference_steps=steps, guidance_interval=intervals, **call
    )
    assert mixed.seeds == [3, 4, 5]
    for seed, image, (name, count, interval) in zip(mixed.seeds, mixed.images, given, strict=True):
        own = {"seed": seed, "scheduler": name, "num_inference_steps": count, "guidance_interval": interval}
        np.testing.assert_allclose(image, pipe("goose", **own, **call).images[0], atol=1 / 255)


def test_pictures_can_stay_on_the_devices(pipe):
    call = {**SIZE, "num_inference_steps": 2, "num_images_per_prompt": 3}
    pictures = pipe("goose", output_type="jax", **call).images
    assert isinstance(pictures, jax.Array)
    np.testing.assert_allclose(pictures, pipe("goose", output_type="np", **call).images, atol=1e-6)


def test_a_single_seed_counts_up(pipe):
    out = pipe(["goose", "blue"], num_images_per_prompt=2, seed=41, num_inference_steps=1, **SIZE)
    assert out.seeds == [41, 42, 43, 44]
    assert len(out.images) == 4
    assert out.nsfw_content_detected is None


def test_embeddings_stand_for_prompts(pipe):
    call = {**SIZE, "num_inference_steps": 2, "output_type": "latent"}
    prompt, negative = (pipe.text_encoder(pipe.tokenizer([text])) for text in ("goose", "blue"))
    expected = pipe("goose", negative_prompt="blue", **call).images
    latents = pipe(prompt_embeds=prompt, negative_prompt_embeds=negative, **call).images
    assert latents.shape == (1, 4, 4, 4)
    np.testing.assert_allclose(latents, expected, atol=1e-4)


def test_callback_sees_every_step_and_a_preview_that_ends_on_the_picture(pipe):
    calls = []
    out = pipe("goose", num_inference_steps=5, scheduler="ddim", callback=lambda *args: calls.append(args), **SIZE)
    assert [(step, total) for step, total, _ in calls] == [(i, 5) for i in range(1, 6)]
    last = np.asarray(calls[-1][2]()[0], np.int32)
    assert np.abs(last - np.asarray(out.images[0], np.int32)).max() <= 1


def test_parts_can_be_replaced_and_changed(one_level_folder):
    pipe = load(one_level_folder)
    call = {**SIZE, "num_inference_steps": 2, "output_type": "np"}
    before = pipe("goose", **call).images
    pipe.scheduler = "euler"
    assert pipe.scheduler.config["_class_name"] == "EulerDiscreteScheduler"
    assert pipe.scheduler.config["beta_end"] == 0.012
    pipe.scheduler = "pndm"
    pipe.vae.decoder.conv_out.bias[...] += 0.5
    inside = (before > 0) & (before < 0.75)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(pipe("goose", **call).images[inside], before[inside] + 0.25, atol=1e-5)
    pipe.vae = sdjax.AutoencoderKL.from_pretrained(one_level_folder, subfolder="vae")
    np.testing.assert_allclose(pipe("goose", **call).images, before, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_saved_pipeline_runs_in_pytorch(sd1_folder, tmp_path, dtype):
    load(sd1_folder, dtype=dtype).save_pretrained(tmp_path / "saved")
    pipe = load(tmp_path / "saved")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    latents = oracle.normal(1, 4, 4, 4)
    call = {**SIZE, "num_inference_steps": 3, "output_type": "np"}
    expected = theirs("a blue goose", latents=oracle.nchw(latents), **call).images
    np.testing.assert_allclose(pipe("a blue goose", latents=latents, **call).images, expected, atol=1e-4)


def test_bfloat16_is_near_float32(one_level_folder, pipe):
    call = {**SIZE, "num_inference_steps": 3, "output_type": "np"}
    half = load(one_level_folder, dtype="bfloat16")("goose", **call).images
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, pipe("goose", **call).images, atol=0.1)


def test_a_long_prompt_is_read_to_its_end(pipe):
    call = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "np", **SIZE}
    long = "goose " * 80
    pictures = [pipe(long + end, negative_prompt="blue", **call).images for end in ("", "blue", "blue")]
    assert np.array_equal(pictures[1], pictures[2])
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": [3]}, "prompt must be text"),
        ({"prompt_embeds": np.zeros((1, 77, 24))}, "either prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 77, 23))}, r"prompt_embeds.* 24\], not \[1, 77, 23\]"),
        ({"height": 18}, "height must be a positive multiple of 4, not 18"),
        ({"width": 0}, "width must be a whole number, from 1 to 1000000, not 0"),
        ({"width": -8}, "width must be a whole number, from 1 to 1000000, not -8"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number, 1 or more, not 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number from -1e.06 to 1e.06, not nan"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number from -1e.06 to 1e.06, not '7'"),
        ({"guidance_rescale": float("inf")}, "guidance_rescale must be a finite number from 0 to 1, not inf"),
        ({"noise": "mps"}, "noise must be one of jax, torch, cuda, not 'mps'"),
        ({"denoising_start": 0.5}, "denoising_start: only with image"),
        ({"denoising_end": 0.0}, "denoising_end=0.0"),
        ({"prompt": "<lora:x:1>"}, "does not load networks"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale: 2 values for 1 images"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 values for 1 images"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2.64 - 1, not -1"),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": 1.5}, "seed must be a whole number from 0 to 2.64 - 1, not 1.5"),
        ({"seed": [1, 2, 3], "num_images_per_prompt": 2}, "3 seeds for 2 images"),
        ({"latents": np.zeros((1, 4, 5, 4))}, r"latents must have shape \[1, 4, 4, 4\], not \[1, 4, 5, 4\]"),
        ({"latents": np.full((1, 4, 4, 4), np.nan)}, "latents has values that are not finite"),
        ({"scheduler": "dpmp_2m"}, "unknown sampler 'dpmp_2m'; did you mean 'dpmpp_2m'"),
        ({"generator": 1}, "unknown: 'generator'; here it is seed"),
        ({"target_size": (8, 8)}, "target_size: only SDXL is conditioned on it"),
        ({"seed": [1, 2], "height": [16, 32]}, "the pictures of a batch have one size"),
        ({"output_type": "png"}, "output_type must be one of pil, np, jax, latent"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_computed(pipe, arguments, message):
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "goose", **SIZE, **arguments})
    assert compiled == []


def test_a_checkpoint_of_another_kind_is_named(one_level_folder, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(sdjax.CheckpointError, match="FluxPipeline is not supported"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "none")
    with pytest.raises(sdjax.CheckpointError, match="not a checkpoint folder"):
        load(one_level_folder / "unet")


def test_a_pipeline_by_hand_is_the_pipeline(one_level_folder, pipe):
    """The README's example, on a tiny model: parts loaded one by one, K-LMS, own guidance."""
    folder, prompt, steps, scale = str(one_level_folder), ["a blue goose"], 5, 7.5
    tokenizer = sdjax.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = sdjax.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    unet = sdjax.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    vae = sdjax.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    scheduler = sampling.from_config("lms", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    negative, text = text_encoder(tokenizer([""])), text_encoder(tokenizer(prompt))

    def f(x, t):
        u, c = unet(x, t, negative), unet(x, t, text)
        return u + scale * (c - u)

    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    table = scheduler.table(steps)
    x = loop.denoise(f, table, latents * table.init_noise_sigma, lambda row: 0 * latents)
    image = nnx.jit(lambda vae, x: vae.decode(x))(vae, x / vae.config.scaling_factor)

    call = {**SIZE, "num_inference_steps": steps, "scheduler": scheduler, "output_type": "np"}
    expected = pipe(prompt, latents=latents, **call).images
    np.testing.assert_allclose(np.clip(image / 2 + 0.5, 0, 1), expected, atol=1e-3)
