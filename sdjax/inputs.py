"""From requests to the arrays that the compiled programs take, all of it checked before the first text is encoded."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.kinds import MAX_SIDE
from sdjax.models.unet import at
from sdjax.pictures import pixels
from sdjax.request import Request, TableKey
from sdjax.runtime import bounds, jax_settings, parallel, programs
from sdjax.runtime.bounds import Load
from sdjax.runtime.lowering import LoweredProgram
from sdjax.runtime.programs import Original
from sdjax.sampling import Scheduler, Table, from_config, torch_generators
from sdjax.sampling.guidance import over
from sdjax.sampling.loop import Known
from sdjax.sampling.noise import INITIAL, MASKED, POSTERIOR, seed_keys
from sdjax.text import conditioning, encoding
from sdjax.text.conditioning import PREFIXES, Condition, Reading
from sdjax.text.encoding import Embeddings, Text

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

DEFAULT_SIZE = 64  # of the latents, for a UNet that does not say
SECOND = ("prompt_2", "negative_prompt_2")
DISTILLED_SCALE = 8.5  # of a UNet that is conditioned on the guidance scale: Luo et al. 2023


class Given(NamedTuple):
    """Arrays in place of what requests say, and the part of the noise that is removed."""

    latents: Any = None
    """[B h w C] the initial standard normal noise"""
    image: Any = None
    """[B h w C] the latents of the pictures to start from, in place of the requests'"""
    denoising_start: float = 0.0
    denoising_end: float = 1.0
    embeddings: Mapping[str, Embeddings] = {}
    """by the prefix of their branch"""


NOTHING = Given()


class Inputs(NamedTuple):
    """What the denoising program takes, images first, padded to whole batches on every device."""

    table: Table
    """a stack, one table for each image"""
    keys: Array
    """[B 2] of the seeds"""
    parts: tuple[Array, ...]
    """each [B h w C]: what x before the first row is the sum of: noise, a picture's latents and noise, or latents"""
    scales: Array
    """[B P] how many times each of the parts: noise the tables' `init_noise_sigma` times, a picture's latents and noise
    by their `marginals`, latents to go on from once"""
    beside: dict[str, np.ndarray]
    """columns beside those of the table, on the host, see `loop.Rows`"""
    branches: tuple[Condition, ...]
    """what the UNet is conditioned on, once for each prediction that guidance combines; the prompt's is the last"""
    weights: Array
    """[B N] the guided prediction is sum_n weights[n] * prediction[n]"""
    rescale: Array
    """[B] how much of the contrast that guidance adds is taken back"""
    known: Known | None = None
    """what is put back after each row"""
    channels: Array | None = None
    """[B h w D] what the UNet takes beside x: with 9 channels, the mask and the latents of what it leaves"""
    original: Original | None = None
    """what the pictures are pasted into"""

    def forms(self, described: Callable[[Any], Any] = lambda tree: tree) -> dict[str, Any]:
        """What `lowering.lower` takes beside branches and latents; described: of arrays, what stands for them."""
        own = {name: described(getattr(self, name)) for name in ("known", "channels", "original")}
        return own | {"beside": {name: column.shape[2:] for name, column in self.beside.items()}}

    def guidance(self, branches: int) -> tuple[Array, ...]:
        """What the denoising program takes for so many of the branches."""
        return (self.weights, self.rescale) if branches > 1 else ()


