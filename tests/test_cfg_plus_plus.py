"""CFG++ against its algorithm, written out with PyTorch diffusers' models and noise levels."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations

import sdjax
from sdjax import sampling
from sdjax.batch import job
from sdjax.pictures import web_ui

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
NOISE = oracle.normal(2, 8, 8, 4)
PROMPTS, NEGATIVE, SCALES = ["a goose", "blue"], "goose goose", [0.6, 1.0]
CALL = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "num_inference_steps": 6, "output_type": "latent"}
CALL |= {"latents": NOISE}
FOLDERS = {"epsilon": "one_level_folder", "v_prediction": "sd2_folder"}


@pytest.fixture(scope="module")
def pair(request):
    made = {}

    def pair(prediction):
        if prediction not in made:
            folder = request.getfixturevalue(FOLDERS[prediction])
            theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
            made[prediction] = sdjax.StableDiffusionPipeline.from_pretrained(folder), theirs
        return made[prediction]

    return pair


def predictions(theirs, x, t):
    """Of the negative prompt and of the prompts."""
    c, u = theirs.encode_prompt(PROMPTS, "cpu", 1, True, [NEGATIVE] * 2)
    with torch.no_grad():
        return theirs.unet(x, t, u).sample, theirs.unet(x, t, c).sample


def scheduler_of(ours, name):
    config = dict(sampling.from_config(ours.scheduler.config, name).config)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(CALL["num_inference_steps"])
    return scheduler


@pytest.mark.parametrize("prediction", FOLDERS)
def test_ddim(pair, prediction):
    """Algorithm 2: x' = a' x0(guided) + s' epsilon(unconditional)."""
    ours, theirs = pair(prediction)
    scheduler, scale = scheduler_of(ours, "ddim"), torch.tensor(SCALES)[:, None, None, None]
    x, stride = oracle.nchw(NOISE), 1000 // CALL["num_inference_steps"]
    for t in scheduler.timesteps:
        a2, before = scheduler.alphas_cumprod[t], t - stride
        a2_next = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
        a, s, a_next, s_next = a2.sqrt(), (1 - a2).sqrt(), a2_next.sqrt(), (1 - a2_next).sqrt()
        u, c = predictions(theirs, x, t)
        if prediction == "v_prediction":
            u, c = (a * v + s * x for v in (u, c))
        x = a_next / a * (x - s * (u + scale * (c - u))) + s_next * u
    made = ours(**CALL, scheduler="ddim", cfg_plus_plus=True, guidance_scale=SCALES).images
    oracle.assert_close(made, oracle.nhwc(x), 1e-4)


def test_euler(pair):
    """ComfyUI's euler_cfg_pp: d = (x - uncond_denoised) / sigma; x' = denoised + sigma' d."""
    ours, theirs = pair("epsilon")
    scheduler, scale = scheduler_of(ours, "euler"), torch.tensor(SCALES)[:, None, None, None]
    x = oracle.nchw(NOISE) * scheduler.init_noise_sigma
    for t, sigma, sigma_next in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        u, c = (x - sigma * e for e in predictions(theirs, x / (sigma**2 + 1).sqrt(), t))
        x = u + scale * (c - u) + sigma_next * (x - u) / sigma
    made = ours(**CALL, scheduler="euler", cfg_plus_plus=True, guidance_scale=SCALES).images
    oracle.assert_close(made, oracle.nhwc(x), 1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "options"), [("euler_ancestral", {}), ("ddim", {"eta": 0.7}), ("ddim", {}), ("euler_karras", {})]
)
def test_rows(name, options, prediction):
    """Every row, with noise: the table's update of u + k l (c - u) is that of x0 of u + l (c - u) and epsilon of u."""
    own = sampling.from_config(name, prediction_type=prediction, **options)
    plain, table = own.table(7), own.table(7, cfg_plus_plus=True)
    x, x0_u, x0_c = np.random.default_rng(0).normal(size=(3, 5))
    for i in range(len(table)):
        a = plain.marginals[i, 0]
        u, c = (m_of(plain, i, x, x0) for x0 in (x0_u, x0_c))
        made = update(plain, i, x, u + table.guidance[i] * 0.6 * (c - u))
        guided = x0_u + 0.6 * (x0_c - x0_u)  # and x as if it were a guided + s epsilon_u
        as_if = a * guided + x - a * x0_u
        np.testing.assert_allclose(made, update(plain, i, as_if, m_of(plain, i, as_if, guided)), atol=1e-9)
    np.testing.assert_array_equal(plain.guidance, 1)


