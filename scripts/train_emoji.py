"""Trains the embedded model: drawings -> VAE -> latents -> text encoder -> UNet -> a diffusers folder.

    npm pack @lobehub/fluent-emoji-3d
    python scripts/train_emoji.py prepare --package lobehub-fluent-emoji-3d-*.tgz
    python scripts/train_emoji.py all --out my-model

`prepare` makes drawings.npz, which is all that the rest needs. `vae`, `decoder`, `latents`, `text`, `unet`, `export`
and `curves` are the stages of `all`. Everything lies in --work; a run that was killed goes on from its last checkpoint
when the same command is given again. `begin --model FOLDER` lets training go on from a finished model instead: `vae`,
`text` and `unet`, given after it, start with its weights.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import emoji_recipe as recipe
import jax
import jax.numpy as jnp
import numpy as np
import optax
import retrieval
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from optax.contrib import MuonDimensionNumbers

from sdjax import EMBEDDED_MODEL, StableDiffusionPipeline, sampling
from sdjax.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from sdjax.models.vae import DiagonalGaussian
from sdjax.runtime import parallel
from sdjax.text.tokenizer import CLIPTokenizer
from sdjax.training import checkpoint, losses
from sdjax.training.captions import captions, own_color
from sdjax.training.curves import draw_curves
from sdjax.training.drawings import PALETTE, Drawings, color_shares, palette
from sdjax.training.loop import Budget, fit
from sdjax.training.names import read_names
from sdjax.training.prepare import prepare
from sdjax.training.scenes import GROUNDS, Scenes, one_round, random_pictures
from sdjax.training.sketch import Sketch, with_reading_error
from sdjax.training.step import LossAndMetrics, Params, TrainState, train_step
from sdjax.training.vocabulary import train_tokenizer

NAMES = Path(__file__).with_name("emoji_names.txt")
ENCODER, DECODER = ["encoder", "quant_conv"], ["decoder", "post_quant_conv"]
TEXT, UNET = ["text_encoder", "sketch"], ["unet"]
BATCH = 64  # pictures that are encoded at once


def stage_prepare(args: argparse.Namespace) -> None:
    """The raw package -> drawings.npz"""
    drawings = prepare(args.package, read_names(NAMES), recipe.SOURCE_SIZE, flags=recipe.FLAGS)
    args.work.mkdir(parents=True, exist_ok=True)
    drawings.save(args.work / "drawings.npz")
    print(f"{len(drawings.names)} drawings, {(args.work / 'drawings.npz').stat().st_size / 1e6:.1f} MB")


def begin(args: argparse.Namespace) -> None:
    """A finished model of this recipe -> tokenizer, vae.npz, text.npz and begun.npz, from which training goes on"""
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype="float32")
    pipe.tokenizer.save_pretrained(args.work / "tokenizer")
    model = initialised(partial(untrained, args))
    model.text_encoder, model.unet = pipe.text_encoder, pipe.unet
    stages = ("vae", pipe.vae, None, adam), ("text", model, TEXT, muon), ("begun", model, UNET, muon)
    for name, whole, parts, optimizer in stages:
        state = TrainState.create(nnx.split(whole, has(parts), ...)[1], optimizer(1.0))
        checkpoint.save(args.work / f"{name}.npz", {"state": state, "seconds": jnp.zeros(())})


def adam(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.99, weight_decay=1e-2))


def muon(learning_rate: float) -> optax.GradientTransformation:
    """Muon for the matrices of a text encoder's layers, Adam at a tenth of the rate for all else.

    What is to be remembered of rare words is learned in fewer steps so (arXiv:2509.26030).
    """

    def numbers(path: tuple, leaf: Array) -> MuonDimensionNumbers | None:
        is_matrix = leaf.ndim == 2 and "['layers']" in jax.tree_util.keystr(path)
        return MuonDimensionNumbers(0, 1) if is_matrix else None

    by_kind = optax.contrib.muon(
        learning_rate,
        adam_learning_rate=learning_rate / 10,
        adam_b2=0.99,
        muon_weight_dimension_numbers=partial(jax.tree.map_with_path, numbers),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), by_kind)


def new_vae(dtype: str) -> AutoencoderKL:
    return AutoencoderKL.from_config(recipe.VAE, dtype=dtype)


def vae_loss(graphdef: nnx.GraphDef, batch: int, params: Params, data: dict[str, Any], key: Array) -> LossAndMetrics:
    """Reconstruction and KL of a random batch of drawings over random backgrounds."""
    draw, color, placement, noise = jax.random.split(key, 4)
    rgba = data["rgba"][jax.random.randint(draw, (batch,), 0, len(data["rgba"]))]
    colors = data["palette"][jax.random.randint(color, (batch,), 0, len(PALETTE))]
    x = random_pictures(placement, rgba, rgba[: int(batch * recipe.PAIRS)], colors, recipe.SIZE)
    x = jax.lax.with_sharding_constraint(x, split_over_devices())
    vae = nnx.merge(graphdef, params, data["frozen"])
    q = vae.encode(x)
    posterior = DiagonalGaussian(q.mean.astype(jnp.float32), q.logvar.astype(jnp.float32))
    y = vae.decode(posterior.sample(noise)).astype(jnp.float32)
    loss = losses.reconstruction_loss(y, x) + recipe.KL_WEIGHT * losses.kl_divergence(posterior)
    return loss, {"psnr": losses.psnr(y, x), "latent_std": posterior.mean.std()}


def fit_vae(args: argparse.Namespace, stage: str, vae: AutoencoderKL, parts: list[str], budget: Budget) -> None:
    """Trains these parts of an autoencoder on drawings.npz: <stage>.npz"""
    drawings = Drawings.load(args.work / "drawings.npz")
    graphdef, params, frozen = replicated(vae, parts)
    data = {"rgba": jnp.asarray(drawings.rgba), "palette": jnp.asarray(palette()), "frozen": frozen}
    opt = adam(args.vae_rate)
    fit(
        train_step(partial(vae_loss, graphdef, args.vae_batch), opt),
        initial_state(params, opt),
        data,
        jax.random.key(1),
        budget=budget,
        warmup=100,
        path=args.work / f"{stage}.npz",
    )


def train_vae(args: argparse.Namespace) -> None:
    """drawings.npz -> vae.npz"""
    budget = Budget(args.vae_steps, args.vae_minutes)
    fit_vae(args, "vae", initialised(partial(new_vae, args.dtype)), ENCODER + DECODER, budget)


def train_decoder(args: argparse.Namespace) -> None:
    """Trains the decoder on: the latents, and so the UNet, stay as they are. vae.npz -> decoder.npz"""
    fit_vae(args, "decoder", trained_vae(args), DECODER, Budget(args.decoder_steps, args.decoder_minutes))


def trained_vae(args: argparse.Namespace, decoder: bool = False) -> AutoencoderKL:
    """The autoencoder with its averaged weights; decoder: with those of decoder.npz, if there is one."""
    vae = trained(nnx.eval_shape(partial(new_vae, args.dtype)), args.work / "vae.npz")
    path = args.work / "decoder.npz"
    return trained(vae, path, DECODER) if decoder and path.exists() else vae


def tokenizer(args: argparse.Namespace) -> CLIPTokenizer:
    """Learned from all the captions that there are, once."""
    path = args.work / "tokenizer"
    if not path.exists():
        names = Drawings.load(args.work / "drawings.npz").names
        texts = (text for name in names for color in GROUNDS for text in captions(name, color))
        train_tokenizer(texts, recipe.VOCABULARY, recipe.TEXT["max_position_embeddings"]).save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def make_latents(args: argparse.Namespace) -> None:
    """The averaged encoder's latents, with captions, in rounds: latents/<number>.npz"""
    drawings, tokens = Drawings.load(args.work / "drawings.npz"), tokenizer(args)
    own_colors = [own_color(name, color_shares(rgba)) for name, rgba in zip(drawings.names, drawings.rgba, strict=True)]
    graphdef, params, _ = replicated(trained_vae(args))
    pictures = jax.jit(partial(random_pictures, size=recipe.SIZE))

    @jax.jit
    def encode(params: Params, x: Array) -> Array:
        return nnx.merge(graphdef, params).encode(x).mode().astype(jnp.float16)

    def encoded(key: Array, shown: Scenes, chance: float) -> np.ndarray:
        rgba, beside = drawings.rgba[shown.drawings], drawings.rgba[shown.beside]
        x = parallel.pad(np.asarray(pictures(key, rgba, beside, shown.colors(), chance=chance)), BATCH)
        return np.asarray(encode(params, parallel.split(x, parallel.data_mesh())))[: len(rgba)]

    for number in range(recipe.ROUNDS):
        path = args.work / "latents" / f"{number:02}.npz"
        if not path.exists():
            latents, upright, texts = [], [], []
            for i, shown in enumerate(one_round(drawings.names, number, BATCH, int(BATCH * recipe.PAIRS))):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), number), i)
                latents.append(encoded(key, shown, chance=1.0))
                upright.append(encoded(key, shown, chance=0.0))
                texts += shown.captions(drawings.names, own_colors)
            ids = tokens(np.ravel(texts).tolist()).reshape(*np.shape(texts), -1)
            pool = Latents(np.concatenate(latents), np.concatenate(upright), ids)
            checkpoint.save(path, pool._asdict())
            print(path, flush=True)