@jax_settings.fixed()
def prepare(pipe: "DiffusionPipeline", requests: Sequence[Request], given: Given = NOTHING) -> Inputs:
    """The inputs of a batch of requests, which share what selects its programs.

    Raises ValueError that names the field.
    """
    from_picture = _starts_from_pictures(requests, given)
    size = _size(pipe, requests, given)
    shape = latent_shape(pipe, *size)
    load = Load.of(pipe.mesh, len(requests), *size, tiled=shared(requests, "vae_tiling"))
    bounds.check(pipe.models, pipe.mesh, load)
    tables = _tables(pipe, requests, given)
    masks = _masks(pipe, requests, size)
    latents, clean = (
        None if value is None else encoding.array(name, value, (len(requests), *shape))
        for name, value in (("latents", given.latents), ("image", given.image))
    )
    pictures = _pictures(pipe, requests, size) if from_picture and clean is None else None
    if masks is not None and pictures is None:
        raise ValueError("mask_image: only with image, a picture, not latents")
    takes_mask = pipe.unet.config.in_channels != shape[-1]
    if takes_mask and masks is None:
        raise ValueError("this UNet is for inpainting: give image, and mask_image, white where it is made anew")
    guidance = np.maximum(column(requests, "guidance_scale", guidance_scale(pipe)), 1).astype(np.float32)
    guided = conditioning.is_guided(pipe.unet.config) and (guidance > 1).any()
    branches = _branches(pipe, requests, given, load, guidance, PREFIXES if guided else PREFIXES[1:])
    seeds = [request.seed for request in requests]
    keys, kind = pipe.padded(seed_keys(seeds)), shared(requests, "noise")
    padded = Table.stack(tables + tables[-1:] * (len(keys) - len(tables)))
    is_whole = np.array([masks is not None and strength_of(pipe, request.table_key) == 1 for request in requests])
    wanted = [POSTERIOR] * (pictures is not None and not (takes_mask and is_whole.all()))
    wanted += [INITIAL] * (latents is None and not given.denoising_start) + [MASKED] * (masks is not None)
    wanted = wanted if pipe.vae.config.is_variational else [number for number in wanted if number == INITIAL]
    first, beside = _noise(pipe, kind, seeds, keys, shape, wanted, padded)
    if latents is not None:
        first[INITIAL] = pipe.padded(latents)
    encode = partial(programs.encode_pictures, pipe.mesh, *pipe.network("vae"))
    clean = None if clean is None else pipe.padded(clean)
    if pictures is not None:
        clean = encode(pictures, first.get(POSTERIOR))
    parts, scales = _start(padded, clean, first.get(INITIAL), parallel.pad(is_whole, len(keys)))
    scales = parallel.split(scales.astype(np.float32), pipe.mesh)
    known = channels = original = None
    if masks is not None:
        kept = column(requests, "keep_unmasked", True)[:, None, None, None]
        original = Original(pictures, pipe.padded(np.where(kept, masks, 1).astype(np.float32)))
        small = pipe.padded(masks[:, :: pipe.vae.config.factor, :: pipe.vae.config.factor])
        if takes_mask:
            left = encode(jnp.where(pipe.padded(masks) > 0, 0, pictures), first.get(MASKED))
            channels = jnp.concatenate([small, left], axis=-1)
        else:
            known = Known(small, clean, first[INITIAL])
            beside |= {"after": _after(padded, tables, clean_end=given.denoising_end == 1)}
    rescale = column(requests, "guidance_rescale", 0.0).astype(np.float32)
    weights = np.stack([1 - guidance, guidance], axis=1) if guided else np.ones((len(guidance), 1), np.float32)
    guidance = pipe.padded(weights), pipe.padded(rescale)
    return Inputs(padded, keys, parts, scales, beside, branches, *guidance, known, channels, original)


def _starts_from_pictures(requests: Sequence[Request], given: Given) -> bool:
    """Whether the pictures of a batch start from pictures, or from their latents: all do, or none does."""
    found = {given.image is not None or request.image is not None for request in requests}
    if len(found) > 1:
        raise ValueError("image: the pictures of a batch all start from one, or none does")
    [is_given] = found
    if not is_given and given.denoising_start:
        raise ValueError("denoising_start: only with image, the latents to go on from")
    if given.denoising_start and given.latents is not None:
        raise ValueError("latents: not with denoising_start, which adds no noise")
    return is_given


def _size(pipe: "DiffusionPipeline", requests: Sequence[Request], given: Given) -> tuple[int, int]:
    """(height, width) of the pictures: what is given, else of what they start from, rounded down to fit the VAE."""
    own = picture_size(pipe, given.image)
    if given.image is not None:
        return shared(requests, "height") or own[0], shared(requests, "width") or own[1]
    sizes = list(dict.fromkeys(request_size(pipe, request) for request in requests))
    if len(sizes) > 1:
        (h, w), (other_h, other_w) = sizes[:2]
        raise ValueError(f"the pictures of a batch have one size, and these have {w}x{h} and {other_w}x{other_h}")
    return sizes[0]


