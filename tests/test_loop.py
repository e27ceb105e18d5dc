"""The pure core: noise of seeds, guidance, the scan, and that JAX's transformations go through it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax import sampling
from sdjax.sampling import Table, loop
from sdjax.sampling.guidance import branched, text_weights, unguided, weighted
from sdjax.sampling.noise import initial_noise, row_noise, seed_keys

SHAPE = (4, 4, 3)


def model(x, t):
    """A cheap nonlinear prediction."""
    return jnp.tanh(x) * jnp.cos(t / 300)[:, None, None, None]


def test_seeds_beyond_32_bits_have_noise_of_their_own():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**64 - 1]
    noise = initial_noise(seed_keys(seeds), (1000,))
    assert len(np.unique(np.asarray(noise)[:, 0])) == len(seeds)
    assert np.abs(np.corrcoef(noise) - np.eye(len(seeds))).max() < 0.15
    np.testing.assert_allclose(noise.std(), 1, atol=0.05)


def test_a_seed_is_that_of_jax_random_key():
    assert seed_keys(7).tolist() == [jax.random.key_data(jax.random.key(7)).tolist()]


def test_noise_is_of_the_seed_and_the_row_alone():
    alone = row_noise(seed_keys(5), 3, SHAPE)
    among = row_noise(seed_keys([9, 8, 5, 7]), 3, SHAPE)
    assert np.array_equal(alone[0], among[2])
    rows = [initial_noise(seed_keys(5), SHAPE)]
    rows += [row_noise(seed_keys(5), row, SHAPE) for row in range(3)]
    assert len({float(noise[0, 0, 0, 0]) for noise in rows}) == 4


def test_guidance_moves_from_the_negative_prompt_past_the_prompt():
    def predict(x, t, context):
        return jnp.concatenate([x] * (len(context) // len(x))) * context.mean((1, 2))[:, None, None, None]

    x, t, scale = jnp.ones((2, *SHAPE)), jnp.zeros(2), jnp.array([1.0, 7.5])
    negative, positive = jnp.full((2, 5, 6), 2.0), jnp.full((2, 5, 6), 3.0)
    guide, f = weighted(text_weights(scale)), branched(predict, [negative, positive])
    guided = guide(f(x, t), jnp.ones(2))
    np.testing.assert_allclose(guided[:, 0, 0, 0], [2 + 1.0 * (3 - 2), 2 + 7.5 * (3 - 2)], rtol=1e-6)
    alone = unguided(branched(predict, [positive])(x, t), jnp.ones(2))
    np.testing.assert_allclose(alone[:, 0, 0, 0], [3, 3], rtol=1e-6)
    assert np.array_equal(guide(f(x, t), jnp.zeros(2)), alone)  # rows without guidance


def test_guidance_combines_any_number_of_branches():
    """InstructPix2Pix: e(none) + s_I (e(image) - e(none)) + s_T (e(text) - e(image)), arXiv:2211.09800, eq. 3."""
    none, image, text = np.float32(np.random.default_rng(0).normal(size=(3, 2, *SHAPE)))
    by_image, by_text = np.float32([1.5, 1]), np.float32([7.5, 1])
    weights = np.stack([1 - by_image, by_image - by_text, by_text], axis=1)
    guide, predictions = weighted(weights), jnp.concatenate([none, image, text])
    s, g = by_image[:, None, None, None], by_text[:, None, None, None]
    np.testing.assert_allclose(
        guide(predictions, jnp.ones(2)), none + s * (image - none) + g * (text - image), atol=1e-5
    )
    mixed = guide(predictions, jnp.array([0.0, 1.0]))
    assert np.array_equal(mixed[0], text[0]) and np.array_equal(mixed[1], text[1])  # no guidance; scales of 1


def test_images_of_a_stack_are_sampled_as_if_alone():
    tables = [sampling.from_config(name).table(n) for name, n in (("heun", 4), ("ddim", 9), ("dpm2_ancestral", 3))]
    tables.append(sampling.from_config("euler_ancestral").table(9, 0.6))
    keys = seed_keys([1, 2, 3, 4])
    noise = initial_noise(keys, SHAPE)

    def run(table, keys, noise):
        x = loop.scaled(noise, table.init_noise_sigma)
        return loop.denoise(model, table, x, partial(row_noise, keys, shape=SHAPE))

    together = run(Table.stack(tables), keys, noise)
    for i, table in enumerate(tables):
        np.testing.assert_allclose(together[i : i + 1], run(table, keys[i : i + 1], noise[i : i + 1]), atol=1e-5)


@pytest.mark.parametrize("active", [1, 8])
def test_segments_are_the_scan_in_pieces(active):
    table = sampling.from_config("euler_ancestral").table(19)
    keys = seed_keys([4, 5])
    noise = partial(row_noise, keys, shape=SHAPE)
    x = loop.scaled(initial_noise(keys, SHAPE), table.init_noise_sigma)
    run = jax.jit(lambda *args: loop.denoise_segment(lambda row: model, *args, noise))
    state, denoised = loop.start(x), x
    for segment in loop.segments(Table.stack([table] * 2), 8, active):
        state, denoised = run(state, denoised, segment.rows)
    np.testing.assert_allclose(state.x, loop.denoise(model, table, x, noise), atol=1e-5)
    np.testing.assert_allclose(state.x, denoised, atol=1e-5)  # the last row ends on its estimate of the clean sample


def test_a_run_in_two_parts_is_the_run():
    """Each part has the noise of its rows in the whole run, also beside an image that is at another row."""
    scheduler, keys = sampling.from_config("euler_ancestral"), seed_keys([4, 5])
    noise = partial(row_noise, keys, shape=SHAPE)
    x = loop.scaled(initial_noise(keys, SHAPE), scheduler.table(10).init_noise_sigma)
    whole = loop.denoise(model, scheduler.table(10), x, noise)
    base, refiner = scheduler.table(10, denoising_end=0.7), scheduler.table(10, denoising_start=0.7)
    assert len(base) + len(refiner) == 10 and min(len(base), len(refiner)) > 2
    half = loop.denoise(model, base, x, noise)
    assert np.array_equal(loop.denoise(model, refiner, half, noise), whole)
    mixed = loop.denoise(model, Table.stack([refiner, scheduler.table(10)]), jnp.stack([half[0], x[1]]), noise)
    np.testing.assert_allclose(mixed, whole, atol=1e-5)


def test_previews_estimate_the_clean_sample():
    """With the exact prediction of the noise in x = clean + sigma * noise, every row's estimate is the clean sample."""
    scheduler = sampling.from_config("euler")
    table = scheduler.table(6)
    clean = jnp.full((1, *SHAPE), 0.7)
    noise = jax.random.normal(jax.random.key(0), clean.shape)
    state = loop.start(clean + table.init_noise_sigma * noise)
    rows = loop.rows(table, 1)
    for i in range(len(table)):
        row = {name: column[i] for name, column in rows.items()}
        state, denoised = loop.step(lambda x, t: noise, state, row, jnp.zeros_like(clean))
        np.testing.assert_allclose(denoised, clean, atol=3e-5)
    np.testing.assert_allclose(state.x, clean, atol=3e-5)


