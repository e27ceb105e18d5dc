"""LoRA as it is trained, against PyTorch diffusers with PEFT."""

import jax
import numpy as np
import optax
import oracle
import pytest
import torch
import torch_training
from peft import LoraConfig, inject_adapter_in_model

import sdjax
from sdjax.checkpoints.folder import torch_layout
from sdjax.training import lora, optimizers
from sdjax.training.lora import Lora
from sdjax.training.objective import Objective
from sdjax.training.trainer import Trainer

RANK, ALPHA = 2, 3.0


def begin(folder, **options):
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(folder)
    given = Lora(rank=RANK, alpha=ALPHA, text_encoder_targets=lora.TEXT_ENCODER, **options)
    trained = lora.begin(pipe, given, jax.random.key(0))
    rng = np.random.default_rng(0)
    for own in trained.initial.values():  # else up is 0, and nothing of down counts
        for name, value in own.items():
            if name.endswith("up.weight"):
                own[name] = 0.1 * rng.standard_normal(value.shape, dtype=np.float32)
    return pipe, trained


def their_parameters(pipe, trained, **config):
    """PEFT's, with the values of ours: {(component, our name): parameter}."""
    found = {}
    for component, own in trained.initial.items():
        model, paths = getattr(pipe, component), dict.fromkeys(name.partition(".lora.")[0] for name in own)
        targets = [path.removeprefix("text_model.") for path in paths]
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **config), model)
        theirs = {f".{name}".replace(".text_model", ""): value for name, value in model.named_parameters()}
        for name, value in own.items():
            path, _, part = name.partition(".lora.")
            kinds = {"down.weight": "lora_A.default.weight", "up.weight": "lora_B.default.weight"}
            kinds["magnitude"] = "lora_magnitude_vector.default.weight"
            parameter = theirs[f".{path.removeprefix('text_model.')}.{kinds[part]}"]
            parameter.data = torch.tensor(np.array(torch_layout(name, value))).reshape(parameter.shape)
            found[component, name] = parameter
    return found


def flat(tree):
    return {(component, name): value for component, own in tree.items() for name, value in own.items()}


def compare(ours, theirs, tolerance):
    """Each within the tolerance of the largest of its component."""
    assert ours.keys() == theirs.keys()
    scale = max(np.abs(value).max() for value in theirs.values())
    for key, value in ours.items():
        value = np.asarray(torch_layout(key[1], np.asarray(value))).reshape(theirs[key].shape)
        np.testing.assert_allclose(value, theirs[key], rtol=0, atol=tolerance * scale, err_msg=str(key))


@pytest.mark.parametrize("family", ["SD1", "SDXL"])
def test_steps_are_those_of_pytorch(family, tmp_path):
    reference = oracle.pipeline(tmp_path, getattr(oracle, family))
    reference.save_pretrained(tmp_path / "model")
    pipe, trained = begin(tmp_path / "model")
    optimizer = optimizers.create("adamw", torch_training.LEARNING_RATE, max_grad_norm=None)
    trainer = Trainer(trained, Objective.of(pipe.scheduler, snr_gamma=5.0), optimizer)
    batch, draws = torch_training.batch(reference), torch_training.draws()
    parameters = their_parameters(reference, trained)
    loss, grads, values = torch_training.trained(
        parameters, lambda: torch_training.loss(reference, batch, draws, snr_gamma=5.0)
    )
    state = trainer.state()
    for i in range(10):
        state, metrics = trainer(state, batch, draws)
        if i == 0:
            np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
            [adam] = [own for own in state.opt_state if isinstance(own, optax.ScaleByAdamState)]
            compare(flat(jax.tree.map(lambda mean: np.asarray(mean) / np.float32(0.1), adam.mu)), grads, 1e-4)
    compare(flat(state.params), values, 1e-4)
