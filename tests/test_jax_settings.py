"""Pictures and noise are the same whatever the caller's settings of JAX are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import StableDiffusionPipeline, sampling
from sdjax.runtime import jax_settings, parallel
from sdjax.sampling import loop
from sdjax.sampling.noise import initial_noise, row_noise, seed_keys

CALLERS = {
    "threefry": (jax.threefry_partitionable, False),
    "rank": (jax.numpy_rank_promotion, "raise"),
    "x64": (jax_settings.enable_x64, True),
    "strict": (jax.numpy_dtype_promotion, "strict"),
    "no jit": (jax.disable_jit, True),
    "generator": (jax.default_prng_impl, "rbg"),
    "nans": (jax.debug_nans, True),
}
KEYS = seed_keys([0, 7, 2**64 - 1])
CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "scheduler": "euler_ancestral"}


@pytest.fixture(params=CALLERS)
def settings(request):
    setting, value = CALLERS[request.param]
    return lambda: setting(value)


def load(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, mesh=parallel.data_mesh(jax.devices()[:1]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pictures(one_level_folder):
    return [load(one_level_folder)("goose", output_type=kind, **CALL).images for kind in ("np", "jax")]


def test_pictures(settings, pictures, one_level_folder):
    with settings():
        pipe = load(one_level_folder)
        for kind, expected in zip(("np", "jax"), pictures, strict=True):
            made = pipe("goose", output_type=kind, **CALL).images
            assert made.dtype == np.float32
            assert np.array_equal(made, expected)


@pytest.mark.parametrize("row", [None, 4])
def test_noise(settings, row):
    """That of `jax.random.normal` under JAX's defaults."""
    shape = (6, 5, 4)
    with jax.threefry_partitionable(True):
        keys = [jax.random.wrap_key_data(key, impl="threefry2x32") for key in KEYS]
        folded = [jax.random.fold_in(key, 0 if row is None else row + 1) for key in keys]
        expected = [jax.random.normal(key, shape, jnp.float32) for key in folded]
    with settings():
        noise = initial_noise(KEYS, shape) if row is None else row_noise(KEYS, row, shape)
        assert noise.dtype == np.float32
        assert np.array_equal(noise, expected)


def test_the_pure_function(settings):
    """Of a model whose sums broadcast, and mix dtypes."""
    sample = jax_settings.fixed()(
        loop.text_to_latents(
            lambda params, tokens, scale: [jnp.sqrt(tokens[:, 0]), jnp.cos(tokens[:, 1])],
            lambda params, x, t, condition: (
                jnp.concatenate([x, x]) * params + condition[:, None, None, None] + jnp.arange(4)
            ),
            (2, 3, 4),
        )
    )
    table = sampling.from_config("euler_ancestral").table(3)
    arguments = (np.linspace(0.1, 0.2, 4, dtype=np.float32), np.int32([[1, 2], [3, 4], [5, 6]]), KEYS, table)
    expected = jax.jit(sample)(*arguments, np.full(3, 2.0, np.float32))
    with settings():
        latents = jax.jit(sample)(*arguments, np.full(3, 2.0, np.float32))
        assert latents.dtype == np.float32
        np.testing.assert_allclose(latents, expected, rtol=1e-5)
