"""Steps, runs that are cut and continued, and their state on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.training import checkpoint
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
        assert 0 < saved["state.step"] < 40
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
    decays = np.asarray(ema_decay(jnp.arange(n)), np.float64)
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
    read = checkpoint.restore(tmp_path / "a.npz", {"w": jnp.zeros(3)}, "ema")
    np.testing.assert_array_equal(read["w"], np.ones(3))
    with pytest.raises(ValueError, match=r"another model.*'b'"):
        checkpoint.restore(tmp_path / "a.npz", {"w": jnp.zeros(3), "b": jnp.zeros(3)}, "ema")


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    checkpoint.save(path, {"w": jnp.zeros(3)})

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"w": jnp.ones(3)})
    np.testing.assert_array_equal(checkpoint.restore(path, {"w": jnp.ones(3)})["w"], np.zeros(3))
