"""docs/research.md: its code runs, with a tiny model, and does what it says; inversion is that of PyTorch diffusers."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.sampling import from_config, loop
from sdjax.sampling.guidance import Clean, unguided

DOCUMENT = (Path(__file__).parents[1] / "docs" / "research.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture(scope="module")
def recipes(one_level_folder):
    """What the names of the document's code stand for, after all of it has run."""
    names, load = {}, sdjax.StableDiffusionPipeline.from_pretrained
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sdjax.StableDiffusionPipeline, "from_pretrained", partial(load, one_level_folder))
        for block in BLOCKS:
            exec(compile(block, "docs/research.md", "exec"), names)
    return names


def test_inverted_latents_come_back(recipes):
    """Without the VAE, whose posterior is wide where it is not trained."""
    pipe, prompt = recipes["pipe"], recipes["prompt"]
    clean = pipe(prompt, seed=7, output_type="latent").images
    noise = pipe(prompt, image=clean, strength=1.0, **recipes["inverting"]).images
    again, edited = (
        pipe(text, latents=noise, scheduler="ddim", guidance_scale=1, output_type="latent").images
        for text in (prompt, recipes["other"])
    )
    error, change = (np.abs(other - clean).mean() / np.abs(clean).mean() for other in (again, edited))
    assert error < 0.05
    assert change > 2 * error
    assert np.abs(recipes["noise"] - recipes["half"]).max() > 0.1


@pytest.mark.parametrize("folder", ["sd1_folder", "sd2_folder"])
def test_inversion_is_that_of_diffusers(folder, request):
    """From latents of their pipeline up the noise, epsilon and v prediction, and down again."""
    import diffusers
    import oracle

    folder = request.getfixturevalue(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    config = {**theirs.scheduler.config, "clip_sample": False}
    latents = oracle.normal(2, 8, 8, 4)
    call = {"prompt": ["a blue goose", "goose"], "num_inference_steps": 10, "guidance_scale": 1.0}
    size = 8 * theirs.vae_scale_factor
    call |= {"height": size, "width": size, "output_type": "latent"}
    ours = sdjax.StableDiffusionPipeline.from_pretrained(folder)
    expected = oracle.nchw(latents)
    for name in ("DDIMInverseScheduler", "DDIMScheduler"):
        theirs.scheduler = getattr(diffusers, name).from_config(config)
        expected = theirs(**call, latents=expected).images
        latents = ours(**call, latents=latents, scheduler=name).images
        np.testing.assert_allclose(latents, oracle.nhwc(expected), atol=1e-4 * float(expected.abs().max()))


def test_a_part_of_the_way_leads_back_to_the_same_level(recipes):
    pipe = recipes["pipe"]
    there = pipe.as_scheduler("DDIMInverseScheduler").table(50, 0.6)
    back = pipe.as_scheduler("ddim").table(50, denoising_start=0.4)
    np.testing.assert_array_equal(there.marginals, back.marginals[::-1])


def test_gradients_are_differences(recipes):
    """Along a random direction of each: text states, guidance, the timesteps and coefficients of the table."""
    rng, table = np.random.default_rng(0), recipes["table"]
    given = recipes["text"], recipes["guidance_scale"], table.t, table.mix
    by_table = recipes["gradient"](*given[:2], table, recipes["params"], recipes["target"])[1][2]
    slopes = (recipes["by_text"], recipes["by_guidance"], by_table.t, by_table.mix)
    loss = jax.jit(
        lambda text, scale, t, mix: recipes["loss"](
            text, scale, replace(table, t=t, mix=mix), recipes["params"], recipes["target"]
        )
    )
    for place, length in enumerate((0.03, 0.05, 1.0, 0.003)):
        direction = length * np.sign(rng.normal(size=given[place].shape)) * (np.asarray(slopes[place]) != 0)
        ends = [(*given[:place], given[place] + way * direction, *given[place + 1 :]) for way in (1, -1)]
        difference = (loss(*ends[0]) - loss(*ends[1])) / 2
        np.testing.assert_allclose((slopes[place] * direction).sum(), difference, rtol=0.05)


def test_the_memory_of_a_gradient_does_not_grow_with_the_steps(recipes):
    """But for the sampler's state: two samples and four outputs of each row, of which XLA may hold two."""

    def bytes_of(steps):
        table = recipes["pipe"].scheduler.table(steps)
        arguments = recipes["text"], recipes["guidance_scale"], table, recipes["params"], recipes["target"]
        return recipes["gradient"].lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    state = sum(leaf.nbytes for leaf in loop.start(recipes["start"]))
    assert bytes_of(40) - bytes_of(8) < 2 * 32 * state


def test_a_table_is_learned(recipes):
    assert np.exp(recipes["found"].fun) < 0.9 * recipes["value"]


def test_the_learned_table_is_one_of_the_embedded_model(recipes):
    six, usual = recipes["six"], from_config("dpmpp_2m", prediction_type="v_prediction").table(6)
    assert six.mix.shape == usual.mix.shape
    alpha, sigma = six.marginals.T
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
    np.testing.assert_allclose([six.skip, six.out], [alpha[:-1], -sigma[:-1]], atol=1e-6)
    assert (np.diff(sigma / alpha) < 0).all()


def test_an_own_loss_moves_the_clean_estimate(recipes):
    """By its gradient, where the guide alone would have it elsewhere; in the run, towards what is less of it."""
    rng = np.random.default_rng(0)
    x0, x, k = np.float32(rng.normal(size=(2, 2, 4, 4, 3)))[0], np.float32(rng.normal(size=(2, 4, 4, 3))), -0.5
    clean = Clean(jnp.asarray(x), jnp.full(2, k))
    guide = recipes["steered"](unguided, lambda x0: (x0**2).sum((1, 2, 3)) / 8)
    moved = clean.of_x + k * guide(jnp.asarray((x0 - x) / k), jnp.ones(2), clean)
    np.testing.assert_allclose(moved, 0.75 * x0, atol=1e-5)
    for loss, pulled in (("blueness", "blue"), ("asymmetry", "symmetric")):
        before, after = (float(recipes[loss](recipes[name])[0]) for name in ("plain", pulled))
        assert after < before, loss


def test_attention_maps_are_shares_and_the_picture_stays(recipes):
    tokens = recipes["text"].shape[1]
    assert recipes["maps"].shape == (*recipes["start"].shape[1:3], tokens)
    np.testing.assert_allclose(recipes["maps"].sum(-1), 1, atol=1e-5)
    assert recipes["maps"].std() > 0
    expected = jax.jit(recipes["latents"])(
        recipes["params"], recipes["text"], recipes["guidance_scale"], recipes["pipe"].scheduler.table(25)
    )
    np.testing.assert_allclose(recipes["drawn"], expected, atol=1e-3)


def test_a_sweep_has_the_pictures_of_single_calls(recipes):
    for place in (0, 5, 10):
        sampler, scale = recipes["pairs"][place]
        call = {"seed": 7, "scheduler": sampler, "guidance_scale": scale, "num_inference_steps": 10}
        alone = recipes["pipe"](recipes["prompt"], **call).images[0]
        assert np.abs(np.int16(alone) - recipes["pictures"][place]).max() <= 1