class Latents(NamedTuple):
    """P pictures: latents float16 [P h w C] and the token ids of their captions [P forms L].

    upright: the latents when every drawing has the mean placement, [P h w C].
    """

    latents: np.ndarray
    upright: np.ndarray
    input_ids: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Latents":
        files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
        return cls(*(np.concatenate([file[f"['{name}']"] for file in files]) for name in cls._fields))

    def scaling_factor(self) -> float:
        """What makes their standard deviation 1."""
        return float(1 / self.latents.std(dtype=np.float64))


class TextToLatents(nnx.Module):
    """The text encoder and the UNet, trained as one, and what teaches the first before there is the second."""

    def __init__(self, vocab_size: int, dtype: str):
        special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
        text = {**recipe.TEXT, "vocab_size": vocab_size, **special}
        self.text_encoder = CLIPTextModel.from_config(text, dtype=dtype)
        self.unet = UNet2DConditionModel.from_config(recipe.UNET, dtype=dtype)
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        self.sketch = Sketch(recipe.TEXT["hidden_size"], size, channels, recipe.SQUARES)


def latents_and_captions(args: argparse.Namespace) -> dict[str, Array]:
    """What `random_examples` draws from."""
    pool = Latents.load(args.work / "latents")
    empty = tokenizer(args)("")[0]
    return jax.tree.map(jnp.asarray, {**pool._asdict(), "scaling_factor": pool.scaling_factor(), "empty": empty})


