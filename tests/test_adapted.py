"""sdjax.runtime.adapted: what a UNet with LoRAs predicts, and its gradients, against PyTorch diffusers with PEFT."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from lora_files import EVERYTHING, factors, kohya, load_theirs, save

from sdjax import UNet2DConditionModel
from sdjax.checkpoints import lora
from sdjax.checkpoints.folder import variables
from sdjax.runtime import parallel
from sdjax.runtime.adapted import adapted
from sdjax.runtime.loras import Loras
from sdjax.runtime.network import Network

SAMPLE, TIMES, CONTEXT = oracle.normal(2, 8, 8, 4), np.array([3, 900]), oracle.normal(2, 7, 24)


@pytest.fixture(scope="module")
def unet(sd1_folder):
    return UNet2DConditionModel.from_pretrained(sd1_folder, "unet", dtype=jnp.float32)


@pytest.fixture(scope="module")
def network(unet):
    return Network(unet, parallel.data_mesh(jax.devices()[:1]))


def test_parameters_have_the_names_of_the_checkpoint(network):
    reference = oracle.unet(oracle.SD1.unet).state_dict()
    assert network.params().keys() == reference.keys()
    assert network.params()["down_blocks.0.resnets.0.conv1.weight"].shape[:2] == (3, 3)


def test_names_that_do_not_fit_are_listed(network):
    params = network.params()
    renamed = {"elsewhere" if name == "conv_in.bias" else name: value for name, value in params.items()}
    with pytest.raises(ValueError, match=r"missing or unknown: conv_in\.bias, elsewhere$"):
        network.graph.merge(renamed)


def test_gradients_with_respect_to_the_factors_are_those_of_pytorch(unet, network, tmp_path):
    """Of every linear layer and convolution, ranks 2 and scale alpha / rank = 0.75, through the whole UNet."""
    theirs = oracle.pipeline(tmp_path, oracle.SD1)
    path = save(tmp_path / "lora.safetensors", kohya(factors({"unet": theirs.unet}, 2, only=EVERYTHING)))
    load_theirs(theirs, path)
    trained = {name: value for name, value in theirs.unet.named_parameters() if ".lora_" in name}
    for value in trained.values():
        value.requires_grad_(True)
    sample, context = oracle.nchw(SAMPLE), torch.tensor(CONTEXT)
    theirs.unet(sample, torch.tensor(TIMES), context).sample.square().mean().backward()

    @partial(jax.jit, static_argnums=0)
    def gradient(graph, params, changes):
        def loss(changes):
            return (graph.merge(adapted(params, {"a": changes}))(SAMPLE, TIMES, CONTEXT) ** 2).mean()

        return jax.grad(loss)(changes)

    changes = lora.read(path, Loras({"unet": unet}).shapes, unet.config.to_dict())["unet"]
    ours = gradient(network.graph, network.params(), changes)
    assert 2 * len(ours) == len(trained)
    largest = max(value.grad.abs().max() for value in trained.values())
    for name, change in ours.items():
        for factor, value in (("lora_A", change.down), ("lora_B", change.up)):
            grad = trained[name.replace(".weight", f".{factor}.a.weight")].grad.numpy()
            np.testing.assert_allclose(value, grad.reshape(value.shape), rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_merged_on_the_host_is_what_the_function_computes(dtype, sd1_folder, tmp_path):
    ours = UNet2DConditionModel.from_pretrained(sd1_folder, "unet", dtype=dtype)
    loras, weights = Loras({"unet": ours}), {"a": 0.7, "b": -1.5}
    base = {name: variable.get_value() for name, variable in variables(ours).items()}
    for seed, name in enumerate(weights):
        tensors = kohya(factors({"unet": oracle.unet(oracle.SD1.unet)}, 2, seed, EVERYTHING))
        path = save(tmp_path / f"{name}.safetensors", tensors)
        loras.add(name, lora.read(path, loras.shapes, ours.config.to_dict()))
    loras.set(weights)
    layers = {name: own["unet"] for name, own in loras.layers.items()}
    computed = jax.jit(partial(adapted, factors=layers))(base, weights=weights)
    for name, variable in variables(ours).items():
        assert computed[name].dtype == dtype
        tolerance = 1e-6 if dtype == "float32" else 2**-7  # the last bit
        oracle.assert_close(computed[name], variable.get_value(), tolerance)
    assert (np.asarray(computed["conv_in.weight"]) != np.asarray(base["conv_in.weight"])).mean() > 0.9


def test_a_change_of_another_model_is_named(network):
    with pytest.raises(KeyError, match=r"conv_on\.weight"):
        adapted(network.params(), {"a": {"conv_on.weight": lambda weight: weight}})
