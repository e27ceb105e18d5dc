"""Steps over devices, in parts, with blocks computed again, from tokens or cached states: the same each time."""

from dataclasses import replace

import jax
import numpy as np
import optax
import oracle
import pytest

import sdjax
from sdjax.training import lora, step, trainer, whole
from sdjax.training.objective import Objective
from sdjax.training.trainer import Trainer, training_mesh

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return sdjax.StableDiffusionPipeline.from_pretrained(
        oracle.save_pipeline(tmp_path_factory.mktemp("attending"), oracle.ATTENDING)
    )


def batch(images=4):
    moments = oracle.normal(images, 8, 8, 8, seed=3)
    return {"moments": moments, "text": {"hidden": oracle.normal(images, 7, 24, seed=4)}}


def trained_by(pipe, mesh, *, gradient_checkpointing=False, **options):
    given = whole.begin(pipe, texts_cached=True, gradient_checkpointing=gradient_checkpointing)
    return Trainer(given, Objective.of(pipe.scheduler), optax.adam(1e-3), mesh=mesh, **options)


def test_devices_parts_and_blocks_computed_again_change_nothing(pipe, monkeypatch):
    one = trained_by(pipe, training_mesh(jax.devices()[:1]), ema=0.9999)
    monkeypatch.setattr(trainer, "LEAST_SPLIT", 16)
    options = {"gradient_checkpointing": True, "accumulation": 2, "ema": 0.9999}
    split = trained_by(pipe, training_mesh(jax.devices()[:2], fsdp=2), **options)
    states, metrics = zip(*(own(own.state(), batch(), KEY) for own in (one, split)), strict=True)
    assert metrics[0]["loss"] > 0.1
    np.testing.assert_allclose(metrics[0]["loss"], metrics[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["grad_norm"], metrics[1]["grad_norm"], rtol=1e-4)
    first, second = (state.opt_state[0].mu["unet"] for state in states)
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], rtol=0, atol=1e-5 * np.abs(value).max() + 1e-9, err_msg=name)
    kernel = "down_blocks.0.resnets.0.conv1.weight"
    assert second[kernel].sharding.shard_shape(second[kernel].shape) == (3, 3, 8, 16)
    assert states[1].params["unet"][kernel].sharding == second[kernel].sharding

    half = split.loss(states[1].params, batch(), KEY)
    assert np.isfinite(half)
    np.testing.assert_allclose(half, one.loss(states[0].params, batch(), KEY), rtol=1e-4)
    with pytest.raises(ValueError, match="6 images cannot be split over 2 devices in 2 parts"):
        split(states[1], batch(6), KEY)
    with pytest.raises(ValueError, match="2 devices are no groups of fsdp=3"):
        training_mesh(jax.devices()[:2], fsdp=3)


def test_a_step_is_a_function_of_state_batch_and_key(pipe):
    given = lora.begin(pipe, lora.Lora(rank=2), KEY, texts_cached=True)
    own = Trainer(given, Objective.of(pipe.scheduler), optax.adam(1e-2), ema=0.9)
    state, again = own.state(), own.state()
    losses = []
    for _ in range(3):
        state, metrics = own(state, batch(), KEY)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3  # each has noise of its own
    for expected in losses:
        again = jax.device_put(jax.device_get(again), jax.tree.map(lambda leaf: leaf.sharding, again))  # as from a disk
        again, metrics = own(again, batch(), KEY)
        assert float(metrics["loss"]) == expected
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert int(state.step) == 3
    assert set(state.params) == {"unet"}
    assert all(".lora." in name for name in state.params["unet"])
    assert own.lower(batch()).as_text().count("main") > 0


def test_averages_warm_up_as_those_of_diffusers():
    from diffusers.training_utils import EMAModel

    theirs = EMAModel([], decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=2 / 3)
    done = [0, 1, 2, 10, 1000, 10**7]
    expected = [theirs.get_decay(steps + 1) for steps in done]
    np.testing.assert_allclose([step.warmed_up_decay(np.float32(own)) for own in done], expected, rtol=1e-5)


def test_pictures_become_the_latents_of_their_moments(pipe):
    given = lora.begin(pipe, lora.Lora(), KEY, texts_cached=True, pictures_cached=False)
    pixels, noise = oracle.normal(2, 32, 32, 3).clip(-1, 1), oracle.normal(2, 8, 8, 4)
    assert given.latents_shape({"pixels": pixels}) == given.latents_shape({"moments": oracle.normal(2, 8, 8, 8)})
    latents = jax.jit(given.latents)(given.frozen, {"pixels": pixels}, noise)
    posterior = jax.jit(pipe.vae.encode)(pixels)
    moments = np.concatenate([posterior.mean, posterior.logvar], axis=-1)
    np.testing.assert_allclose(latents, given.latents({}, {"moments": moments}, noise), rtol=1e-4, atol=1e-5)


def test_models_that_are_not_trained_are_named(pipe, tmp_path):
    family = replace(oracle.ONE_LEVEL, unet=oracle.ONE_LEVEL.unet | {"in_channels": 9})
    inpainting = sdjax.StableDiffusionPipeline.from_pretrained(oracle.save_pipeline(tmp_path, family))
    with pytest.raises(ValueError, match="takes 9 channels"):
        whole.begin(inpainting)
    with pytest.raises(ValueError, match="text encoders are trained"):
        whole.begin(pipe, train_text_encoder=True, texts_cached=True)