def random_examples(key: Array, batch: int, data: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Latents, as placed and upright [B h w C], scaled to a standard deviation of 1, and a caption of each [B L]."""
    draw, form = jax.random.split(key)
    P, F, _ = data["input_ids"].shape
    p, f = (jax.random.randint(key, (batch,), 0, high) for key, high in ((draw, P), (form, F)))
    placed, upright = (data[name][p].astype(jnp.float32) * data["scaling_factor"] for name in ("latents", "upright"))
    return placed, upright, data["input_ids"][p, f]


def text_loss(graphdef: nnx.GraphDef, batch: int, params: Params, data: dict[str, Any], key: Array) -> LossAndMetrics:
    """The error of the text encoder's sketch of a random batch of drawings, which it has only captions of."""
    _, upright, ids = jax.lax.with_sharding_constraint(random_examples(key, batch, data), split_over_devices())
    model = nnx.merge(graphdef, params, data["frozen"])
    return model.sketch.error(model.text_encoder(ids), upright).mean(), {}


def unet_loss(graphdef: nnx.GraphDef, batch: int, params: Params, data: dict[str, Array], key: Array) -> LossAndMetrics:
    """The error in the velocity of a random batch of latents, at times spread evenly.

    Added are the error of the text encoder's sketch, which so goes on learning by the short way too, and that of the
    UNet in reading it.
    """
    examples, drop, time, noise = jax.random.split(key, 4)
    x0, upright, ids = random_examples(examples, batch, data)
    ids = losses.drop_captions(drop, ids, data["empty"], recipe.CAPTION_DROPOUT)
    alphas_cumprod = jnp.asarray(sampling.from_config(recipe.SCHEDULER).schedule.alpha_bar, jnp.float32)
    u = (jnp.arange(batch) + jax.random.uniform(time, (batch,))) / batch
    t = jnp.int32(len(alphas_cumprod) * u).clip(max=len(alphas_cumprod) - 1)
    x, v = losses.add_noise(x0, jax.random.normal(noise, x0.shape), alphas_cumprod[t])
    upright, x, v, t, ids = jax.lax.with_sharding_constraint((upright, x, v, t, ids), split_over_devices())
    model = nnx.merge(graphdef, params)
    hidden_states = model.text_encoder(ids)
    prediction, reading = with_reading_error(model.unet, recipe.SQUARES, x, t, hidden_states)
    denoising = losses.denoising_loss(prediction.astype(jnp.float32), v)
    asked = (ids != data["empty"]).any(axis=-1)
    sketch = jnp.mean(asked * model.sketch.error(hidden_states, upright))
    metrics = {"denoising": denoising, "sketch": sketch, "reading": reading}
    return denoising + sketch + recipe.READING_WEIGHT * reading, metrics


def train_text(args: argparse.Namespace) -> None:
    """latents -> text.npz"""
    graphdef, params, frozen = replicated(initialised(partial(untrained, args)), TEXT)
    opt = muon(args.text_rate)
    fit(
        train_step(partial(text_loss, graphdef, args.text_batch), opt),
        initial_state(params, opt),
        {**latents_and_captions(args), "frozen": frozen},
        jax.random.key(4),
        budget=Budget(args.text_steps, args.text_minutes),
        warmup=100,
        path=args.work / "text.npz",
    )


def train_unet(args: argparse.Namespace) -> None:
    """latents, text.npz -> unet.npz, which has the text encoder too"""
    model, begun = trained(initialised(partial(untrained, args)), args.work / "text.npz", TEXT), args.work / "begun.npz"
    graphdef, params, _ = replicated(trained(model, begun, UNET) if begun.exists() else model)
    opt, data = muon(args.unet_rate), latents_and_captions(args)
    fit(
        train_step(partial(unet_loss, graphdef, args.unet_batch), opt),
        initial_state(params, opt),
        data,
        jax.random.key(3),
        budget=Budget(args.unet_steps, args.unet_minutes),
        warmup=200,
        path=args.work / "unet.npz",
        measure=measure_retrieval(args, float(data["scaling_factor"])),
        measure_steps=args.measure_steps,
    )


def measure_retrieval(args: argparse.Namespace, scaling_factor: float) -> Callable[[TrainState], dict[str, float]]:
    """Draws 64 names with the averaged weights, each on a colour of its own, and says how many are recognised."""
    drawings = Drawings.load(args.work / "drawings.npz")
    asked, gallery = retrieval.asked_for(drawings.names, 64), retrieval.Gallery(drawings)
    pipe = pipeline(args, scaling_factor)

    def measure(state: TrainState) -> dict[str, float]:
        for name in ("text_encoder", "unet"):
            nnx.update(getattr(pipe, name), jax.tree.map(jnp.copy, state.ema[name]))  # the step reuses its own memory
        pictures = retrieval.draw(pipe, asked.prompts, steps=12, guidance=3.0)
        return gallery.scores(pictures, asked)

    return measure


def pipeline(args: argparse.Namespace, scaling_factor: float) -> StableDiffusionPipeline:
    """The trained autoencoder with an untrained text encoder and UNet."""
    tokens, vae = tokenizer(args), trained_vae(args, decoder=True)
    vae.config = dataclasses.replace(vae.config, scaling_factor=scaling_factor)
    model = nnx.eval_shape(partial(untrained, args))
    return StableDiffusionPipeline(model.text_encoder, model.unet, vae, tokens, recipe.SCHEDULER)


def export(args: argparse.Namespace) -> None:
    """The averaged weights as a diffusers folder in float16."""
    pipe = pipeline(args, Latents.load(args.work / "latents").scaling_factor())
    model = trained(nnx.eval_shape(partial(untrained, args)), args.work / "unet.npz")
    pipe.text_encoder, pipe.unet, pipe.vae = half(model.text_encoder), half(model.unet), half(pipe.vae)
    pipe.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.1f} MB of weights")


