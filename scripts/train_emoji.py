"""Trains the embedded model: drawings -> VAE -> latents -> text encoder and UNet -> a diffusers folder.

    npm pack @lobehub/fluent-emoji-3d
    python scripts/train_emoji.py all --package lobehub-fluent-emoji-3d-*.tgz --out sdjax/assets/fluent-emoji

`prepare`, `vae`, `decoder`, `unet` and `export` are the stages of `all`. Everything lies in --work; a run that was
killed goes on from its last checkpoint when the same command is given again.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from sdjax import EMBEDDED_MODEL, StableDiffusionPipeline, parallel, samplers
from sdjax.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from sdjax.tokenizer import CLIPTokenizer
from sdjax.training import checkpoint, losses
from sdjax.training.drawings import DEFAULT_COLOR, PALETTE, Drawings, captions, compose, palette, place
from sdjax.training.loop import Budget, fit
from sdjax.training.prepare import prepare, read_wanted
from sdjax.training.step import LossAndMetrics, Params, TrainState, train_step
from sdjax.training.vocabulary import train_tokenizer

NAMES = Path(__file__).with_name("emoji_names.txt")
SIZE = 64
SOURCE_SIZE = 96
ZOOM, ZOOM_JITTER, SHIFT_JITTER = 0.95, 0.05, 2.0
JITTERS = 2
CAPTION_DROPOUT = 0.1
PLAIN_CAPTIONS = 0.2

VAE = {
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "force_upcast": False,
}
ENCODER, DECODER = ["encoder", "quant_conv"], ["decoder", "post_quant_conv"]
KL_WEIGHT = 1e-4
UNET = {
    "sample_size": SIZE // 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (96, 192),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
VOCABULARY = 2048
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # without effect here; PyTorch's pipeline warns of another
}


def random_placement(key: Array, rgba: Array) -> Array:
    """A drawing [S S 4] uint8 on the model's canvas [SIZE SIZE 4] in 0 to 1, at a random size and place."""
    zoom_key, shift_key = jax.random.split(key)
    zoom = ZOOM + ZOOM_JITTER * jax.random.uniform(zoom_key, minval=-1)
    shift = SHIFT_JITTER * jax.random.uniform(shift_key, (2,), minval=-1)
    return place(rgba.astype(jnp.float32) / 255, SIZE, zoom, shift)


def pictures(key: Array, rgba: Array, colors: Array) -> Array:
    """Drawings [B S S 4] randomly placed over backgrounds [B 3]: [B SIZE SIZE 3] in -1 to 1"""
    placed = jax.vmap(random_placement)(jax.random.split(key, len(rgba)), rgba)
    return 2 * compose(placed, colors) - 1


def optimizer(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.99, weight_decay=1e-2))


def vae_loss(graphdef: nnx.GraphDef, batch: int, params: Params, data: dict[str, Any], key: Array) -> LossAndMetrics:
    """Reconstruction and KL of a random batch of drawings over random backgrounds."""
    draw, color, placement, noise = jax.random.split(key, 4)
    rgba = data["rgba"][jax.random.randint(draw, (batch,), 0, len(data["rgba"]))]
    colors = data["palette"][jax.random.randint(color, (batch,), 0, len(PALETTE))]
    x = jax.lax.with_sharding_constraint(pictures(placement, rgba, colors), split_over_devices())
    vae = nnx.merge(graphdef, params, data["frozen"])
    posterior = vae.encode(x)
    y = vae.decode(posterior.sample(noise))
    loss = losses.reconstruction_loss(y, x) + KL_WEIGHT * losses.kl_divergence(posterior)
    return loss, {"psnr": losses.psnr(y, x), "latent_std": posterior.mean.std()}


def fit_vae(args: argparse.Namespace, stage: str, vae: AutoencoderKL, parts: list[str], budget: Budget) -> None:
    """Trains these parts of an autoencoder on drawings.npz: <stage>.npz"""
    drawings = Drawings.load(args.work / "drawings.npz")
    graphdef, params, frozen = replicated(vae, parts)
    data = {"rgba": jnp.asarray(drawings.rgba), "palette": jnp.asarray(palette()), "frozen": frozen}
    opt = optimizer(args.vae_rate)
    fit(
        train_step(partial(vae_loss, graphdef, args.vae_batch), opt, decay=0.998),
        initial_state(params, opt),
        data,
        jax.random.key(1),
        budget=budget,
        warmup=100,
        path=args.work / f"{stage}.npz",
    )


def new_vae() -> AutoencoderKL:
    return AutoencoderKL.from_config(VAE)


