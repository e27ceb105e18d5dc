"""Every family of checkpoints gives PyTorch's picture, and what one pipeline hands on to the next."""

from dataclasses import replace

import diffusers
import jax
import numpy as np
import oracle
import pytest
import torch

import sdjax
from sdjax.runtime import parallel
from sdjax.sampling.noise import seed_keys

CALL = {"num_inference_steps": 4, "output_type": "np"}
SIZE = {"height": 16, "width": 24}
TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers


def load(folder, **kw):
    return sdjax.StableDiffusionPipeline.from_pretrained(folder, mesh=parallel.data_mesh(jax.devices()[:1]), **kw)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return oracle.save_pipeline(tmp_path_factory.mktemp("xl"), oracle.SDXL)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    return oracle.save_pipeline(tmp_path_factory.mktemp("refiner"), oracle.REFINER)


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    return oracle.save_pipeline(tmp_path_factory.mktemp("lcm"), oracle.LCM)


@pytest.fixture(scope="module")
def xl_pipe(xl):
    return load(xl)


def theirs(folder, **kw):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **kw)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same(pictures, expected):
    oracle.assert_close(pictures, expected, TOLERANCE)
    assert np.std(expected) > 0.05


SDXL_CALLS = {
    "plain": {},
    "no negative prompt is zeros, an empty one is not": {"negative_prompt": ""},
    "negative": {"negative_prompt": "blue", "guidance_scale": 7.0},
    "two prompts": {"prompt_2": "goose", "negative_prompt": "goose", "negative_prompt_2": "blue"},
    "sizes": {
        "original_size": (64, 48),
        "crops_coords_top_left": (3, 5),
        "target_size": (32, 40),
        "negative_original_size": (16, 16),
        "negative_target_size": (8, 8),
    },
    "clip skip": {"clip_skip": 1},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "no guidance": {"guidance_scale": 1.0},
    "no guidance, trailing": {"guidance_scale": 0.0, "num_inference_steps": 1},
}


@pytest.mark.parametrize("arguments", SDXL_CALLS.values(), ids=SDXL_CALLS)
def test_sdxl(xl, xl_pipe, arguments):
    latents = oracle.normal(1, 8, 12, 4)
    call = {"prompt": "a blue goose", **SIZE, **CALL, **arguments}
    assert_same(xl_pipe(**call, latents=latents).images, theirs(xl)(**call, latents=oracle.nchw(latents)).images)


@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder", "xl", "lcm"])
def test_trajectories(request, family):
    """The latents after every step, not only the last."""
    folder = request.getfixturevalue(family)
    pytorch, pipe = theirs(folder), load(folder)
    if family == "lcm":  # its own sampler draws noise
        pytorch.scheduler = diffusers.TCDScheduler.from_config(pytorch.scheduler.config)
        step = pytorch.scheduler.step
        pytorch.scheduler.step = lambda *args, return_dict: step(*args, eta=0.0, return_dict=return_dict)
        pipe.scheduler = {**pipe.scheduler.config, "_class_name": "TCDScheduler", "eta": 0.0}
    latents, steps = oracle.normal(1, 8, 12, 4), []
    factor = pipe.vae.config.factor
    call = {"prompt": "a blue goose", "height": 8 * factor, "width": 12 * factor, "num_inference_steps": 4}
    call |= {"guidance_scale": 5.0, "output_type": "latent"}

    def keep(pipe, number, t, tensors):
        steps.append(oracle.nhwc(tensors["latents"]))
        return {}

    pytorch(**call, latents=oracle.nchw(latents), callback_on_step_end=keep)
    t = pipe.scheduler.timesteps(4)
    assert len(t) == len(steps)
    ends = [1 - (after + 1) / 1000 for after in t[1:]] + [1.0]
    for end, before, expected in zip(ends, t, steps, strict=True):
        if end > 1 - before / 1000:  # PLMS evaluates one timestep twice, between which nobody can stop
            oracle.assert_close(pipe(**call, latents=latents, denoising_end=end).images, expected, TOLERANCE)