def curves(args: argparse.Namespace) -> None:
    """The logs of all stages as one picture: curves.png"""
    draw_curves(sorted(args.work.glob("*.csv")), args.work / "curves.png")


def untrained(args: argparse.Namespace) -> TextToLatents:
    """The text encoder and the UNet, for the vocabulary that there is."""
    return TextToLatents(len(tokenizer(args).vocab), args.dtype)


def half(model: nnx.Module) -> nnx.Module:
    """The model with float16 parameters."""
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params))


def initialised(make: Callable[[], nnx.Module]) -> nnx.Module:
    """A new model, its random values made in one program."""
    return nnx.jit(make)()


initial_state = jax.jit(TrainState.create, static_argnums=1)


def trained(model: nnx.Module, path: Path, parts: list[str] | None = None) -> nnx.Module:
    """The model with the averaged weights of a checkpoint, which has these parts of it (None: all)."""
    graphdef, params, rest = nnx.split(model, has(parts), ...)
    return nnx.merge(graphdef, checkpoint.restore(path, params, "['state'].ema"), rest)


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


ALL = {
    "vae": train_vae,
    "decoder": train_decoder,
    "latents": make_latents,
    "text": train_text,
    "unet": train_unet,
    "export": export,
    "curves": curves,
}
STAGES = {"prepare": stage_prepare, "begin": begin, **ALL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("train_emoji"), help="folder of everything intermediate")
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL, help="folder of the finished model")
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="folder of a finished model, for `begin`")
    parser.add_argument("--package", type=Path, help="tarball of @lobehub/fluent-emoji-3d, for `prepare`")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the computation")
    for stage, steps in (("vae", 20000), ("decoder", 5000), ("text", 20000), ("unet", 20000)):
        parser.add_argument(f"--{stage}-steps", type=float, default=steps)
        parser.add_argument(f"--{stage}-minutes", type=float, default=float("inf"), help="if that is sooner")
    for model, batch, rate in (("vae", 32, 2e-3), ("text", 256, 1e-2), ("unet", 256, 1e-2)):
        parser.add_argument(f"--{model}-batch", type=int, default=batch)
        parser.add_argument(f"--{model}-rate", type=float, default=rate, help="learning rate")
    parser.add_argument("--measure-steps", type=int, default=1000, help="between two looks at how many are recognised")
    args = parser.parse_args()
    for stage in ALL if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
