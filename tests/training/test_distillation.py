"""Latent consistency distillation as a LoRA, against PyTorch: the teacher is the model without its LoRA."""

import jax
import numpy as np
import oracle
import torch
import torch_training
from comparing import check_steps, set_values
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import sdjax
from sdjax.training import lora
from sdjax.training.distillation import Consistency, ConsistencyDraws
from sdjax.training.objective import Objective

DRAWS = ConsistencyDraws(
    np.int32([0, 31]),
    np.float32([6.0, 13.5]),
    oracle.normal(*torch_training.SHAPE, seed=10),
    oracle.normal(*torch_training.SHAPE, seed=11),
)


def their_loss(pipe, batch):
    """Of epsilon prediction, written from algorithm 1 of arXiv:2310.04378 and section 3 of arXiv:2311.05556."""
    alphas = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod

    def at(t):
        return alphas[t][:, None, None, None]

    def clean_and_noise(x, t, states, has_lora):
        for part in pipe.unet.modules():
            if isinstance(part, BaseTunerLayer):
                part._disable_adapters = not has_lora
        noise = pipe.unet(x, t, states).sample
        return (x - (1 - at(t)).sqrt() * noise) / at(t).sqrt(), noise

    def consistent(x, t, states):
        scaled = 10.0 * t[:, None, None, None]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip * x + out * clean_and_noise(x, t, states, True)[0]

    steps = torch.tensor(DRAWS.steps).long()
    begin = (steps + 1) * 20 - 1
    end = (begin - 20).clamp(min=0)
    mean, logvar = (oracle.nchw(part) for part in np.split(batch["moments"], 2, axis=-1))
    x0 = (mean + (logvar / 2).exp() * oracle.nchw(DRAWS.posterior)) * pipe.vae.config.scaling_factor
    x = at(begin).sqrt() * x0 + (1 - at(begin)).sqrt() * oracle.nchw(DRAWS.noise)
    text, none = (torch.tensor(batch[name]["hidden"]) for name in ("text", "unconditional_text"))
    student = consistent(x, begin, text)
    with torch.no_grad():
        halves = zip(*(clean_and_noise(x, begin, states, False) for states in (text, none)), strict=True)
        scale = torch.tensor(DRAWS.guidance)[:, None, None, None]
        clean, noise = (first + scale * (first - second) for first, second in halves)
        target = consistent(at(end).sqrt() * clean + (1 - at(end)).sqrt() * noise, end, text)
    return (((student - target) ** 2 + 1e-6).sqrt() - 1e-3).mean()


def test_steps_are_those_of_pytorch(tmp_path):
    reference = oracle.pipeline(tmp_path, oracle.ATTENDING)
    reference.save_pretrained(tmp_path / "model")
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    trained = lora.begin(pipe, lora.Lora(rank=2), jax.random.key(0), texts_cached=True)
    rng, own = np.random.default_rng(0), trained.initial["unet"]
    for name in own:
        if name.endswith("up.weight"):
            own[name] = 0.1 * rng.standard_normal(own[name].shape, dtype=np.float32)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=list(lora.UNET)), reference.unet)
    theirs, names = dict(reference.unet.named_parameters()), (("down", "lora_A"), ("up", "lora_B"))
    parameters = {
        ("unet", f"{path}.lora.{ours}.weight"): theirs[f"{path}.{peft}.default.weight"]
        for path in {name.partition(".lora.")[0] for name in own}
        for ours, peft in names
    }
    set_values(parameters, trained.initial)
    batch = {
        "moments": torch_training.batch(reference)["moments"],
        "text": {"hidden": oracle.normal(2, 7, 24, seed=1)},
        "unconditional_text": {"hidden": oracle.normal(2, 7, 24, seed=2)},
    }
    objective = Consistency(objective=Objective.of(pipe.scheduler))
    check_steps(trained, objective, batch, DRAWS, parameters, lambda: their_loss(reference, batch))


def test_draws_are_within_their_ranges():
    objective = Consistency(objective=Objective(alphas_cumprod=tuple(np.linspace(0.99, 0.01, 1000))))
    draws = objective.draws(jax.random.key(0), (2000, 1, 1, 1))
    assert (draws.steps.min(), draws.steps.max()) == (0, 49)
    assert 5 <= draws.guidance.min() < 5.1
    assert 14.9 < draws.guidance.max() <= 15