def test_sdxl_embeddings_stand_for_prompts(xl, xl_pipe):
    latents = oracle.normal(1, 8, 12, 4)
    pipe = theirs(xl)
    states, negative, pooled, negative_pooled = pipe.encode_prompt("a blue goose", negative_prompt="blue")
    given = {
        "prompt_embeds": states,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    expected = pipe(**given, **SIZE, **CALL, latents=oracle.nchw(latents)).images
    given = {name: value.detach().numpy() for name, value in given.items()}
    assert_same(xl_pipe(**given, **SIZE, **CALL, latents=latents).images, expected)
    with pytest.raises(ValueError, match="pooled"):
        xl_pipe(prompt_embeds=given["prompt_embeds"], **SIZE)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_the_refiner_goes_on_where_the_base_stops(xl, refiner, scheduler):
    """An ensemble of experts, as PyTorch's two pipelines do it."""
    latents = oracle.normal(1, 8, 12, 4)
    call = {"prompt": "a blue goose", "negative_prompt": "blue", "num_inference_steps": 10}
    base, second = theirs(xl), theirs(refiner)
    for pipe in (base, second):
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    half = base(**call, **SIZE, latents=oracle.nchw(latents), denoising_end=0.7, output_type="latent").images
    expected = second(**call, image=half, denoising_start=0.7, output_type="np").images
    ours, refine = load(xl, scheduler=scheduler), load(refiner, scheduler=scheduler)
    ours_half = ours(**call, **SIZE, latents=latents, denoising_end=0.7, output_type="latent").images
    oracle.assert_close(ours_half, oracle.nhwc(half), TOLERANCE)
    assert_same(refine(**call, image=ours_half, denoising_start=0.7, output_type="np").images, expected)


def test_the_refiner_is_told_how_beautiful_the_picture_is(refiner):
    latents = oracle.normal(1, 8, 12, 4)
    call = {"prompt": "goose", "image": latents, "denoising_start": 0.5, "num_inference_steps": 6}
    call |= {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0, "output_type": "np"}
    expected = theirs(refiner)(**call | {"image": oracle.nchw(latents)}).images
    pipe = load(refiner)
    pictures = pipe(**call).images
    assert_same(pictures, expected)
    assert np.abs(pipe(**call | {"aesthetic_score": 1.0}).images - pictures).max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 8.5])
def test_lcm_is_told_the_guidance_scale(lcm, scale):
    """One step, where PyTorch's sampler draws no noise."""
    latents = oracle.normal(1, 12, 8, 4)
    call = {"prompt": "a blue goose", "guidance_scale": scale, "height": 48, "width": 32, **CALL}
    call["num_inference_steps"] = 1
    expected = theirs(lcm)(**call, latents=oracle.nchw(latents)).images
    assert_same(load(lcm)(**call, latents=latents).images, expected)


def test_sdxl_without_text_encoders_has_zeros_for_the_negative_prompt(tmp_path):
    family = replace(oracle.SDXL, options={"force_zeros_for_empty_prompt": True})
    pytorch = oracle.pipeline(tmp_path, family)
    pytorch.save_pretrained(tmp_path / "model")
    states, _, pooled, _ = pytorch.encode_prompt("a blue goose")
    latents, call = oracle.normal(1, 8, 12, 4), {**SIZE, **CALL}
    expected = pytorch("a blue goose", **call, latents=oracle.nchw(latents)).images
    pipe = load(tmp_path / "model", text_encoder=None, text_encoder_2=None)
    given = {"prompt_embeds": states.numpy(), "pooled_prompt_embeds": pooled.numpy()}
    assert_same(pipe(**given, **call, latents=latents).images, expected)


def test_latents_with_a_mean_and_a_deviation_of_each_channel(tmp_path):
    moments = {"latents_mean": [-1.5, 0.7, 0.1, 2.0], "latents_std": [8.0, 3.0, 5.0, 0.5]}
    family = replace(oracle.SDXL, vae={**oracle.XL_VAE, **moments})
    pytorch = oracle.pipeline(tmp_path, family)
    pytorch.save_pretrained(tmp_path / "model")
    latents, call = oracle.normal(1, 8, 12, 4), {**SIZE, **CALL}
    expected = pytorch("a blue goose", **call, latents=oracle.nchw(latents)).images
    pipe = load(tmp_path / "model")
    assert_same(pipe("a blue goose", **call, latents=latents).images, expected)
    pipe.vae.save_pretrained(tmp_path / "vae")
    saved = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").config
    assert {name: list(saved[name]) for name in moments} == moments


