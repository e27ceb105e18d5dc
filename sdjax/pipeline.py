"""Text in, pictures out: a thin layer over the pure core and its compiled programs."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax import arguments
from sdjax.diffusion_pipeline import WORDS, DiffusionPipeline
from sdjax.models.unet import at
from sdjax.pictures import finite, images
from sdjax.runtime import jax_settings, parallel, programs, progress
from sdjax.runtime.network import Network, in_float32
from sdjax.runtime.programs import Decoded
from sdjax.sampling import Scheduler, Table, denoise
from sdjax.sampling import noise as tool_noise
from sdjax.text import conditioning, encoding
from sdjax.text.conditioning import Condition, Reading, SizeConditions
from sdjax.text.encoding import Side, Text

OUTPUT_TYPES = ("pil", "np", "jax", "latent")
NOISE = ("jax", *tool_noise.KINDS)
TOLD_SCALE = 8.5  # of Luo et al. 2023
DEFAULT_SIZE = 64  # of the latents, for a UNet that does not say

Callback = Callable[[int, int, Callable[[], list[Image.Image]]], Any]
"""callback(step, total, preview): `preview()` decodes and returns the pictures as the model sees them at this step"""


@dataclass(frozen=True)
class StableDiffusionPipelineOutput:
    """What a pipeline returns."""

    images: list[Image.Image] | np.ndarray | jax.Array
    """PIL pictures, float32 [B H W 3] in 0..1 ("np", "jax"), or latents [B h w C] ("latent")"""
    seeds: list[int]
    """the seed of each image"""
    nsfw_content_detected: list[bool] | jax.Array | None
    """for each image, whether the safety checker made it black; None if there is no safety checker"""
    not_finite: list[bool] | jax.Array
    """for each image, whether a value of it or of its latents is NaN or infinite; as a PIL picture it is black"""
    mended: "Callable[[], StableDiffusionPipelineOutput] | None" = field(default=None, repr=False, compare=False)
    """for "jax": waits for the devices and returns the same, but pictures in which a float16 VAE overflowed are decoded
    again in float32, as they are for the other types"""


class StableDiffusionPipeline(DiffusionPipeline):
    """Stable Diffusion 1, 2 and XL, text to image (arXiv:2112.10752, arXiv:2307.01952), over all devices of a process.

    The components are attributes, see `DiffusionPipeline`.
    """

    @property
    def guidance_scale(self) -> float:
        """What guidance_scale=None stands for: 7.5, with SDXL 5, with a UNet that is told the scale (LCM) 8.5."""
        return self._reading(None).guidance_scale if conditioning.is_guided(self.unet.config) else TOLD_SCALE

    def text_to_latents(self, height: int, width: int) -> Callable[..., jax.Array]:
        """The pure function under the pipeline, for jit, vmap, pmap, grad: see `sampling.denoise.text_to_latents`.

        sample(params, tokens, keys, table, guidance_scale) -> latents, where params is `pipe.params` (with the learned
        words that are loaded), keys are from `denoise.seed_keys`, table is from `pipe.scheduler.table`, and tokens are
        [B 2 L] from `pipe.tokenizer`, the negative prompt and the prompt ([B 1 L]: the prompt alone, no guidance), a
        list of one for each text encoder if there are two. Results are those of JAX's default settings
        (`sdjax.runtime.jax_settings`), whatever the caller's are.
        """
        names, config, reading = list(self._tokenizers), self.unet.config, self._reading(None)
        graphs = {name: self._network(name)[0] for name in (*names, "unet")}
        sizes = self._vocab_sizes

        def conditions(params: Any, tokens: Any, guidance_scale: jax.Array) -> list[Condition]:
            encoders = [graphs[name].merge(params[name]) for name in names]
            added = [params.get(WORDS, {}).get(name) for name in names]
            leaves = jax.tree.leaves(tokens)
            told = conditioning.guidance_embedding(config, guidance_scale)
            columns = []
            for column in range(leaves[0].shape[1]):
                texts = [Text(ids[:, column, None], jnp.ones_like(ids[:, column, None], jnp.float32)) for ids in leaves]
                condition = conditioning.encode(encoders, reading, texts, added, sizes)
                negative = column + 1 < leaves[0].shape[1]
                beside = self._time_ids(None, (height, width), {}, len(leaves[0]), negative=negative)
                columns.append(condition | beside | told)
            return columns

        sample = denoise.text_to_latents(
            conditions,
            lambda params, x, t, condition: graphs["unet"].merge(params["unet"])(x, t, **condition),
            self._latent_shape(height, width),
        )
        return jax_settings.fixed()(sample)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Iterable[int] = 0,
        scheduler: Scheduler | Mapping[str, Any] | str | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        clip_skip: int | None = None,
        guidance_rescale: float | Sequence[float] = 0.0,
        noise: str = "jax",
        image: Any = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        cache_interval: int | None = None,
        vae_tiling: bool = False,
        **sizes: Unpack[SizeConditions],
    ) -> StableDiffusionPipelineOutput:
        """Makes num_images_per_prompt pictures of each prompt.

        prompt, negative_prompt, guidance_scale, guidance_rescale: one for all images, one for each prompt or one for
        each image. A prompt may be longer than the text encoder's 77 tokens and may weight words: `(word:1.3)`,
        `[word]`, see `text.prompts`. prompt_2, negative_prompt_2: what the second text encoder reads; None: the same.
        height, width: multiples of the VAE's factor; None: what the model was trained at.
        guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 or less: none; None: 7.5, with SDXL 5. A UNet
        that is distilled on the scale (LCM; None: 8.5) is told it, and reads no negative prompt.
        guidance_rescale: how much of the contrast that guidance adds is taken back, 0 to 1 (arXiv:2305.08891).
        seed: 0 to 2^64 - 1; one for each image, or a single one that counts up.
        noise: what a seed's initial noise is: "jax", or the noise of another tool, "torch" or "cuda".
        latents [B h w C]: the initial standard normal noise, in place of the seeds'.
        prompt_embeds, negative_prompt_embeds [prompts or B, L, D]: text states, in place of the prompts; for SDXL with
        pooled_prompt_embeds, negative_pooled_prompt_embeds [prompts or B, P].
        clip_skip: text encoder layers left out at the end, beyond those the model leaves out, for the prompt and, as in
        the web UI, the negative prompt; PyTorch diffusers leaves none out for the negative prompt.
        denoising_end: where to stop, as a part of the noise (give output_type="latent"); another model goes on from
        these latents as `image` [B h w C] with the same denoising_start: SDXL's base and refiner.
        guidance_interval: the lowest and the highest noise level (sigma / alpha) at which there is guidance; steps
        outside of it cost half (arXiv:2404.07724). None: all.
        cache_interval: every so many rows the UNet is computed in full, in those between only its outermost layers
        (DeepCache, arXiv:2312.00858): faster, and another picture; None: always in full.
        vae_tiling: pictures larger than the VAE was trained at (and than 64x64 latents) are decoded in overlapping
        tiles of that size, in the memory of one; colours may differ a little from those of the picture as a whole.
        sizes: what SDXL is told of the picture, see `SizeConditions`.
        output_type: "pil", "np" (float32 [B H W 3] in 0..1), "jax" (the same on the devices, still being computed, so
        that the next call can be dispatched) or "latent".
        A picture that is not finite, as float16 may make it, is reported by NotFiniteWarning and by `not_finite` of the
        result (for "jax" by the latter alone). Where only a float16 VAE overflowed, it is decoded again in float32.
        callback: called after every step. A progress bar shows in a terminal or a notebook.
        Raises ValueError that names the argument, before anything is computed.
        """
        prompts, count = arguments.image_count(prompt, prompt_embeds, num_images_per_prompt)
        reading = self._reading(clip_skip)
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        scales = np.maximum(arguments.numbers("guidance_scale", guidance_scale, prompts, count), 1)
        rescale = arguments.numbers("guidance_rescale", guidance_rescale, prompts, count)
        seeds = arguments.seeds(seed, count)
        arguments.one_of("output_type", output_type, OUTPUT_TYPES)
        arguments.one_of("noise", noise, NOISE)
        if cache_interval is not None:
            arguments.whole("cache_interval", cache_interval, 1)
        if (image is None) != (denoising_start == 0) or (image is not None and latents is not None):
            raise ValueError("image (the latents to go on from) and denoising_start come together, without latents")
        table = self._as_scheduler(self.scheduler if scheduler is None else scheduler).table(
            num_inference_steps,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            guidance_interval=guidance_interval,
        )
        shape = self._latent_shape(*self._size(height, width, image))
        given = latents if image is None else image
        if given is not None:
            given = arguments.array("latents" if image is None else "image", given, (count, *shape))
        if image is not None:
            table = replace(table, init_noise_sigma=np.float64(1))

        sides = [Side("prompt", prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)]
        if (scales > 1).any() and conditioning.is_guided(self.unet.config):
            negative = (negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds)
            sides.insert(0, Side("negative_prompt", *negative))
        conditions = self._conditions(sides, reading, prompts, scales, shape, sizes)
        keys = self._padded(denoise.seed_keys(seeds))
        if given is None and noise == "jax":
            start = programs.noise(self.mesh, keys, shape)
        else:
            start = self._padded(tool_noise.latents(noise, seeds, shape) if given is None else given)
        guidance = (self._padded(scales), self._padded(rescale))
        preview = partial(self._preview, seeds, vae_tiling)
        samples = self._denoise(table, start, keys, conditions, guidance, preview, callback, cache_interval)
        return self._output(samples, seeds, output_type, vae_tiling)

    def _padded(self, array: np.ndarray | jax.Array) -> jax.Array:
        return parallel.split(parallel.pad(array, parallel.padded_size(len(array), self.mesh.size)), self.mesh)

    def _reading(self, clip_skip: int | None) -> Reading:
        """Which states of the text encoders the UNet reads."""
        reading = conditioning.READINGS[self.unet.config.addition_embed_type]
        if clip_skip is None:
            return reading
        layers = min((getattr(self, name).config.num_hidden_layers for name in self._tokenizers), default=0)
        most = layers + 1 + reading.layer
        if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip <= most:
            raise ValueError(f"clip_skip must be a whole number from 0 to {most}, not {clip_skip!r}")
        return reading._replace(layer=reading.layer - clip_skip)

    def _size(self, height: int | None, width: int | None, image: Any) -> tuple[int, int]:
        """(height, width) as given, or of the picture whose latents are given, or of the pictures of the training."""
        size, factor = self.unet.config.sample_size or DEFAULT_SIZE, self.vae.config.factor
        shape = np.shape(image)[1:3] if np.ndim(image) == 4 else (at(size, 0), at(size, 1))
        return shape[0] * factor if height is None else height, shape[1] * factor if width is None else width

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        channels, taken = self.vae.config.latent_channels, self.unet.config.in_channels
        if taken != channels:
            raise ValueError(
                f"this UNet takes {taken} channels where the VAE's latents have {channels}: it is for inpainting or "
                "another task, which needs a pipeline of its own"
            )
        return (*arguments.latent_size(height, width, self.vae.config.factor), channels)

    @jax_settings.fixed()
    def _conditions(
        self,
        sides: Sequence[Side],
        reading: Reading,
        prompts: int,
        scales: np.ndarray,
        shape: tuple[int, ...],
        sizes: SizeConditions,
    ) -> tuple[Condition, ...]:
        """What the UNet is told of each side; everything is checked before the first text is encoded."""
        count, size = len(scales), tuple(self.vae.config.factor * n for n in shape[:2])
        zeros = self.config.get("force_zeros_for_empty_prompt") and reading.pooled
        read = [side for side in sides if side.embeds is None and not (side.is_unsaid and zeros)]
        if read and not self._tokenizers:
            raise ValueError("this pipeline has no text encoder: give prompt_embeds")
        texts = dict(
            zip([side.name for side in read], encoding.tokenize(self._tokenizers, read, prompts, count), strict=True)
        )
        self._check_tokens(texts)
        width = at(self.unet.config.cross_attention_dim, 0)
        ready = {
            side.name: encoding.embeddings(side, width, reading.pooled, prompts, count)
            for side in sides
            if side.embeds is not None
        }
        lengths = [ready[name]["encoder_hidden_states"].shape[1] for name in ready]
        lengths += [own[0].ids[0].size for own in texts.values()]
        if len(set(lengths)) > 1:
            raise ValueError(f"prompt and negative prompt have {' and '.join(map(str, lengths))} tokens")
        beside = [
            self._time_ids(sides[-1].pooled, size, sizes, count, negative=side.name != "prompt")
            | conditioning.guidance_embedding(self.unet.config, scales)
            for side in sides
        ]
        ready = {name: jax.tree.map(self._padded, condition) for name, condition in ready.items()}
        ready |= {name: self._encode(own, reading) for name, own in texts.items()}
        for side in sides:
            if side.name not in ready:
                ready[side.name] = jax.tree.map(jnp.zeros_like, ready["prompt"])
        return tuple(
            ready[side.name] | jax.tree.map(self._padded, more) for side, more in zip(sides, beside, strict=True)
        )

    def _check_tokens(self, texts: Mapping[str, Sequence[Text]]) -> None:
        for own in texts.values():
            for name, read in zip(self._tokenizers, own, strict=True):
                config, length, highest = getattr(self, name).config, read.ids.shape[-1], read.ids.max()
                known = config.vocab_size + len(self._added.get(name, ()))
                if length > config.max_position_embeddings or highest >= known:
                    raise ValueError(
                        f"the tokenizer does not fit the {name}: it gives {length} tokens, ids up to {highest}, for "
                        f"{config.max_position_embeddings} positions and {known} ids"
                    )

    def _time_ids(
        self, pooled: Any, size: tuple[int, int], given: SizeConditions, images: int, *, negative: bool
    ) -> Condition:
        """{"time_ids": [B 6 or 5]} for SDXL. pooled: the prompt's pooled embeddings where there is no text encoder."""
        config = self.unet.config
        if config.addition_embed_type is None:
            if given:
                raise ValueError(f"{', '.join(given)}: only SDXL is told the size of the picture")
            return {}
        encoders = [getattr(self, name) for name in self._tokenizers]
        width = encoders[-1].config.pooled_width if encoders else np.shape(pooled)[-1]
        ids = conditioning.time_ids(config, width, size, given, negative=negative)
        return {"time_ids": np.tile(ids, (images, 1))}

    def _encode(self, texts: Sequence[Text], reading: Reading) -> Condition:
        graphs, params = zip(*(self._network(name) for name in self._tokenizers), strict=True)
        padded = [jax.tree.map(self._padded, own) for own in texts]
        added = [self._added_rows(name) for name in self._tokenizers]
        return programs.encode(self.mesh, graphs, list(params), reading, padded, added, self._vocab_sizes)

    def _denoise(
        self,
        table: Table,
        noise: jax.Array,
        keys: jax.Array,
        conditions: tuple[Condition, ...],
        guidance: tuple[jax.Array, jax.Array],
        preview: Callable[[jax.Array], list[Image.Image]],
        callback: Callback | None,
        cache_interval: int | None,
    ) -> jax.Array:
        """The table's rows in dispatched segments; where somebody watches, row by row, one row ahead of the device."""
        table = Table.stack([table] * len(keys))
        unet = self._network("unet")
        sigma = parallel.split(table.init_noise_sigma.astype(np.float32), self.mesh)
        state, denoised = programs.start(self.mesh, noise, sigma), noise
        with progress.bar(len(table), self._show_progress) as advance:
            watched = advance is not None or callback is not None
            length = programs.SEGMENT_ROWS
            for segment in denoise.segments(table, length, 1 if watched else length, cache_interval):
                previous, rows = denoised, segment.rows
                told = conditions if segment.guided else conditions[-1:]
                if cache_interval is not None:
                    if segment.renewed:
                        first = {name: column[0] for name, column in rows[1].items()}
                        deep = programs.deep_features(self.mesh, *unet, state.x, first, told)
                    told = tuple(side | {"deep": own} for side, own in zip(told, deep, strict=True))
                arguments = (state, denoised, rows, keys, told, guidance)
                state, denoised = programs.denoise_segment(self.mesh, *unet, *arguments)
                if watched:
                    jax.block_until_ready(previous)
                if advance is not None:
                    advance()
                if callback is not None:
                    callback(segment.first + 1, len(table), partial(preview, denoised))
        return state.x

    def _preview(self, seeds: Sequence[int], tiled: bool, latents: jax.Array) -> list[Image.Image]:
        name = "vae" if self.preview_vae is None else "preview_vae"
        decoded = self._mended(name, latents, tiled, self._decode(name, latents, tiled))
        not_finite = finite.reported(decoded.not_finite, seeds)
        return images.to_pil(finite.blackened(np.asarray(decoded.pictures)[: len(seeds)], not_finite))

    def _decode(self, name: str, latents: jax.Array, tiled: bool) -> Decoded:
        return programs.decode(self.mesh, *self._network(name), latents, tiled=tiled)

    def _mended(self, name: str, latents: jax.Array, tiled: bool, decoded: Decoded) -> Decoded:
        """Waits; the same, with the pictures in which an autoencoder of float16 overflowed decoded again in float32."""
        lost = np.asarray(decoded.lost)
        if not lost.any() or not any(leaf.dtype == jnp.float16 for leaf in self._network(name)[1]):
            return decoded
        network = Network(in_float32(getattr(self, name)), self.mesh)
        again = programs.decode(self.mesh, network.graph, network.params(), latents, tiled=tiled)
        pictures = jnp.where(lost[:, None, None, None], again.pictures, decoded.pictures)
        return Decoded(pictures, again.not_finite, again.lost)

    def _output(
        self, latents: jax.Array, seeds: list[int], output_type: str, tiled: bool, *, mends: bool = False
    ) -> StableDiffusionPipelineOutput:
        """What a call returns. mends: for "jax", whether to wait for what `_mended` does."""
        count, flags = len(seeds), None
        if output_type == "latent":
            latents = np.asarray(latents)[:count]
            not_finite = finite.reported(~np.isfinite(latents).all(axis=(1, 2, 3)), seeds)
            return StableDiffusionPipelineOutput(latents, seeds, None, not_finite)
        first = decoded = self._decode("vae", latents, tiled)
        if mends or output_type != "jax":
            decoded = self._mended("vae", latents, tiled, first)
        if decoded is not first and output_type != "jax":
            warnings.warn(finite.VAE_OVERFLOW, stacklevel=3)
        pictures = decoded.pictures
        if self.safety_checker is not None:
            network = self._network("safety_checker")
            pictures, flags = programs.check(self.mesh, *network, pictures, decoded.not_finite)
        if output_type == "jax":
            pictures = jnp.clip(pictures[:count] / 2 + 0.5, 0, 1)
            flags = None if flags is None else flags[:count]
            mended = partial(self._output, latents, seeds, "jax", tiled, mends=True)
            return StableDiffusionPipelineOutput(pictures, seeds, flags, decoded.not_finite[:count], mended)
        not_finite = finite.reported(decoded.not_finite, seeds)
        flags, pictures = None if flags is None else np.asarray(flags)[:count].tolist(), np.asarray(pictures)[:count]
        is_pil = output_type == "pil"
        pictures = images.to_pil(finite.blackened(pictures, not_finite)) if is_pil else images.denormalize(pictures)
        return StableDiffusionPipelineOutput(pictures, seeds, flags, not_finite)