@pytest.fixture(scope="module")
def pure(one_level_folder):
    """(sample, params, tokens, keys, table, guidance_scale) for two images of a tiny model."""
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder)
    sample = pipe.text_to_latents(height=16, width=16)
    negative, prompt = pipe.tokenizer(["", "a blue goose"])
    tokens = np.tile(np.stack([negative, prompt]), (2, 1, 1))
    keys = seed_keys([0, 1])
    return sample, pipe.params, tokens, keys, pipe.scheduler.table(3), np.full(2, 5.0, np.float32)


def test_the_pure_function_gives_the_pipelines_latents(pure, one_level_folder):
    sample, *args = pure
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder, scheduler="pndm")
    expected = pipe("a blue goose", height=16, width=16, num_images_per_prompt=2, num_inference_steps=3,
                    guidance_scale=5.0, output_type="latent").images  # fmt: skip
    np.testing.assert_allclose(jax.jit(sample)(*args), expected, atol=1e-4)


def test_pmap_and_vmap_go_through_the_pure_function(pure):
    sample, params, tokens, keys, table, scale = pure
    expected = jax.jit(sample)(params, tokens, keys, table, scale)
    each = [a[:, None] for a in (tokens, keys, scale)]
    axes = (None, 0, 0, None, 0)
    for mapped in (jax.pmap(sample, in_axes=axes), jax.jit(jax.vmap(sample, in_axes=axes))):
        latents = mapped(params, each[0], each[1], table, each[2])
        np.testing.assert_allclose(latents[:, 0], expected, atol=1e-4)


def test_gradients_go_through_the_pure_function(pure):
    """d loss / d guidance is what a central difference gives, and the parameters' gradient is finite and not zero."""
    sample, params, tokens, keys, table, scale = pure

    @jax.jit
    def loss(scale, params):
        return (sample(params, tokens[:1], keys[:1], table, scale) ** 2).mean()

    by_scale, by_params = jax.jit(jax.grad(loss, argnums=(0, 1)))(scale[:1], params)
    difference = (loss(scale[:1] + 0.05, params) - loss(scale[:1] - 0.05, params)) / 0.1
    np.testing.assert_allclose(by_scale[0], difference, rtol=0.02)
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(by_params["unet"])]
    assert np.isfinite(norms).all()
    assert max(norms) > 0