@pytest.mark.parametrize("family", ["xl", "refiner", "lcm"])
def test_the_pure_function_gives_the_pipelines_latents(request, family):
    pipe = load(request.getfixturevalue(family), scheduler="ddim")
    guided = family != "lcm"
    tokens = [own(["blue", "a goose"] if guided else ["a goose"])[None] for own in pipe.tokenizers.values()]
    keys, scale = seed_keys([7]), np.full(1, 3.0, np.float32)
    height, width = 8 * pipe.vae.config.factor, 12 * pipe.vae.config.factor
    sample = jax.jit(pipe.text_to_latents(height, width))
    latents = sample(pipe.params, tokens, keys, pipe.scheduler.table(3), scale)
    call = {"height": height, "width": width, "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 7}
    expected = pipe("a goose", "blue", **call, output_type="latent").images
    oracle.assert_close(latents, expected, TOLERANCE)


def test_zero_terminal_snr_and_rescaled_guidance(sd2_folder):
    latents = oracle.normal(1, 8, 8, 4)
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe = theirs(sd2_folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **options)
    ours = load(sd2_folder)
    ours.scheduler = {**ours.scheduler.config, **options}
    call = {"prompt": "a blue goose", "guidance_rescale": 0.7, "height": 16, "width": 16, **CALL}
    assert_same(ours(**call, latents=latents).images, pipe(**call, latents=oracle.nchw(latents)).images)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip(sd1_folder, clip_skip):
    pipe = load(sd1_folder)
    embedded = theirs(sd1_folder, safety_checker=None)
    tokens = torch.tensor(pipe.tokenizer(["a blue goose"]).astype(np.int64))
    with torch.no_grad():
        states = embedded.text_encoder(tokens, output_hidden_states=True).hidden_states[-1 - clip_skip]
        states = embedded.text_encoder.final_layer_norm(states)
    call = {"height": 16, "width": 24, "guidance_scale": 1.0, **CALL}
    expected = pipe(prompt_embeds=states.numpy(), **call).images
    assert_same(pipe("a blue goose", clip_skip=clip_skip, **call).images, expected)
    with pytest.raises(ValueError, match="clip_skip must be a whole number from 0 to 2, not 3"):
        pipe("a blue goose", clip_skip=3, **call)


def test_inpainting_unets_load_and_say_what_they_are(tmp_path):
    family = replace(oracle.SD1, unet={**oracle.SD1.unet, "in_channels": 9})
    pipe = load(oracle.save_pipeline(tmp_path, family))
    assert pipe.unet.conv_in.kernel.shape[2] == 9
    with pytest.raises(ValueError, match="this UNet is for inpainting: give image, and mask_image"):
        pipe("goose")


@pytest.mark.parametrize("kind", ["FluxPipeline", "StableDiffusion3Pipeline", "PixArtAlphaPipeline"])
def test_another_family_is_named(tmp_path, kind):
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    with pytest.raises(sdjax.CheckpointError, match=f"{kind} is not supported"):
        load(tmp_path)


def test_some_images_of_a_call_have_no_negative_prompt(xl_pipe):
    """Which SDXL's base takes for zeros, and an empty one for a text."""
    call = {**SIZE, "num_inference_steps": 2, "output_type": "np"}
    mixed = xl_pipe("goose", seed=[1, 2, 3], negative_prompt=[None, "", "blue"], **call).images
    for image, seed, negative in zip(mixed, (1, 2, 3), (None, "", "blue"), strict=True):
        np.testing.assert_allclose(
            image, xl_pipe("goose", seed=seed, negative_prompt=negative, **call).images[0], atol=1 / 255
        )


def test_sizes_are_for_sdxl_alone(sd1_folder, xl_pipe):
    with pytest.raises(ValueError, match="original_size: only SDXL"):
        load(sd1_folder)("goose", height=16, width=16, original_size=(8, 8))
    with pytest.raises(ValueError, match="unknown: 'originl_size'; did you mean original_size"):
        xl_pipe("goose", **SIZE, originl_size=(8, 8))
    with pytest.raises(ValueError, match=r"original_size must be \(height, width\), two whole numbers, not 7"):
        xl_pipe("goose", **SIZE, original_size=7)


@pytest.mark.parametrize("family", ["xl", "refiner", "lcm"])
def test_a_saved_pipeline_runs_in_pytorch(request, tmp_path, family):
    folder = request.getfixturevalue(family)
    load(folder).save_pretrained(tmp_path / "saved")
    first, second = theirs(folder), theirs(tmp_path / "saved")
    assert type(first) is type(second)
    for name, component in first.components.items():
        if isinstance(component, torch.nn.Module):
            before, after = component.state_dict(), getattr(second, name).state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
    assert second.config.get("requires_aesthetics_score") == first.config.get("requires_aesthetics_score")
