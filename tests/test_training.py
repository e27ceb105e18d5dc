"""The trainer: losses against closed forms, steps, checkpoints, runs that are cut and continued."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import DDPMScheduler

from sdjax import sampling
from sdjax.models.vae import DiagonalGaussian
from sdjax.training import checkpoint, losses
from sdjax.training.curves import draw_curves
from sdjax.training.loop import Budget, fit, learning_rate_scale
from sdjax.training.step import EMA_GAMMA, TrainState, ema_decay, train_step

TARGET = jnp.arange(4.0)
OPTIMIZER = optax.adam(0.1)


def noisy_distance(params, data, key):
    """A toy: the distance to the data, seen through noise that the key decides."""
    noise = 0.1 * jax.random.normal(key, data.shape)
    return ((params["w"] - data + noise) ** 2).mean(), {"first": params["w"][0]}


def new_state():
    return TrainState.create({"w": jnp.full(4, 5.0)}, OPTIMIZER)


def run(path, steps):
    step = train_step(noisy_distance, OPTIMIZER)
    budget = Budget(steps=steps)
    return fit(step, new_state(), TARGET, jax.random.key(7), budget=budget, warmup=5, path=path, log_steps=20)


def test_the_toy_is_learned_and_logged(tmp_path):
    state = run(tmp_path / "toy.npz", 200)
    np.testing.assert_allclose(state.params["w"], TARGET, atol=0.1)
    log = np.genfromtxt(tmp_path / "toy.csv", delimiter=",", names=True)
    assert log["step"].tolist() == list(range(20, 201, 20))
    assert log["loss"][-1] < 0.05 < 1 < log["loss"][0]


class Killed(Exception):
    pass


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole.npz", 40)
    step, calls = train_step(noisy_distance, OPTIMIZER), []

    def dies_at_25(state, data, key, scale):
        def count(_):
            calls.append(None)
            if len(calls) == 25:
                raise Killed

        jax.debug.callback(count, state.step)
        return step(state, data, key, scale)

    arguments = (TARGET, jax.random.key(7))
    options = {"budget": Budget(steps=40), "warmup": 5, "path": tmp_path / "cut.npz", "save_seconds": 0}
    with pytest.raises(Exception, match="Killed"):
        fit(dies_at_25, new_state(), *arguments, **options)
    with np.load(tmp_path / "cut.npz") as saved:
        assert 0 < saved["['state'].step"] < 40
    continued = fit(step, new_state(), *arguments, **options)
    jax.tree.map(np.testing.assert_array_equal, continued, whole)


def test_ema_is_the_closed_form():
    """ema_n = sum_i (1 - d_i) prod_{j > i} d_j w_i + prod_j d_j w_0"""
    step = jax.jit(train_step(noisy_distance, OPTIMIZER))
    state = new_state()
    history = [state.params["w"]]
    for _ in range(12):
        state, _ = step(state, TARGET, jax.random.key(0), jnp.float32(1))
        history.append(state.params["w"])
    decays = [(1 - 1 / n) ** (EMA_GAMMA + 1) for n in range(1, 13)]
    weights = [np.prod(decays)] + [(1 - decays[i]) * np.prod(decays[i + 1 :]) for i in range(12)]
    np.testing.assert_allclose(state.ema["w"], np.tensordot(weights, history, 1), rtol=1e-5)
    np.testing.assert_allclose([ema_decay(jnp.int32(i)) for i in range(12)], decays, rtol=1e-5)


def test_ema_weights_are_a_power_of_time():
    """w(t) = (gamma + 1) t^gamma / n^(gamma + 1), whose spread is 5 % of n (arXiv:2312.02696, equations 121 to 124)"""
    n = 4000
    decays = np.array([ema_decay(jnp.int32(i)) for i in range(n)], np.float64)
    weights = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1)
    t = np.arange(1, n + 1)
    np.testing.assert_allclose(
        weights[n // 2 :], (EMA_GAMMA + 1) * t[n // 2 :] ** EMA_GAMMA / n ** (EMA_GAMMA + 1), rtol=0.02
    )
    mean = (weights * t).sum()
    assert np.sqrt((weights * (t - mean) ** 2).sum()) / n == pytest.approx(0.05, rel=0.01)


def test_the_scale_multiplies_the_update():
    step = train_step(noisy_distance, OPTIMIZER)
    start = new_state()
    ends = [step(start, TARGET, jax.random.key(0), jnp.float32(scale))[0] for scale in (1, 0.5, 0)]
    moved = [end.params["w"] - start.params["w"] for end in ends]
    np.testing.assert_allclose(moved[1], moved[0] / 2, rtol=1e-4)
    assert not moved[2].any()


def test_learning_rate_rises_and_falls_to_zero():
    assert learning_rate_scale(0, 0.0, warmup=4) == 0.25
    assert learning_rate_scale(10, 0.0, warmup=4) == 1
    assert learning_rate_scale(10, 0.75, warmup=4) == 0.25
    assert learning_rate_scale(10, 1.0, warmup=4) == 0


def test_a_budget_ends_at_what_is_spent_first():
    budget = Budget(steps=100, minutes=2)
    assert budget.spent(50, 30) == 0.5
    assert budget.spent(10, 120) == 1
    assert Budget(steps=10).spent(5, 1e9) == 0.5


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a.npz", {"w": jnp.zeros(3), "b": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"another model.*'w'"):
        checkpoint.restore(tmp_path / "a.npz", {"w": jnp.zeros(4), "b": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"another model.*'b'"):
        checkpoint.restore(tmp_path / "a.npz", {"w": jnp.zeros(3)})


def test_a_part_of_a_checkpoint_can_be_read(tmp_path):
    checkpoint.save(tmp_path / "a.npz", {"ema": {"w": jnp.ones(3)}, "step": jnp.zeros(())})
    read = checkpoint.restore(tmp_path / "a.npz", {"w": jnp.zeros(3)}, "['ema']")
    np.testing.assert_array_equal(read["w"], np.ones(3))
    with pytest.raises(ValueError, match=r"another model.*'b'"):
        checkpoint.restore(tmp_path / "a.npz", {"w": jnp.zeros(3), "b": jnp.zeros(3)}, "['ema']")


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    checkpoint.save(path, {"w": jnp.zeros(3)})

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"w": jnp.ones(3)})
    np.testing.assert_array_equal(checkpoint.restore(path, {"w": jnp.ones(3)})["w"], np.zeros(3))


def test_noise_and_velocity_are_those_of_diffusers():
    scheduler = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas = jnp.asarray(sampling.from_config("ddpm").schedule.alpha_bar, jnp.float32)
    np.testing.assert_allclose(alphas, scheduler.alphas_cumprod, rtol=2e-4)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 4, 4, 8), dtype=np.float32)
    t = np.array([0, 500, 999])
    x, v = losses.add_noise(jnp.asarray(x0), jnp.asarray(noise), alphas[t])
    tensors = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(t)
    np.testing.assert_allclose(x, scheduler.add_noise(*tensors), atol=1e-4)
    np.testing.assert_allclose(v, scheduler.get_velocity(*tensors), atol=1e-4)


def test_kl_is_torchs():
    rng = np.random.default_rng(0)
    mean, logvar = rng.standard_normal((2, 2, 3, 3, 4), dtype=np.float32)
    q = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(logvar / 2)))
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    actual = losses.kl_divergence(DiagonalGaussian(jnp.asarray(mean), jnp.asarray(logvar)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_reconstruction_loss_and_psnr():
    target = jnp.zeros((2, 8, 8, 3))
    assert losses.reconstruction_loss(target, target) == 0
    np.testing.assert_allclose(losses.reconstruction_loss(target + 0.5, target), 0.5 + 0.25)
    step = target.at[:, :, 4:].set(1.0)
    np.testing.assert_allclose(losses.reconstruction_loss(step, target), 0.5 + 0.5 + 0 + 1 / 7, rtol=1e-6)
    np.testing.assert_allclose(losses.psnr(target + 0.2, target), 20.0, rtol=1e-5)


def test_captions_are_dropped_at_the_rate():
    ids, empty = jnp.ones((4000, 5), jnp.int32), jnp.zeros(5, jnp.int32)
    dropped = np.asarray(losses.drop_captions(jax.random.key(0), ids, empty, 0.1))
    assert (dropped == dropped[:, :1]).all()
    assert (dropped[:, 0] == 0).mean() == pytest.approx(0.1, abs=0.02)


def test_curves_show_once_what_a_killed_run_did_twice(tmp_path):
    rows = ["50,9,0.5", "100,18,0.4", "150,27,0.9", "100,19,0.4", "150,28,0.3"]
    for name, kept in (("killed", rows), ("whole", [rows[0], *rows[3:]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unet.csv").write_text("\n".join(["step,seconds,loss", *kept]))
        draw_curves([tmp_path / name / "unet.csv"], tmp_path / f"{name}.png")
    assert (tmp_path / "killed.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