def m_of(table, i, x, x0):
    return (x0 - table.denoised[i, 0] * x) / table.denoised[i, 1]


def update(table, i, x, m):
    return table.mix[i, 0, 0] * x + table.mix[i, 0, 2] * m


def test_it_is_data_and_varies_in_a_batch(pair):
    ours, _ = pair("epsilon")
    call = {name: value for name, value in CALL.items() if name not in ("latents", "prompt")}
    call |= {"prompt": "a goose", "height": 16, "width": 16}
    ours(**call, seed=[1, 2, 3], scheduler="euler")
    each = {"cfg_plus_plus": [True, False, True], "guidance_scale": [0.6, 3.0, 0.2]}
    each |= {"guidance_rescale": [0.0, 0.0, 0.5], "scheduler": ["ddim", "dpmpp_2m", "euler_ancestral"]}
    with compilations() as compiled:
        together = ours(**call, **each, seed=[1, 2, 3]).images
    assert compiled == []
    for i in range(3):
        own = {name: values[i] for name, values in each.items()}
        oracle.assert_close(ours(**call, **own, seed=i + 1).images[0], together[i], 1e-4)
    default = ours(**call, cfg_plus_plus=True, scheduler="ddim", seed=1).images[0]
    oracle.assert_close(default, together[0], 1e-4)
    perturbed = ours(**call, cfg_plus_plus=True, scheduler="ddim", seed=1, pag_scale=1e-9).images[0]
    oracle.assert_close(perturbed, together[0], 1e-4)


def test_a_job_fills_its_scale_in(pair):
    ours, _ = pair("epsilon")
    lines = [{"prompt": "a", "scheduler": "ddim", "cfg_plus_plus": True}, {"prompt": "b"}]
    assert [item.guidance_scale for item in job.check(job.read(lines), ours)] == [0.6, 7.5]
    with pytest.raises(ValueError, match="line 1: guidance_scale: with cfg_plus_plus from 0 to 2"):
        job.check(job.read([lines[0] | {"cfg_plus_plus": [True, False]}]), ours)


@pytest.mark.parametrize(("name", "theirs", "scale"), [("ddim", "DDIM CFG++", 7.5), ("euler", "Euler CFG++", 0.6)])
def test_the_web_uis_names(name, theirs, scale):
    """Its DDIM CFG++ divides the CFG scale by 12.5."""
    own = {"prompt": "a", "negative_prompt": "", "cfg_plus_plus": True, "guidance_scale": 0.6, "seed": 1}
    text = web_ui.parameters(own | {"scheduler": dict(sampling.from_config(name).config), "width": 8, "height": 8})
    assert f"Sampler: {theirs}, CFG scale: {scale}," in text
    settings, rest = web_ui.read(f"a\nSteps: 5, Sampler: {theirs}, CFG scale: {scale}, Seed: 1")
    assert settings.items() >= (own | {"scheduler": name}).items() and not rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": "dpmpp_2m"}, "cfg_plus_plus: only with samplers of first order, such as ddim, euler"),
        ({"scheduler": "pndm"}, "cfg_plus_plus: only with samplers of first order"),
        ({"scheduler": "heun"}, "cfg_plus_plus: only with samplers of first order"),
        ({"scheduler": {"_class_name": "DDIMScheduler", "clip_sample": True}}, "without clip_sample"),
        ({"scheduler": "ddim", "guidance_scale": 7.5}, "guidance_scale: with cfg_plus_plus from 0 to 2, such as 0.6"),
    ],
)
def test_bad_arguments(pair, arguments, message):
    ours, _ = pair("epsilon")
    with pytest.raises(ValueError, match=message):
        ours("a goose", cfg_plus_plus=True, num_inference_steps=6, **arguments)
