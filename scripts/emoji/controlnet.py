"""Trains a ControlNet for the embedded model: the edges of a picture -> a drawing that has them.

    python scripts/emoji/train.py prepare --package lobehub-fluent-emoji-3d-*.tgz
    python scripts/emoji/controlnet.py all --out my-controlnet
    python scripts/emoji/controlnet.py measure --out my-controlnet

`prepare` makes drawings.npz. `controls`, `train` and `export` are the stages of `all`; a run that was killed goes on
from its last checkpoint when the same command is given again. `measure` prints how well pictures keep to edges, `sheet`
draws some.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import recipe
from controls import Controls, make_controls
from flax import nnx
from following import measure, sheet
from jax import Array
from model import half
from parts import adam, fit_parts, over_devices, trained

import sdjax
from sdjax import sampling
from sdjax.models import CLIPTextModel, ControlNetModel, UNet2DConditionModel
from sdjax.training import losses
from sdjax.training.step import LossAndMetrics

TRAINED = ["controlnet"]


class Controlled(nnx.Module):
    """The ControlNet, which learns, and what it serves."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        self.text_encoder, self.unet = text_encoder, unet
        self.controlnet = ControlNetModel.from_unet(unet, **recipe.CONTROLNET)


def controlnet_loss(model: Controlled, data: dict[str, Any], key: Array, *, batch: int) -> LossAndMetrics:
    """The error in the velocity of a random batch of latents whose pictures' edges are known, at random times.

    t = T (1 - u^2) with u even in 0 to 1: where there is much noise, it is decided what is where.
    """
    draw, form, drop, time, noise = jax.random.split(key, 5)
    P, F, _ = data["input_ids"].shape
    p, f = (jax.random.randint(key, (batch,), 0, high) for key, high in ((draw, P), (form, F)))
    ids = losses.drop_captions(drop, data["input_ids"][p, f], data["empty"], recipe.EMPTY_CAPTIONS)
    x0, edges = data["latents"][p].astype(jnp.float32) * data["scaling_factor"], data["edges"][p]
    alphas_cumprod = jnp.asarray(sampling.from_config(recipe.SCHEDULER).schedule.alpha_bar, jnp.float32)
    u = (jnp.arange(batch) + jax.random.uniform(time, (batch,))) / batch
    t = jnp.int32(len(alphas_cumprod) * (1 - u**2)).clip(max=len(alphas_cumprod) - 1)
    noise = jax.random.normal(noise, x0.shape)
    x, v = losses.add_noise(x0, noise, alphas_cumprod[t]), losses.velocity(x0, noise, alphas_cumprod[t])
    x, v, t, ids, edges = over_devices((x, v, t, ids, edges))
    states, net = model.text_encoder(ids), model.controlnet
    residuals = net(x, t, states, net.embed_picture(white_on_black(edges)))
    prediction = model.unet(x, t, states, residuals=residuals)
    return losses.denoising_loss(prediction.astype(jnp.float32), v), {}


def white_on_black(edges: Array) -> Array:
    """Packed edges [B H W/8] -> pictures [B H W 3] in 0 to 1"""
    return jnp.repeat(jnp.unpackbits(edges, axis=-1)[..., None].astype(jnp.float32), 3, axis=-1)


def train(args: argparse.Namespace) -> None:
    """controls -> controlnet.npz"""
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model, dtype="float32")
    data = Controls.load(args.work / "controls")._asdict()
    data |= {"scaling_factor": pipe.vae.config.scaling_factor, "empty": pipe.tokenizer("")[0]}
    model, loss = Controlled(pipe.text_encoder, pipe.unet), partial(controlnet_loss, batch=args.batch)
    fit_parts(args, "controlnet", model, TRAINED, loss, adam(args.rate), data, seed=6, warmup=100)


def export(args: argparse.Namespace) -> None:
    """The averaged weights as a diffusers folder in float16."""
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(args.model, dtype="float32")
    model = nnx.eval_shape(Controlled, pipe.text_encoder, pipe.unet)
    model = trained(model, args.work / "controlnet.npz", TRAINED)
    half(model.controlnet).save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.1f} MB of weights")


ALL = {"controls": make_controls, "train": train, "export": export}
STAGES = {**ALL, "measure": measure, "sheet": sheet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("train_emoji"), help="folder of everything intermediate")
    parser.add_argument("--out", type=Path, default=Path("my-controlnet"), help="folder of the finished ControlNet")
    parser.add_argument("--model", type=Path, default=sdjax.EMBEDDED_MODEL, help="folder of the model it is for")
    parser.add_argument("--steps", dest="controlnet_steps", type=float, default=20000, help="of the optimiser")
    parser.add_argument("--minutes", dest="controlnet_minutes", type=float, default=float("inf"), help="if sooner")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    args = parser.parse_args()
    for stage in ALL if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
