"""Ten steps of ours beside ten of PyTorch's, and pictures of both."""

import jax
import numpy as np
import optax
import oracle
import torch
import torch_training

from sdjax.checkpoints.folder import torch_layout
from sdjax.training import optimizers
from sdjax.training.trainer import Trainer

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
LATENTS = oracle.normal(1, *torch_training.SHAPE[1:])


def flat(tree):
    return {(component, name): value for component, own in tree.items() for name, value in own.items()}


def compare(ours, theirs, tolerance, left_out=()):
    """Each within the tolerance of the largest of all."""
    assert ours.keys() == theirs.keys()
    scale = max(np.abs(value).max() for value in theirs.values())
    for key in ours.keys() - set(left_out):
        value = ours[key]
        value = torch_layout(key[1], np.asarray(value)).reshape(theirs[key].shape)
        np.testing.assert_allclose(value, theirs[key], rtol=0, atol=tolerance * scale, err_msg=str(key))


def check_steps(trained, objective, batch, draws, parameters, their_loss, rows=slice(None), after_step=lambda: None):
    """Loss, gradients and values after ten steps of AdamW are those of PyTorch; returns ours.

    parameters: {(component, name): PyTorch's}, of which `rows` are compared.
    """
    optimizer = optimizers.create("adamw", torch_training.LEARNING_RATE, max_grad_norm=None)
    trainer = Trainer(trained, objective, optimizer)
    loss, grads, values = torch_training.trained(parameters, their_loss, after_step=after_step)
    state = trainer.state()
    for i in range(10):
        state, metrics = trainer(state, batch, draws)
        if i == 0:
            np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
            [adam] = [own for own in state.opt_state if isinstance(own, optax.ScaleByAdamState)]
            first = jax.tree.map(lambda mean: np.asarray(mean) / np.float32(0.1), adam.mu)
            compare(flat(first), {key: value[rows] for key, value in grads.items()}, 1e-4)
    # a number that is added to all scores of a query changes nothing: Adam makes steps of what is rounding
    without_gradient = [key for key in parameters if key[1].endswith("k_proj.bias")]
    compare(flat(state.params), {key: value[rows] for key, value in values.items()}, 1e-4, without_gradient)
    return jax.device_get(state.params)


def set_values(parameters, initial):
    """Gives PyTorch's parameters the values of ours."""
    for (component, name), parameter in parameters.items():
        value = np.ascontiguousarray(torch_layout(name, initial[component][name]))
        parameter.data = torch.tensor(value).reshape(parameter.shape)


def our_picture(pipe, prompt="a blue goose", **call):
    return pipe(prompt, latents=LATENTS, prompt_syntax="plain", **CALL | call).images


def their_picture(pipe, prompt="a blue goose", **call):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, latents=oracle.nchw(LATENTS), **CALL | call).images