def request_size(pipe: "DiffusionPipeline", request: Request) -> tuple[int, int]:
    """(height, width) of a request's picture. Raises ValueError for a mask that does not fit its image."""
    height, width = picture_size(pipe)
    if request.mask_image is not None and (request.image is None or request.image.size != request.mask_image.size):
        w, h = request.mask_image.size
        own = "none is given" if request.image is None else "it is of {}x{}".format(*request.image.size)
        raise ValueError(f"mask_image, of {w}x{h}: only with an image of this size, and {own}")
    if request.image is not None:
        width, height = (side // pipe.vae.config.factor * pipe.vae.config.factor for side in request.image.size)
    return request.height or height, request.width or width


def _pictures(pipe: "DiffusionPipeline", requests: Sequence[Request], size: tuple[int, int]) -> Array:
    """[B H W 3] in -1..1: what the requests start from, each picture read once."""
    if pipe.vae.encoder is None:
        raise ValueError("image: this VAE has no encoder")
    height, width = size
    read = cache(lambda picture: pixels.normalize(picture.rgb(), width, height))
    return pipe.padded(np.stack([read(request.image) for request in requests]))


def _masks(pipe: "DiffusionPipeline", requests: Sequence[Request], size: tuple[int, int]) -> np.ndarray | None:
    """[B H W 1] 1 where the pictures are made anew, else 0; None: there are no masks. Each is read once."""
    found = {request.mask_image is not None for request in requests}
    if len(found) > 1:
        raise ValueError("mask_image: the pictures of a batch all have one, or none does")
    if found == {False}:
        return None
    read = cache(lambda picture: pixels.mask(picture.rgb(), *size[::-1]))
    return np.stack([read(request.mask_image) for request in requests])


def _after(table: Table, tables: Sequence[Table], *, clean_end: bool) -> np.ndarray:
    """[R B 2] how much of the clean sample and of the noise x is made of after each row; after the last of all noise,
    the clean sample alone."""
    after = table.marginals[1:].astype(np.float32)
    for image in range(after.shape[1]):
        if clean_end:
            after[len(tables[min(image, len(tables) - 1)]) - 1 :, image] = 1, 0
    return after


def _noise(
    pipe: "DiffusionPipeline",
    kind: str,
    seeds: Sequence[int],
    keys: Array,
    shape: tuple[int, ...],
    wanted: Sequence[int],
    table: Table,
) -> tuple[dict[int, Array], dict[str, np.ndarray]]:
    """The noise of these numbers, each [B h w C], drawn in this order, then that of the table's rows: {"noise":
    [R B h w C]}, or {} where the keys give it, or there is none."""
    if kind == "jax":
        return {number: programs.noise(pipe.mesh, keys, np.uint32(number), shape) for number in wanted}, {}
    adds_noise = table.adds_noise.T[: len(seeds)]
    first, draws = torch_generators.latents(kind, seeds, shape, adds_noise, before=len(wanted))
    beside = {} if draws is None else {"noise": np.moveaxis(parallel.pad(draws, len(keys)), 0, 1)}
    return dict(zip(wanted, map(pipe.padded, first), strict=True)), beside


def _start(
    table: Table, clean: Array | None, noise: Array | None, is_whole: np.ndarray
) -> tuple[tuple[Array, ...], np.ndarray]:
    """What x before the first row is the sum of, and how many times each, [B P]; is_whole [B]: of noise alone."""
    sigma = table.init_noise_sigma[:, None]
    if clean is None:
        return (noise,), sigma
    if noise is None:
        return (clean,), np.ones((len(clean), 1))
    return (clean, noise), np.where(is_whole[:, None], np.concatenate([0 * sigma, sigma], axis=1), table.marginals[0])


def check_fits(pipe: "DiffusionPipeline", pictures: int, arguments: Mapping[str, Any], image: Any = None) -> None:
    """Raises DoesNotFit for more pictures than fit, before there is a request for each. arguments, image: of a call.

    Those that start from pictures, whose sizes are theirs, are left to `prepare`.
    """
    if arguments.get("image") is not None:
        return
    height, width = picture_size(pipe, image)
    size = arguments.get("height") or height, arguments.get("width") or width
    if all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in size):
        load = Load.of(pipe.mesh, pictures, *size, tiled=bool(arguments.get("vae_tiling")))
        bounds.check(pipe.models, pipe.mesh, load)


def column(requests: Sequence[Request], name: str, default: Any) -> np.ndarray:
    """[B] the values of a field, `default` where it is None."""
    values = (getattr(request, name) for request in requests)
    return np.array([default if value is None else value for value in values])


def shared(requests: Sequence[Request], name: str) -> Any:
    """The value that all requests of a batch have of a field. Raises ValueError where there are several."""
    values = list(dict.fromkeys(getattr(request, name) for request in requests))
    if len(values) > 1:
        raise ValueError(f"{name}: the pictures of a batch share it, and these have {values[0]!r} and {values[1]!r}")
    return values[0]


def guidance_scale(pipe: "DiffusionPipeline") -> float:
    """What guidance_scale=None stands for: what model_index.json recommends, else 7.5, with SDXL 5.

    For a UNet that is conditioned on the scale it is 8.5.
    """
    config = pipe.unet.config
    usual = conditioning.READINGS[config.addition_embed_type].guidance_scale
    return float(pipe.config.get("guidance_scale", usual if conditioning.is_guided(config) else DISTILLED_SCALE))


