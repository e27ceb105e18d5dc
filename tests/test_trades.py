"""Work traded for time, on request: guidance at some noise levels, deep features that are kept for some steps."""

import diffusers
import jax
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations

import sdjax
from sdjax import sampling
from sdjax.runtime import parallel
from sdjax.sampling import loop
from sdjax.sampling.noise import seed_keys

PROMPTS, NEGATIVE, SCALE, STEPS = ["a blue goose", "Goose, goose!"], "blue", 5.0, 8
CALL = {"height": 48, "width": 32, "num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
LATENTS = oracle.normal(2, 12, 8, 4)
INTERVAL = (0.4, 4.0)


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    mesh = parallel.data_mesh(jax.devices()[:1])
    return sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder, mesh=mesh, scheduler="ddim")


def sample(pipe, **kw):
    return pipe(PROMPTS, NEGATIVE, latents=LATENTS, **CALL, **kw).images


@torch.inference_mode()
def pytorchs(folder, interval=(0, np.inf), cache_interval=1):
    """DDIM over diffusers' UNet; what its last layer reads of the others is that of the last full step."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    prompt, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, [NEGATIVE] * len(PROMPTS))
    last = pipe.unet.up_blocks[-1].resnets[-1]
    kept = {}

    def keep(module, args):
        x, *rest = args
        channels = x.shape[1] - pipe.unet.conv_in.out_channels
        if kept["renew"]:
            kept["deep"] = x[:, :channels]
        return (torch.cat([kept["deep"], x[:, channels:]], dim=1), *rest)

    last.register_forward_pre_hook(keep)
    x, since, was_guided = oracle.nchw(LATENTS), 0, None
    for t in scheduler.timesteps:
        level = ((1 - scheduler.alphas_cumprod[t]) / scheduler.alphas_cumprod[t]) ** 0.5
        is_guided = bool(interval[0] <= level <= interval[1])
        since = 0 if is_guided != was_guided else (since + 1) % cache_interval
        kept["renew"], was_guided = since == 0, is_guided
        if is_guided:
            u, c = pipe.unet(torch.cat([x, x]), t, torch.cat([negative, prompt])).sample.chunk(2)
            prediction = u + SCALE * (c - u)
        else:
            prediction = pipe.unet(x, t, prompt).sample
        x = scheduler.step(prediction, t, x).prev_sample
    return oracle.nhwc(x)


TRADES = {
    "guidance at some levels": {"interval": INTERVAL},
    "every third step in full": {"cache_interval": 3},
    "both": {"interval": INTERVAL, "cache_interval": 3},
}


@pytest.mark.parametrize("trade", TRADES)
@pytest.mark.parametrize("watched", [False, True])
def test_latents_are_those_of_the_same_steps_in_pytorch(pipe, sd1_folder, trade, watched):
    expected = pytorchs(sd1_folder, **TRADES[trade])
    assert np.abs(expected - pytorchs(sd1_folder)).max() > 0.01 * np.abs(expected).max()
    ours = {"guidance_interval": TRADES[trade].get("interval"), "cache_interval": TRADES[trade].get("cache_interval")}
    seen = []
    callback = (lambda step, total, preview: seen.append(step)) if watched else None
    oracle.assert_close(sample(pipe, callback=callback, **ours), expected, 1e-4)
    assert seen == (list(range(1, STEPS + 1)) if watched else [])


def test_every_step_in_full_is_the_exact_picture(pipe):
    oracle.assert_close(sample(pipe, cache_interval=1), sample(pipe), 1e-5)


def test_guidance_at_no_level_is_no_guidance(pipe):
    without = pipe(PROMPTS, latents=LATENTS, **CALL | {"guidance_scale": 1.0}).images
    np.testing.assert_array_equal(sample(pipe, guidance_interval=(1e3, 1e4)), without)


def test_intervals_are_data(pipe):
    sample(pipe, guidance_interval=INTERVAL, cache_interval=3)
    sample(pipe, guidance_interval=INTERVAL)
    with compilations() as names:
        sample(pipe, guidance_interval=(0.2, 9), cache_interval=2)
        sample(pipe, guidance_interval=(1, 2))
    assert not names


def test_rows_without_guidance_cost_half(pipe):
    """Twice the work of a row is in the program that rows with guidance run."""
    table = sampling.Table.stack([pipe.scheduler.table(20, guidance_interval=INTERVAL)] * 2)
    segments = list(loop.segments(table, 8, 8))
    rows = {guided: sum(int(s.rows[0].sum()) for s in segments if s.guided is guided) for guided in (True, False)}
    levels = pipe.scheduler.schedule.level_at(table.t[:, 0])
    assert rows[True] == ((INTERVAL[0] <= levels) & (levels <= INTERVAL[1])).sum() > 0
    assert rows[False] == 20 - rows[True] > 0
    assert all(len(set(s.rows[1]["guidance"][s.rows[0], 0])) == 1 for s in segments)


def test_the_pure_function_heeds_the_interval(pipe, sd1_folder):
    pure = jax.jit(pipe.text_to_latents(CALL["height"], CALL["width"]))
    tokens = np.stack([pipe.tokenizer([NEGATIVE, prompt]) for prompt in PROMPTS])
    keys, scale = seed_keys([3, 4]), np.full(2, SCALE, np.float32)
    table = pipe.scheduler.table(STEPS, guidance_interval=INTERVAL)
    expected = pipe(PROMPTS, NEGATIVE, seed=[3, 4], guidance_interval=INTERVAL, **CALL).images
    oracle.assert_close(pure(pipe.params, tokens, keys, table, scale), expected, 1e-4)


@pytest.mark.parametrize("guidance_interval", [(2, 1), (1,), (-1, 1), ("low", "high"), 3, (np.nan, 1)])
def test_an_interval_is_two_levels(pipe, guidance_interval):
    with pytest.raises(ValueError, match="guidance_interval must be two noise levels"):
        sample(pipe, guidance_interval=guidance_interval)


@pytest.mark.parametrize("cache_interval", [0, -1, 1.5, True])
def test_a_cache_interval_is_a_number_of_steps(pipe, cache_interval):
    with pytest.raises(ValueError, match="cache_interval must be a whole number, 1 or more"):
        sample(pipe, cache_interval=cache_interval)
