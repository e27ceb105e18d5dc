"""The reference: a training step of PyTorch diffusers' examples on tiny checkpoints, with given noise and timesteps."""

import numpy as np
import oracle
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdjax.training.objective import Draws

SHAPE = (2, 8, 8, 4)
TIMESTEPS = (37, 811)
LEARNING_RATE = 1e-3


def draws(**given):
    arrays = {name: oracle.normal(*SHAPE, seed=seed) for seed, name in enumerate(("noise", "posterior"), 10)}
    return Draws(**arrays | {"timesteps": np.int32(TIMESTEPS)} | given)


def batch(pipe, words=(5, 9, 40)):
    """Moments, tokens and, for SDXL, sizes of two images."""
    moments = np.concatenate([oracle.normal(*SHAPE, seed=20), 0.3 * oracle.normal(*SHAPE, seed=21)], axis=-1)
    own = {"moments": moments, "input_ids": {}}
    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if getattr(pipe, name, None) is not None:
            pad = getattr(pipe, tokenizer).pad_token_id
            bos, eos = (oracle.vocabulary()[token] for token in (oracle.BOS, oracle.EOS))
            rows = [[bos, *words, eos], [bos, *words[::-1], 77, eos]]
            own["input_ids"][name] = np.int32([row + [pad] * (77 - len(row)) for row in rows])
    if hasattr(pipe, "text_encoder_2"):
        own["time_ids"] = np.float32([[32, 40, 0, 4, 16, 16], [64, 32, 8, 0, 16, 16]])
    return own


def condition(pipe, given):
    """(text states, what else the UNet takes)"""
    ids = {name: torch.tensor(own).long() for name, own in given["input_ids"].items()}
    if "text_encoder_2" not in ids:
        return pipe.text_encoder(ids["text_encoder"])[0], {}
    outputs = [getattr(pipe, name)(ids[name], output_hidden_states=True) for name in sorted(ids)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return states, {"text_embeds": outputs[-1][0], "time_ids": torch.tensor(given["time_ids"])}


def loss(pipe, given, own, *, snr_gamma=None, noise_offset=0.0, input_perturbation=0.0, controlnet=None):
    """As `train_text_to_image.py` and its kin have it."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    mean, logvar = (oracle.nchw(part) for part in np.split(given["moments"], 2, axis=-1))
    latents = (mean + (logvar / 2).exp() * oracle.nchw(own.posterior)) * pipe.vae.config.scaling_factor
    timesteps, noise = torch.tensor(own.timesteps).long(), oracle.nchw(own.noise)
    if noise_offset:
        noise = noise + noise_offset * oracle.nchw(own.offset)
    shown = noise + input_perturbation * oracle.nchw(own.perturbation) if input_perturbation else noise
    noisy = scheduler.add_noise(latents, shown, timesteps)
    states, added = condition(pipe, given)
    kw = {"added_cond_kwargs": added} if added else {}
    if controlnet is not None:
        picture = oracle.nchw(given["control_image"])
        down, mid = controlnet(noisy, timesteps, states, controlnet_cond=picture, return_dict=False, **kw)
        kw |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    prediction = pipe.unet(noisy, timesteps, states, **kw).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if "mask" in given:
        errors = errors * oracle.nchw(given["mask"])
    losses = errors.mean(dim=[1, 2, 3])
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        losses = losses * torch.minimum(snr, torch.full_like(snr, snr_gamma)) / (snr + is_v)
    if "weights" in given:
        losses = losses * torch.tensor(given["weights"])
    return losses.mean()


def trained(parameters, compute_loss, steps=10, after_step=lambda: None):
    """(the first loss, the first gradients, values after the steps) of AdamW, by name."""
    for value in parameters.values():
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=1e-2)
    first = None
    for _ in range(steps):
        value = compute_loss()
        value.backward()
        for own in parameters.values():  # a layer whose states are not read: optax decays it, PyTorch does not
            own.grad = torch.zeros_like(own) if own.grad is None else own.grad
        if first is None:
            first = value.item(), {name: own.grad.numpy().copy() for name, own in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return *first, {name: value.detach().numpy() for name, value in parameters.items()}
