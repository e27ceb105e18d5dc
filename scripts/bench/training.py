"""Seconds and memory of a LoRA's training step on this CPU, sdjax against PyTorch diffusers with PEFT.

    python scripts/bench/training.py                 Stable Diffusion 1.5's UNet, random weights, 512x512
    python scripts/bench/training.py --model tiny    a rehearsal

One picture, rank 4 on to_q, to_k, to_v and to_out, float32, AdamW, text states and latents given; a process a side, one
after the other. Prints the median of the steps after the first two, and the process's memory at its peak.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SIDES = ("sdjax", "pytorch")
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TINY = {**SD15, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64}
CONFIGS = {"sd15": SD15, "tiny": TINY}
TIMESTEP = 500


def of_sdjax(config: dict, side: int) -> Callable[[], float]:
    """A function that makes a step and returns its loss."""
    from types import SimpleNamespace

    import jax
    from flax import nnx

    from sdjax import UNet2DConditionModel, sampling
    from sdjax.models import AutoencoderKL, AutoencoderKLConfig
    from sdjax.training import lora, optimizers
    from sdjax.training.objective import Objective
    from sdjax.training.trainer import Trainer, training_mesh

    make = nnx.jit(lambda: UNet2DConditionModel.from_config(config, rngs=nnx.Rngs(0)))
    vae = AutoencoderKL.described(AutoencoderKLConfig(), np.float32)
    parts = {"unet": make(), "vae": vae, "text_encoder": None, "text_encoder_2": None}
    pipe = SimpleNamespace(**parts, scheduler=sampling.from_config("ddpm"))
    trained = lora.begin(pipe, lora.Lora(rank=4), jax.random.key(0), texts_cached=True)
    optimizer = optimizers.create("adamw", 1e-4)
    trainer = Trainer(trained, Objective.of(pipe.scheduler), optimizer, mesh=training_mesh(jax.devices()[:1]))
    rng = np.random.default_rng(0)
    batch = {
        "moments": rng.standard_normal((1, side, side, 8), np.float32),
        "text": {"hidden": rng.standard_normal((1, 77, config["cross_attention_dim"]), np.float32)},
    }
    state, key = trainer.state(), jax.random.key(1)

    def step() -> float:
        nonlocal state
        state, metrics = trainer(state, batch, key)
        return float(metrics["loss"])

    return step


def of_pytorch(config: dict, side: int) -> Callable[[], float]:
    """The same."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [value for value in unet.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, text = torch.randn(1, 4, side, side), torch.randn(1, 77, config["cross_attention_dim"])

    def step() -> float:
        noise, t = torch.randn_like(latents), torch.tensor([TIMESTEP])
        prediction = unet(scheduler.add_noise(latents, noise, t), t, text).sample
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(side: str, config: dict, size: int, steps: int) -> dict[str, float]:
    """Seconds of the first step, the median of those after the second, GB at the peak."""
    step = {"sdjax": of_sdjax, "pytorch": of_pytorch}[side](config, size // 8)
    seconds = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"first s": seconds[0], "step s": statistics.median(seconds[2:]), "peak GB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help="this side alone, as JSON")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, CONFIGS[args.model], args.size, args.steps), allow_nan=False))
        return
    for side in SIDES:
        run = subprocess.run([sys.executable, *sys.argv, "--side", side], check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(run.stdout.splitlines()[-1])
        print(side, *(f"{name} {value:.2f}" for name, value in found.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
