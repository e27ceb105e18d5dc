"""Learning rates are those of PyTorch diffusers; optimisers learn what is asked by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_scheduler

from sdjax.training import optimizers


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rates_are_those_of_diffusers(name, warmup):
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    options = {"num_cycles": 2} if name == "cosine_with_restarts" else {}
    options |= {"power": 2.0} if name == "polynomial" else {}
    scheduler = get_scheduler(name, theirs, num_warmup_steps=warmup, num_training_steps=20, **options)
    expected = []
    for _ in range(21):
        expected.append(scheduler.get_last_lr()[0])
        theirs.step()
        scheduler.step()
    ours = optimizers.schedule(name, 0.3, steps=20, warmup_steps=warmup, **options)
    np.testing.assert_allclose(jax.vmap(ours)(jnp.arange(21)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("adamw", 0.1), ("AdamW", 0.1), ("adafactor", 0.1), ("lion", 0.05), ("prodigy", 1.0), ("muon", 0.4)],
)
def test_optimisers_learn(name, rate):
    """A matrix, a vector and a table of embeddings, from far away."""
    names = ("net.weight", "net.bias", "token_embedding.weight")
    shapes = dict(zip(names, ((6, 4), (4,), (5, 4)), strict=True))
    target = {"unet": {key: jnp.full(shape, 2.0) for key, shape in shapes.items()}}
    params = {"unet": {key: jnp.full(shape, 0.1) for key, shape in shapes.items()}}
    optimizer = optimizers.create(name, optimizers.schedule("linear", rate, steps=200), weight_decay=0.0)

    @jax.jit
    def step(params, state):
        error = jax.tree.map(jnp.subtract, params, target)
        updates, state = optimizer.update(error, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(200):
        params, state = step(params, state)
    for key in shapes:
        np.testing.assert_allclose(params["unet"][key], 2.0, atol=0.2, err_msg=f"{name} {key}")


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match=r"optimizer='sgd': one of adamw, adafactor, lion, prodigy, muon$"):
        optimizers.create("sgd", 0.1)
    with pytest.raises(ValueError, match="no library has an 8-bit Adam for JAX"):
        optimizers.create("adamw8bit", 0.1)
    with pytest.raises(ValueError, match="lr_scheduler='step': one of constant"):
        optimizers.schedule("step", 0.1, steps=10)
