"""sdjax.runtime.tiling: against decoding as one, and against PyTorch diffusers' tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from oracle import SD1, assert_close, nchw, nhwc, normal

import sdjax
from sdjax.models import AutoencoderKL, AutoencoderKLConfig, AutoencoderTinyConfig
from sdjax.runtime import parallel, tiling

FACTOR = 4


def enlarged(latents):
    """Nearest neighbour: a decoder that looks at one latent for each pixel."""
    return latents.repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)


def decode_tiled(decode, latents, tile):
    return jax.jit(lambda z: tiling.decode_tiled(decode, z, tile=tile))(latents)


@pytest.mark.parametrize(
    ("height", "width", "tile"), [(9, 9, 8), (16, 25, 8), (20, 5, 8), (31, 40, 16), (7, 4, 1), (11, 12, 3), (8, 8, 8)]
)
def test_a_decoder_without_a_neighbourhood_gives_the_same_picture(height, width, tile):
    """Only if every latent is read where it belongs and the weights sum to 1 at every pixel."""
    latents = normal(2, height, width, 3)
    assert_close(decode_tiled(enlarged, latents, tile), enlarged(latents), 1e-6)


@pytest.mark.parametrize("length", [64, 65, 100, 112, 113, 128, 135, 160, 200, 256, 399])
def test_tiles_cover_an_axis_and_share_a_quarter(length):
    starts, weights = tiling.tiles(length, 64, FACTOR)
    assert starts[0] == 0
    assert starts[-1] == length - 64
    assert (np.diff(starts) <= 48).all()
    assert len(starts) == 1 + -(-(length - 64) // 48)  # no more than it takes
    assert (weights > 0).all()
    total = np.zeros(length * FACTOR)
    for start, own in zip(starts, weights, strict=True):
        total[start * FACTOR :][: 64 * FACTOR] += own
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_the_weights_are_linear_ramps_over_the_shared_quarter():
    starts, weights = tiling.tiles(28, 16, 1)
    np.testing.assert_array_equal(starts, [0, 12])
    ramp = np.array([1, 3, 5, 7]) / 8
    np.testing.assert_allclose(weights[0], [1] * 12 + [*ramp[::-1]], atol=1e-6)
    np.testing.assert_allclose(weights[1], [*ramp] + [1] * 12, atol=1e-6)


def test_an_error_at_the_border_of_a_tile_has_the_small_weight_of_its_place():
    """Tiles lack their neighbours' pixels: a decoder that looks one pixel far is wrong in a tile's outermost pixels."""
    kernel = np.float32([1, 2, 1]) / 4

    def blurred(latents):
        x = enlarged(latents)
        for axis in (1, 2):
            x = jnp.apply_along_axis(lambda line: jnp.convolve(line, kernel, mode="same"), axis, x)
        return x

    latents, tile = normal(1, 28, 40, 2), 16
    tiled, whole = decode_tiled(blurred, latents, tile), blurred(latents)
    weight = 0.5 / (tile // 4 * FACTOR)  # of the outermost pixel of a ramp
    error = np.abs(tiled - whole) / np.abs(latents).max()
    assert 0 < error.max() < 2 * weight * kernel[0]  # rows and columns
    assert (error > 1e-6).mean() < 0.2


@pytest.fixture(scope="module")
def reference():
    """Factor 4, trained at 8x8 latents."""
    return oracle.vae(SD1.vae)


@pytest.fixture(scope="module")
def vae(reference):
    return oracle.ported(
        lambda **kw: AutoencoderKL(AutoencoderKLConfig.from_dict(dict(reference.config)), **kw), reference
    )


def test_against_diffusers(reference, vae):
    """What comes of one tile agrees. In a ramp, diffusers weighs a pixel by where it begins, here by its middle."""
    latents, tile, shared = normal(1, 14, 14, 4), 8, 2
    reference.enable_tiling()
    expected = nhwc(reference.decode(nchw(latents)).sample)
    reference.disable_tiling()
    tiled = np.asarray(decode_tiled(vae.decode, latents, tile))
    begin, middle, end = (
        FACTOR * n for n in (tile - shared, tile, 2 * (tile - shared))
    )  # then a narrow tile of theirs
    one = np.r_[:begin, middle:end]
    assert_close(tiled[:, one][:, :, one], expected[:, one][:, :, one])
    half_a_pixel = 0.5 / (shared * FACTOR)
    error = np.abs(tiled - expected)[:, :end, :end].max()
    assert 0 < error < 2 * half_a_pixel * np.ptp(expected)  # down and across


def test_what_fits_into_a_tile_is_exact(vae):
    latents = normal(2, 8, 6, 4)
    np.testing.assert_array_equal(decode_tiled(vae.decode, latents, 8), jax.jit(vae.decode)(latents))


def test_memory_is_that_of_a_tile(vae):
    graph, params = nnx.split(vae)

    def temporary(side, tile):
        decode = jax.jit(lambda params, z: tiling.decode_tiled(nnx.merge(graph, params).decode, z, tile=tile))
        compiled = decode.lower(params, jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(64, 16) < temporary(64, 64) / 4


@pytest.mark.parametrize(("sample_size", "side"), [(256, 64), (512, 64), (1024, 128)])
def test_tiles_have_the_size_of_the_training_but_are_not_small(sample_size, side):
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    config = AutoencoderKLConfig(block_out_channels=(32,) * 4, sample_size=sample_size, **levels)
    assert tiling.tile_side(config) == side
    assert tiling.tile_side(AutoencoderTinyConfig()) == 64


def test_pipeline(one_level_folder, monkeypatch):
    monkeypatch.setattr(tiling, "LEAST_TILE", 8)
    mesh = parallel.data_mesh(jax.devices()[:1])
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder, mesh=mesh, scheduler="euler")
    call = {"prompt": ["goose", "blue"], "height": 44, "width": 56, "num_inference_steps": 1}
    latents = pipe(**call, output_type="latent").images / pipe.vae.config.scaling_factor
    previews = []
    made = pipe(**call, vae_tiling=True, callback=lambda step, total, preview: previews.append(preview())).images
    expected = np.clip(decode_tiled(pipe.vae.decode, latents, 8) / 2 + 0.5, 0, 1)
    for pictures in (made, previews[-1]):
        np.testing.assert_allclose(np.stack(pictures) / 255, expected, atol=0.6 / 255)
    assert np.abs(pipe(**call, output_type="np").images - expected).max() > 0.05