def reading(pipe: "DiffusionPipeline", clip_skip: int | None) -> Reading:
    """Which states of the text encoders the UNet reads. Raises ValueError for layers that are not there."""
    own = conditioning.READINGS[pipe.unet.config.addition_embed_type]
    layers = min((getattr(pipe, name).config.num_hidden_layers for name in pipe.text_tokenizers), default=0)
    most = layers + 1 + own.layer
    if clip_skip is not None and clip_skip > most:
        raise ValueError(f"clip_skip must be a whole number from 0 to {most}, not {clip_skip!r}")
    return own._replace(layer=own.layer - (clip_skip or 0))


def picture_size(pipe: "DiffusionPipeline", image: Any = None) -> tuple[int, int]:
    """(height, width) of the picture whose latents are given, else of the pictures of the training."""
    size, factor = pipe.unet.config.sample_size or DEFAULT_SIZE, pipe.vae.config.factor
    h, w = np.shape(image)[1:3] if np.ndim(image) == 4 else (at(size, 0), at(size, 1))
    return h * factor, w * factor


def latent_shape(pipe: "DiffusionPipeline", height: int, width: int) -> tuple[int, int, int]:
    """(h, w, C) of a picture's latents. Raises ValueError for a size or a UNet that does not fit the VAE."""
    channels, taken, factor = pipe.vae.config.latent_channels, pipe.unet.config.in_channels, pipe.vae.config.factor
    if taken not in (channels, 2 * channels + 1):
        raise ValueError(
            f"this UNet takes {taken} channels where the VAE's latents have {channels}: it is for a task that is not "
            "supported"
        )
    return (*latent_size(height, width, factor), channels)


def latent_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """(h, w) of the latents of a picture of height x width. Raises ValueError for no multiples of the VAE's factor."""
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % factor:
            raise ValueError(f"{name} must be a positive multiple of {factor}, not {size!r}")
    return height // factor, width // factor


def _tables(pipe: "DiffusionPipeline", requests: Sequence[Request], given: Given) -> list[Table]:
    """The table of each request; those of equal settings are one."""
    from_latents = {"from_picture": True} if given.image is not None else {}

    @cache
    def table(key: TableKey) -> Table:
        return table_of(pipe, key, denoising_start=given.denoising_start, denoising_end=given.denoising_end)

    return [table(request.table_key._replace(**from_latents)) for request in requests]


def table_of(pipe: "DiffusionPipeline", key: TableKey, **part: float) -> Table:
    """The table of a request, or of the part of it between denoising_start and denoising_end.

    Raises ValueError for what the sampler cannot take.
    """
    strength = 1.0 if part.get("denoising_start") else strength_of(pipe, key)
    return scheduler_of(pipe, key.scheduler, key.timestep_spacing).table(
        key.num_inference_steps,
        strength,
        timesteps=key.timesteps,
        sigmas=key.sigmas,
        guidance_interval=key.guidance_interval,
        **part,
    )


def strength_of(pipe: "DiffusionPipeline", key: TableKey) -> float:
    """The part of the steps that run: 1 without a picture. Raises ValueError for a strength of nothing."""
    if not key.from_picture:
        if key.strength is not None:
            raise ValueError("strength: only with image, the picture to start from")
        return 1.0
    own = conditioning.READINGS[pipe.unet.config.addition_embed_type]
    usual = own.mask_strength if key.has_mask else own.strength
    return usual if key.strength is None else key.strength


def scheduler_of(
    pipe: "DiffusionPipeline", scheduler: Scheduler | str | None, timestep_spacing: str | None = None
) -> Scheduler:
    """The sampler of a request: its own or the pipeline's, on the pipeline's noise schedule where it is a name."""
    made = pipe.scheduler if scheduler is None else pipe.as_scheduler(scheduler)
    return made if timestep_spacing is None else from_config(made.config, timestep_spacing=timestep_spacing)