def train_vae(args: argparse.Namespace) -> None:
    """drawings.npz -> vae.npz"""
    budget = Budget(args.vae_steps, args.vae_minutes)
    fit_vae(args, "vae", initialised(new_vae), ENCODER + DECODER, budget)


def train_decoder(args: argparse.Namespace) -> None:
    """Trains the decoder on: the latents, and so the UNet, stay as they are. vae.npz -> decoder.npz"""
    fit_vae(args, "decoder", trained_vae(args), DECODER, Budget(args.decoder_steps, args.decoder_minutes))


def trained_vae(args: argparse.Namespace, decoder: bool = False) -> AutoencoderKL:
    """The autoencoder with its averaged weights; decoder: with those of decoder.npz, if there is one."""
    vae = trained(nnx.eval_shape(new_vae), args.work / "vae.npz", args.vae_rate)
    path = args.work / "decoder.npz"
    return trained(vae, path, args.vae_rate, DECODER) if decoder and path.exists() else vae


def cache_latents(args: argparse.Namespace) -> np.ndarray:
    """Every drawing on every colour in JITTERS random placements, encoded: float32 [N K J h w C], kept on disk."""
    path = args.work / "latents.npy"
    if not path.exists():
        drawings, colors = Drawings.load(args.work / "drawings.npz"), jnp.asarray(palette())
        graphdef, params, _ = replicated(trained_vae(args))

        @jax.jit
        def encode(params: Params, rgba: Array, key: Array) -> Array:
            placed = jnp.repeat(rgba[None], JITTERS, axis=0)
            keys = jax.random.split(key, JITTERS)
            placed = jax.vmap(random_placement)(keys, placed)
            x = 2 * compose(placed, colors[:, None]) - 1  # [K J H W 3]
            z = nnx.merge(graphdef, params).encode(x.reshape(-1, *x.shape[2:])).mode()
            return z.reshape(*x.shape[:2], *z.shape[1:])

        keys = jax.random.split(jax.random.key(2), len(drawings.names))
        latents = [np.asarray(encode(params, rgba, key)) for rgba, key in zip(drawings.rgba, keys, strict=True)]
        np.save(path, np.stack(latents))
    return np.load(path)


def scaling_factor(latents: np.ndarray) -> float:
    """What makes the latents' standard deviation 1."""
    return float(1 / latents.std())


def caption_ids(tokenizer: CLIPTokenizer, names: list[str]) -> np.ndarray:
    """The captions of every drawing on every colour and, last, on none: int32 [N K+1 forms L]"""
    texts = [[captions(name, color) for color in (*PALETTE, None)] for name in names]
    shape = np.shape(texts)
    return tokenizer(np.ravel(texts).tolist()).reshape(*shape, -1)


class TextToLatents(nnx.Module):
    """The text encoder and the UNet, which are trained as one."""

    def __init__(self, vocab_size: int):
        special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
        self.text_encoder = CLIPTextModel.from_config({**TEXT, "vocab_size": vocab_size, **special})
        self.unet = UNet2DConditionModel.from_config(UNET)

    def __call__(self, x: Array, t: Array, input_ids: Array) -> Array:
        return self.unet(x, t, self.text_encoder(input_ids))


def unet_loss(graphdef: nnx.GraphDef, batch: int, params: Params, data: dict[str, Array], key: Array) -> LossAndMetrics:
    """The error in the velocity of a random batch of latents at times spread evenly."""
    draw, color, jitter, plain, form, time, noise, drop = jax.random.split(key, 8)
    N, K, J = data["latents"].shape[:3]
    n, k, j, f = (
        jax.random.randint(key, (batch,), 0, high) for key, high in ((draw, N), (color, K), (jitter, J), (form, 2))
    )
    is_plain = jax.random.bernoulli(plain, PLAIN_CAPTIONS, (batch,))
    x0 = data["latents"][n, jnp.where(is_plain, list(PALETTE).index(DEFAULT_COLOR), k), j]
    ids = data["input_ids"][n, jnp.where(is_plain, K, k), f]
    ids = losses.drop_captions(drop, ids, data["empty"], CAPTION_DROPOUT)
    alphas_cumprod = jnp.asarray(samplers.from_config(SCHEDULER).schedule.alpha_bar, jnp.float32)
    t = jnp.int32((jnp.arange(batch) + jax.random.uniform(time, (batch,))) / batch * len(alphas_cumprod))
    x, v = losses.add_noise(x0, jax.random.normal(noise, x0.shape), alphas_cumprod[t])
    x, v, t, ids = jax.lax.with_sharding_constraint((x, v, t, ids), split_over_devices())
    return losses.denoising_loss(nnx.merge(graphdef, params)(x, t, ids), v), {}


