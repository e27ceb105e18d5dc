"""The compiled programs of a pipeline: encode text and pictures, noise, start, denoise, decode, check.

Each is mapped over the `data` axis of a mesh and keyed by the networks, the batch, the size and the dtype alone:
prompts, seeds, samplers, step counts and guidance are data. Weights are arguments; networks are given as their `Graph`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from sdjax.models.attention import Pictures
from sdjax.models.ip_adapter import pictures_of, seen_by
from sdjax.models.layers import timestep_embedding
from sdjax.models.unet import DeepFeatures
from sdjax.runtime import tiling
from sdjax.runtime.ahead import Program
from sdjax.runtime.denoiser import Control, Denoiser
from sdjax.runtime.network import Graph, Params
from sdjax.runtime.parallel import DATA, REPLICATED, ROWS, shard_map
from sdjax.sampling import loop
from sdjax.sampling.guidance import branched, over, unguided, weighted
from sdjax.sampling.noise import numbered_noise, row_noise
from sdjax.text import conditioning
from sdjax.text.conditioning import OF_TEXT, Condition, Reading
from sdjax.text.encoding import Text

SEGMENT_ROWS = 8
DECODED_PIXELS = 2**20  # at a time on a device: the autoencoder's activations are large
UPSCALED_TILE = 256  # pixels of a side: an ESRGAN holds hundreds of channels of it, then 64 of one four times as large


@partial(Program, static=(0, 1, 3, 6))
def encode(
    mesh: Mesh,
    text_encoders: tuple[Graph, ...],
    params: list[Params],
    reading: Reading,
    texts: list[Text],
    added_embeddings: list[Array | None],
    vocab_sizes: tuple[int, ...],
) -> Condition:
    """A text [B C L] for each text encoder -> what the UNet is conditioned on: `conditioning.encode`"""

    def run(params: list[Params], added_embeddings: list[Array | None], texts: list[Text]) -> Condition:
        encoders = [graph.merge(own) for graph, own in zip(text_encoders, params, strict=True)]
        return conditioning.encode(encoders, reading, texts, added_embeddings, vocab_sizes)

    return shard_map(run, mesh, (REPLICATED, REPLICATED, DATA), DATA)(params, added_embeddings, texts)


@partial(Program, static=(0, 3))
def noise(mesh: Mesh, keys: Array, number: np.uint32, shape: tuple[int, ...]) -> Array:
    """The noise of seeds [B 2] that has this number -> [B *shape]: `sampling.noise.numbered_noise`"""
    run = partial(numbered_noise, shape=shape)
    return shard_map(run, mesh, (DATA, REPLICATED), DATA)(keys, number)


@partial(Program, static=(0, 1))
def encode_pictures(mesh: Mesh, vae: Graph, params: Params, pictures: Array, noise: Array | None) -> Array:
    """Pictures [B H W 3] in -1..1 -> latents [B h w C] as the UNet sees them, float32

    noise: standard normal [B h w C], of a sample of the posterior; None: its mode. As many pictures at a time as
    `decode` takes.
    """

    def run(params: Params, pictures: Array, noise: Array | None) -> Array:
        model = vae.merge(params)
        B, H, W, _ = pictures.shape
        chunk = decoded_at_once(B, H * W)
        chunks = jax.tree.map(lambda x: x.reshape(B // chunk, chunk, *x.shape[1:]), (pictures, noise))

        def encoded(parts: tuple[Array, Array | None]) -> Array:
            posterior = model.encode(parts[0])
            latents = posterior.mode() if parts[1] is None else posterior.sample(parts[1])
            return model.config.scaled(latents.astype(jnp.float32))

        latents = jax.lax.map(encoded, chunks)
        return latents.reshape(B, *latents.shape[2:])

    return shard_map(run, mesh, (REPLICATED, DATA, DATA), DATA)(params, pictures, noise)


@partial(Program, static=(0,))
def start(mesh: Mesh, parts: tuple[Array, ...], scales: Array) -> loop.State:
    """P parts [B h w C] and how many times each [B P] -> the state before the first row: of their sum"""

    def run(parts: tuple[Array, ...], scales: Array) -> loop.State:
        return loop.start(sum(loop.scaled(part, scales[:, i]) for i, part in enumerate(parts)))

    return shard_map(run, mesh, (DATA, DATA), DATA)(parts, scales)


@partial(Program, static=(0, 1))
def embed_control(mesh: Mesh, network: Graph, params: Params, pictures: Array) -> Array | list[Array]:
    """Pictures [B H W 3] in 0..1 -> what `embed_picture` of a ControlNet or a T2I-Adapter makes of them, [B h w C]"""

    def run(params: Params, pictures: Array) -> Array | list[Array]:
        return network.merge(params).embed_picture(pictures)

    return shard_map(run, mesh, (REPLICATED, DATA), DATA)(params, pictures)


@partial(Program, static=(0, 1), static_names=("takes_states", "is_negative"))
def see_pictures(
    mesh: Mesh, encoder: Graph, params: Params, pictures: Array, *, takes_states: bool, is_negative: bool
) -> Array:
    """What an image encoder makes of pictures [B n S S 3]: `models.ip_adapter.seen_by`"""

    def run(params: Params, pictures: Array) -> Array:
        return seen_by(encoder.merge(params), pictures, takes_states=takes_states, is_negative=is_negative)

    return shard_map(run, mesh, (REPLICATED, DATA), DATA)(params, pictures)


@partial(Program, static=(0, 1))
def prompt_pictures(
    mesh: Mesh,
    adapters: tuple[Graph, ...],
    params: list[Params],
    seen: tuple[Array, ...],
    scales: Array,
    masks: tuple[Mapping[str, Array], ...] | None,
) -> Pictures:
    """What IP-Adapters make of what is seen of pictures: `models.ip_adapter.pictures_of`"""

    def run(params: list[Params], *shown: Any) -> Pictures:
        return pictures_of([graph.merge(own) for graph, own in zip(adapters, params, strict=True)], *shown)

    return shard_map(run, mesh, (REPLICATED, DATA, DATA, DATA), DATA)(params, seen, scales, masks)


@partial(Program, static=(0, 1))
def embed_pictures(
    mesh: Mesh,
    graphs: tuple[Graph, ...],
    params: list[Params],
    pictures: Array,
    noise: Array,
    amounts: tuple[Array, Array, Array],
) -> Array:
    """Pictures [B S S 3] as CLIP sees them -> [B 2D], their noised embeddings and the waves of the noise levels

    graphs: of the image encoder and of the normalizer. noise [B D]: standard normal. amounts: alpha, sigma and the
    noise levels, [B], see `StableUnCLIPImageNormalizer`.
    """

    def run(params: list[Params], pictures: Array, noise: Array, amounts: tuple[Array, Array, Array]) -> Array:
        encoder, normalizer = (graph.merge(own) for graph, own in zip(graphs, params, strict=True))
        *amounts, levels = amounts
        embeddings = normalizer(encoder(pictures), noise, *amounts)
        waves = timestep_embedding(levels, embeddings.shape[-1], flip_sin_to_cos=True, freq_shift=0)
        return jnp.concatenate([embeddings, waves], axis=-1)

    return shard_map(run, mesh, (REPLICATED, DATA, DATA, DATA), DATA)(params, pictures, noise, amounts)


@partial(Program, static=(0, 1), donated=(3,))
def denoise_segment(
    mesh: Mesh,
    denoiser: Denoiser,
    params: Sequence[Params],
    state: loop.State,
    denoised: Array,
    segment: tuple[Array, loop.Rows],
    keys: Array,
    conditions: tuple[Condition, ...],
    guidance: tuple[Array, ...],
    known: loop.Known | None = None,
    channels: Array | None = None,
    control: Control | None = None,
) -> tuple[loop.State, Array]:
    """`loop.denoise_segment` with the seeds' noise. The state is donated.

    guidance: what `guidance.weighted` takes, (weights, rescale, perpendicular, mimic); (): none, for one condition.
    channels [B h w D]: what the UNet takes beside x in all branches.
    """

    def run(
        params: Sequence[Params],
        state: Any,
        denoised: Array,
        segment: Any,
        keys: Array,
        conditions: Any,
        guidance: Any,
        known: Any,
        channels: Any,
        control: Any,
    ) -> Any:
        model = denoiser.merge(params, control, channels)

        def f(row: loop.Rows) -> Any:
            return branched(partial(model.predict, row.get("control")), _of_row(conditions, row))

        guide = weighted(*guidance) if guidance else unguided
        noise = partial(row_noise, keys, shape=state.x.shape[1:])
        return loop.denoise_segment(f, state, denoised, segment, noise, guide, known)

    in_specs = (REPLICATED, DATA, DATA, (REPLICATED, ROWS), *[DATA] * 6)
    arguments = (params, state, denoised, segment, keys, conditions, guidance, known, channels, control)
    return shard_map(run, mesh, in_specs, DATA)(*arguments)


@partial(Program, static=(0, 1))
def deep_features(
    mesh: Mesh,
    denoiser: Denoiser,
    params: Sequence[Params],
    x: Array,
    row: loop.Rows,
    conditions: tuple[Condition, ...],
    channels: Array | None = None,
    control: Control | None = None,
) -> tuple[DeepFeatures, ...]:
    """What `UNet2DConditionModel.deep_features` gives for samples x [B h w C] in a row, with each of the conditions."""

    def run(
        params: Sequence[Params],
        x: Array,
        row: loop.Rows,
        conditions: tuple[Condition, ...],
        channels: Array | None,
        control: Control | None,
    ) -> tuple[DeepFeatures, ...]:
        model = denoiser.merge(params, control, channels)
        f = branched(partial(model.deep_features, row.get("control")), _of_row(conditions, row))
        features, n = f(over(row["cin"], x) * x, row["t"]), len(conditions)
        leaves, treedef = jax.tree.flatten(features)
        return tuple(map(treedef.unflatten, zip(*(jnp.split(leaf, n) for leaf in leaves), strict=True)))

    in_specs = (REPLICATED, *[DATA] * 5)
    return shard_map(run, mesh, in_specs, DATA)(params, x, row, conditions, channels, control)


@partial(Program, static=(0, 2))
def larger_latents(mesh: Mesh, latents: Array, size: tuple[int, int]) -> Array:
    """Latents [B h w C] at this size, interpolated linearly: [B h' w' C]"""

    def run(latents: Array) -> Array:
        shape = (latents.shape[0], *size, latents.shape[-1])
        return jax.image.resize(latents, shape, "linear", antialias=False)

    return shard_map(run, mesh, (DATA,), DATA)(latents)


@partial(Program, static=(0, 1, 4))
def larger_pictures(
    mesh: Mesh, upscaler: Graph | None, params: Params | None, pictures: Array, size: tuple[int, int]
) -> Array:
    """Pictures [B H W 3] in -1..1 at this size: by the upscaler, in tiles of UPSCALED_TILE pixels, then by Lanczos's
    kernel. [B H' W' 3] in -1..1"""

    def run(params: Params | None, pictures: Array) -> Array:
        def upscaled(x: Array) -> Array:
            return upscaler.merge(params)(x / 2 + 0.5).astype(jnp.float32) * 2 - 1

        def one(picture: Array) -> Array:
            x = jnp.clip(picture, -1, 1)
            if upscaler is not None:
                x = tiling.decode_tiled(upscaled, x[None], tile=UPSCALED_TILE)[0]
            return jnp.clip(jax.image.resize(x, (*size, 3), "lanczos3"), -1, 1)

        return jax.lax.map(one, pictures)

    return shard_map(run, mesh, (REPLICATED, DATA), DATA)(params, pictures)


def _of_row(conditions: Sequence[Condition], row: loop.Rows) -> list[Condition]:
    """The conditions of a row: where prompts change, [B V ...] -> [B ...], the texts at `variant` [B]."""
    if "variant" not in row:
        return list(conditions)
    place = row["variant"].astype(jnp.int32)

    def chosen(states: Array) -> Array:
        return jax.vmap(lambda own, i: own[i])(states, place)

    return [own | {name: chosen(own[name]) for name in OF_TEXT if name in own} for own in conditions]


def decoded_at_once(pictures: int, pixels: int) -> int:
    """How many pictures of so many pixels, of those on a device, it decodes at a time: a power of two, a divisor."""
    most = max(1, DECODED_PIXELS // pixels)
    return math.gcd(pictures, 1 << most.bit_length() - 1)


class Decoded(NamedTuple):
    """What `decode` gives."""

    pictures: Array
    """[B H W 3], float32 in -1..1 or a little outside"""
    not_finite: Array
    """[B] whether the picture or its latents have a value that is not finite"""
    lost: Array
    """[B] whether the latents are finite and the picture is not"""


class Original(NamedTuple):
    """What pictures are pasted into."""

    pictures: Array
    """[B H W 3] in -1..1"""
    mask: Array
    """[B H W 1] how much of the picture is the new one; the rest is the original"""
    boxes: Array | None = None
    """[B 4] left, top, right, bottom: the part of the original that is the new picture; None: all of it"""


@partial(Program, static=(0, 1), static_names=("tiled",))
def decode(
    mesh: Mesh, vae: Graph, params: Params, latents: Array, original: Original | None = None, *, tiled: bool = False
) -> Decoded:
    """latents [B h w C], as the UNet sees them -> pictures, put into the originals if there are any

    As many pictures at a time as have DECODED_PIXELS together, one at least. tiled: see `tiling.decode_tiled`.
    """

    def run(params: Params, latents: Array, original: Original | None) -> Decoded:
        model = vae.merge(params)
        B, h, w, C = latents.shape
        side = tiling.tile_side(model.config) if tiled else max(h, w)
        chunk = decoded_at_once(B, min(h, side) * min(w, side) * model.config.factor**2)
        chunks = model.config.unscaled(latents).reshape(B // chunk, chunk, h, w, C)

        def decoded(z: Array) -> tuple[Array, Array]:
            pictures = tiling.decode_tiled(lambda z: model.decode(z).astype(jnp.float32), z, tile=side)
            return pictures, _not_finite(pictures)

        pictures, not_finite = (x.reshape(B, *x.shape[2:]) for x in jax.lax.map(decoded, chunks))
        if original is not None:
            pictures, mask = _placed(pictures, original)
            blended = mask * pictures + (1 - mask) * original.pictures
            pictures = jnp.where(mask > 0, blended, original.pictures)
        unknown = _not_finite(latents)
        return Decoded(pictures, not_finite | unknown, not_finite & ~unknown)

    return shard_map(run, mesh, (REPLICATED, DATA, DATA), DATA)(params, latents, original)


def _placed(pictures: Array, original: Original) -> tuple[Array, Array]:
    """The pictures, cut to -1..1, each resized (Lanczos) to its box of the original; and the mask, 0 outside."""
    if original.boxes is None:
        return pictures, original.mask

    def place(picture: Array, box: Array) -> Array:
        left, top, right, bottom = box.astype(jnp.float32)
        scale = jnp.stack([bottom - top, right - left]) / np.float32(picture.shape[:2])
        offset = jnp.stack([top, left])
        shape = (*original.pictures.shape[1:3], picture.shape[-1])
        return jax.image.scale_and_translate(jnp.clip(picture, -1, 1), shape, (0, 1), scale, offset, "lanczos3")

    left, top, right, bottom = (side[:, None] for side in original.boxes.T)
    y, x = (jnp.arange(n) for n in original.pictures.shape[1:3])
    inside = ((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None]
    return jax.vmap(place)(pictures, original.boxes), original.mask * inside[..., None]


def _not_finite(x: Array) -> Array:
    """[B ...] -> [B] whether any value is NaN or infinite"""
    return ~jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


@partial(Program, static=(0, 1))
def check(mesh: Mesh, safety_checker: Graph, params: Params, pictures: Array, not_finite: Array) -> tuple[Array, Array]:
    """Pictures [B H W 3] in -1..1 -> the same, black where they are flagged, and the flags [B]

    What is not finite [B] is not flagged: there is nothing to see in it.
    """

    def run(params: Params, pictures: Array, not_finite: Array) -> tuple[Array, Array]:
        flagged = safety_checker.merge(params)(jnp.clip(pictures / 2 + 0.5, 0, 1)) & ~not_finite
        return jnp.where(flagged[:, None, None, None], -1, pictures), flagged

    return shard_map(run, mesh, (REPLICATED, DATA, DATA), DATA)(params, pictures, not_finite)