def _branches(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    given: Given,
    load: Load,
    scales: np.ndarray,
    prefixes: Sequence[str],
) -> tuple[Condition, ...]:
    """What the UNet is conditioned on in each branch; everything is checked before the first text is encoded."""
    read, count = reading(pipe, shared(requests, "clip_skip")), len(requests)
    zeros = bool(pipe.config.get("force_zeros_for_empty_prompt")) and read.pooled
    absent = {prefix: [zeros and getattr(r, f"{prefix}prompt") is None for r in requests] for prefix in prefixes}
    texts = {
        prefix: {encoder: [_text(request, prefix, encoder) for request in requests] for encoder in pipe.text_tokenizers}
        for prefix in prefixes
        if prefix not in given.embeddings and not all(absent[prefix])
    }
    if texts and not pipe.text_tokenizers:
        raise ValueError("this pipeline has no text encoder: give prompt_embeds")
    tokens = encoding.tokenize(
        pipe.text_tokenizers,
        texts,
        shared(requests, "prompt_syntax"),
        lambda tokens: bounds.check(pipe.models, pipe.mesh, load._replace(tokens=tokens)),
    )
    _check_tokens(pipe, tokens)
    width = at(pipe.unet.config.cross_attention_dim, 0)
    ready = {
        prefix: own.condition(prefix, width, read.pooled, count)
        for prefix, own in given.embeddings.items()
        if prefix in prefixes
    }
    lengths = [own["encoder_hidden_states"].shape[1] for own in ready.values()]
    lengths += [own[0].ids[0].size for own in tokens.values()]
    if len(set(lengths)) > 1:
        raise ValueError(f"prompt and negative prompt have {' and '.join(map(str, lengths))} tokens")
    beside = conditioning.guidance_embedding(pipe.unet.config, scales)
    pooled = given.embeddings[""].pooled if "" in given.embeddings else None
    sizes = {prefix: time_ids(pipe, requests, (load.height, load.width), prefix, pooled) for prefix in prefixes}
    ready = {prefix: jax.tree.map(pipe.padded, own) for prefix, own in ready.items()}
    ready |= {prefix: _encoded(pipe, own, read, load) for prefix, own in tokens.items()}
    for prefix in prefixes:
        if prefix not in ready:
            ready[prefix] = jax.tree.map(jnp.zeros_like, ready[""])
        elif any(absent[prefix]) and prefix in tokens:
            kept = pipe.padded(~np.array(absent[prefix]))
            ready[prefix] = jax.tree.map(lambda own, kept=kept: own * over(kept, own), ready[prefix])
    return tuple(ready[prefix] | jax.tree.map(pipe.padded, sizes[prefix] | beside) for prefix in prefixes)


def _text(request: Request, prefix: str, encoder: str) -> str:
    """What a text encoder reads in a branch; a negative prompt that is left out is empty."""
    second = getattr(request, f"{prefix}prompt_2") if encoder == "text_encoder_2" else None
    return (second if second is not None else getattr(request, f"{prefix}prompt")) or ""


def _check_tokens(pipe: "DiffusionPipeline", tokens: Mapping[str, Sequence[Text]]) -> None:
    for own in tokens.values():
        for name, read in zip(pipe.text_tokenizers, own, strict=True):
            config, length, highest = getattr(pipe, name).config, read.ids.shape[-1], read.ids.max()
            known = config.vocab_size + len(pipe.learned.get(name, ()))
            if length > config.max_position_embeddings or highest >= known:
                raise ValueError(
                    f"the tokenizer does not fit the {name}: it gives {length} tokens, ids up to {highest}, for "
                    f"{config.max_position_embeddings} positions and {known} ids"
                )


def time_ids(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request | None],
    size: tuple[int, int],
    prefix: str,
    pooled: Any = None,
) -> Condition:
    """{"time_ids": [B 6 or 5]} for SDXL; pooled: the prompt's pooled embeddings where there is no text encoder.

    Raises ValueError for a field that only SDXL is conditioned on.
    """
    config = pipe.unet.config
    if config.addition_embed_type is None:
        for name in (*conditioning.SIZE_FIELDS, *SECOND):
            if any(getattr(request, name, None) is not None for request in requests):
                raise ValueError(f"{name}: only SDXL is conditioned on it")
        return {}
    encoders = [getattr(pipe, name) for name in pipe.text_tokenizers]
    width = encoders[-1].config.pooled_width if encoders else np.shape(pooled)[-1]
    return {"time_ids": np.stack([conditioning.time_ids(config, width, size, r, prefix) for r in requests])}


def _encoded(pipe: "DiffusionPipeline", texts: Sequence[Text], read: Reading, load: Load) -> Condition:
    graphs, params = zip(*(pipe.network(name) for name in pipe.text_tokenizers), strict=True)
    padded = [jax.tree.map(pipe.padded, own) for own in texts]
    added = [pipe.added_embeddings(name) for name in pipe.text_tokenizers]
    arguments = (pipe.mesh, graphs, list(params), read, padded, added, pipe.vocab_sizes)
    load = load._replace(tokens=texts[0].ids[0].size)
    if bounds.is_near(pipe.models, pipe.mesh, load):
        lowered = LoweredProgram("encode", programs.encode.lower(*arguments), params)
        bounds.check_compiled(pipe.models, pipe.mesh, load, [lowered])
    return programs.encode(*arguments)