def train_unet(args: argparse.Namespace) -> None:
    """latents and captions -> unet.npz, which has the text encoder too"""
    drawings = Drawings.load(args.work / "drawings.npz")
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    latents = cache_latents(args)
    data = {
        "latents": jnp.asarray(latents * scaling_factor(latents)),
        "input_ids": jnp.asarray(caption_ids(tokenizer, drawings.names)),
        "empty": jnp.asarray(tokenizer("")[0]),
    }
    graphdef, params, _ = replicated(initialised(lambda: TextToLatents(len(tokenizer.vocab))))
    opt = optimizer(args.unet_rate)
    fit(
        train_step(partial(unet_loss, graphdef, args.unet_batch), opt, decay=0.999),
        initial_state(params, opt),
        data,
        jax.random.key(3),
        budget=Budget(args.unet_steps, args.unet_minutes),
        warmup=200,
        path=args.work / "unet.npz",
    )


def export(args: argparse.Namespace) -> None:
    """The averaged weights as a diffusers folder, UNet and VAE in float16."""
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    vae = trained_vae(args, decoder=True)
    vae.config = dataclasses.replace(vae.config, scaling_factor=scaling_factor(cache_latents(args)))
    model = nnx.eval_shape(lambda: TextToLatents(len(tokenizer.vocab)))
    model = trained(model, args.work / "unet.npz", args.unet_rate)
    # transformers computes in the dtype that it finds, diffusers in float32
    pipe = StableDiffusionPipeline(model.text_encoder, half(model.unet), half(vae), tokenizer, SCHEDULER)
    pipe.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.1f} MB of weights")


def half(model: nnx.Module) -> nnx.Module:
    """The model with float16 parameters."""
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params))


def initialised(make: Callable[[], nnx.Module]) -> nnx.Module:
    """A new model, its random values made in one program."""
    return nnx.jit(make)()


initial_state = jax.jit(TrainState.create, static_argnums=1)


def trained(model: nnx.Module, path: Path, learning_rate: float, parts: list[str] | None = None) -> nnx.Module:
    """The model with the averaged weights of a checkpoint, which has these parts of it (None: all)."""
    graphdef, params, rest = nnx.split(model, has(parts), ...)
    state = jax.eval_shape(partial(TrainState.create, optimizer=optimizer(learning_rate)), params)
    state = checkpoint.restore(path, {"state": state, "seconds": jnp.zeros(())})["state"]
    return nnx.merge(graphdef, state.ema, rest)


def replicated(model: nnx.Module, parts: list[str] | None = None) -> tuple[nnx.GraphDef, Params, Params]:
    """A model's structure; the parameters of these parts (None: all) and the others, on every device."""
    sharding = NamedSharding(parallel.data_mesh(), parallel.REPLICATED)
    graphdef, params, rest = nnx.split(model, has(parts), ...)
    return graphdef, *jax.device_put((params, rest), sharding)


def has(parts: list[str] | None) -> Callable[[tuple, Any], bool]:
    """A filter of the parameters of these attributes of a model (None: all)."""
    return lambda path, _: parts is None or path[0] in parts


def split_over_devices() -> NamedSharding:
    return NamedSharding(parallel.data_mesh(), parallel.DATA)


def stage_prepare(args: argparse.Namespace) -> None:
    """The raw package to drawings.npz and the tokenizer."""
    drawings = prepare(args.package, read_wanted(NAMES), SOURCE_SIZE)
    args.work.mkdir(parents=True, exist_ok=True)
    drawings.save(args.work / "drawings.npz")
    texts = (text for name in drawings.names for color in (None, *PALETTE) for text in captions(name, color))
    train_tokenizer(texts, VOCABULARY, TEXT["max_position_embeddings"]).save_pretrained(args.work / "tokenizer")


STAGES = {"prepare": stage_prepare, "vae": train_vae, "decoder": train_decoder, "unet": train_unet, "export": export}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("train_emoji"), help="folder of everything intermediate")
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL, help="folder of the finished model")
    parser.add_argument("--package", type=Path, help="tarball of @lobehub/fluent-emoji-3d")
    for stage, steps in (("vae", 4000), ("decoder", 2000), ("unet", 5000)):
        parser.add_argument(f"--{stage}-steps", type=float, default=steps)
        parser.add_argument(f"--{stage}-minutes", type=float, default=float("inf"), help="if that is sooner")
    for model, batch, rate in (("vae", 8, 2e-3), ("unet", 32, 1e-3)):
        parser.add_argument(f"--{model}-batch", type=int, default=batch)
        parser.add_argument(f"--{model}-rate", type=float, default=rate, help="learning rate")
    args = parser.parse_args()
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
