"""Text in, pictures out: a thin layer over the pure core and its compiled programs."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from PIL import Image

from sdjax import arguments, denoise, images, parallel, programs, progress, samplers
from sdjax.checkpoints import folder, hub
from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from sdjax.network import Graph, Network
from sdjax.samplers import Scheduler, Table
from sdjax.tokenizer import CLIPTokenizer

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "fluent-emoji"
"""The folder of the model that comes with the package"""

MODELS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
OUTPUT_TYPES = ("pil", "np", "latent")
SUPPORTED = ("StableDiffusionPipeline", "FlaxStableDiffusionPipeline")

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

Callback = Callable[[int, int, Callable[[], list[Image.Image]]], Any]
"""callback(step, total, preview): `preview()` decodes and returns the pictures as the model sees them at this step"""


@dataclass(frozen=True)
class StableDiffusionPipelineOutput:
    """What a pipeline returns."""

    images: list[Image.Image] | np.ndarray
    """PIL pictures, float32 [B H W 3] in 0..1 ("np"), or latents [B h w C] ("latent")"""
    seeds: list[int]
    """the seed of each image"""
    nsfw_content_detected: list[bool] | None
    """None: nothing looked"""


class StableDiffusionPipeline:
    """Stable Diffusion 1.x and 2.x, text to image (arXiv:2112.10752), over all devices of this process.

    `text_encoder`, `unet`, `vae`, `tokenizer` and `scheduler` can be replaced; `scheduler` also takes a sampler's name.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler: Scheduler | Mapping[str, Any] | str,
        mesh: Mesh | None = None,
    ):
        self.text_encoder, self.unet, self.vae, self.tokenizer = text_encoder, unet, vae, tokenizer
        self._scheduler = scheduler if isinstance(scheduler, Scheduler) else samplers.from_config(scheduler)
        self.mesh = mesh or parallel.data_mesh()
        self._networks: dict[str, Network] = {}
        self._show_progress = True

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike | None = None,
        dtype: DTypeLike | None = None,
        scheduler: Scheduler | Mapping[str, Any] | str | None = None,
        *,
        revision: str | None = None,
        mesh: Mesh | None = None,
    ) -> Self:
        """Loads a diffusers folder, a Hub repository, or (None) the embedded model.

        dtype: of weights and computation; None: bfloat16 on TPUs and GPUs, float32 on CPUs. With float16 the VAE stays
        float32.
        scheduler: a sampler's name, used with the checkpoint's noise schedule, a scheduler or its config; None: the
        checkpoint's.
        mesh: devices to map over (`sdjax.parallel.data_mesh`); None: all of this process.
        Raises FileNotFoundError for no such folder, CheckpointError for one that is no Stable Diffusion checkpoint.
        """
        path = hub.resolve(EMBEDDED_MODEL if path_or_hub_id is None else path_or_hub_id, revision=revision)
        kind = folder.read_json(path / "model_index.json").get("_class_name")
        if kind not in SUPPORTED:
            raise CheckpointError(f"{path}: a {kind} is not supported; supported: {', '.join(SUPPORTED)}")
        config = folder.read_json(path / "scheduler" / "scheduler_config.json")
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        dtypes = dict.fromkeys(MODELS, dtype)
        if dtype is not None and jnp.dtype(dtype) == jnp.float16:
            dtypes["vae"] = jnp.float32  # the activations of Stable Diffusion's autoencoder overflow float16
        models = {name: model.from_pretrained(path, name, dtype=dtypes[name]) for name, model in MODELS.items()}
        pipe = cls(**models, tokenizer=tokenizer, scheduler=config, mesh=mesh)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes the standard folder layout, which PyTorch diffusers loads."""
        path = Path(path)
        for name in MODELS:
            getattr(self, name).save_pretrained(path / name)
        self.tokenizer.save_pretrained(path / "tokenizer")
        (path / "scheduler").mkdir(exist_ok=True)
        folder.write_json(path / "scheduler" / "scheduler_config.json", dict(self.scheduler.config))
        index = MODEL_INDEX | {"scheduler": ["diffusers", self.scheduler.config["_class_name"]]}
        folder.write_json(path / "model_index.json", index)

    def set_progress_bar_config(self, *, disable: bool) -> None:
        """Switches the progress bar off, or on again for terminals and notebooks."""
        self._show_progress = not disable

    @property
    def scheduler(self) -> Scheduler:
        """The sampler. Set to a name, it keeps this one's noise schedule."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: Scheduler | Mapping[str, Any] | str) -> None:
        self._scheduler = self._as_scheduler(value)

    def _as_scheduler(self, value: Scheduler | Mapping[str, Any] | str) -> Scheduler:
        if isinstance(value, str):
            return samplers.from_config(self._scheduler.config, sampler=value)
        return value if isinstance(value, Scheduler) else samplers.from_config(value)

    @property
    def params(self) -> dict[str, list[jax.Array]]:
        """The parameters of the text encoder, the UNet and the VAE, on every device of the mesh."""
        return {name: self._network(name)[1] for name in MODELS}

    def text_to_latents(self, height: int, width: int) -> Callable[..., jax.Array]:
        """The pure function under the pipeline, for jit, vmap, pmap, grad: see `sdjax.denoise.text_to_latents`.

        sample(params, tokens, keys, table, guidance_scale) -> latents, where params is `pipe.params`, tokens are
        [B 2 L] from `pipe.tokenizer`, keys from `denoise.seed_keys` and table from `pipe.scheduler.table`.
        """
        text_encoder, unet = self._network("text_encoder")[0], self._network("unet")[0]
        return denoise.text_to_latents(
            lambda params, tokens: text_encoder.merge(params["text_encoder"])(tokens),
            lambda params, x, t, context: unet.merge(params["unet"])(x, t, context),
            self._latent_shape(height, width),
        )

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (*arguments.latent_size(height, width, self.vae.config.factor), self.unet.config.in_channels)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Sequence[float] = 7.5,
        num_images_per_prompt: int = 1,
        seed: int | Iterable[int] = 0,
        scheduler: Scheduler | Mapping[str, Any] | str | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "pil",
        callback: Callback | None = None,
    ) -> StableDiffusionPipelineOutput:
        """Makes num_images_per_prompt pictures of each prompt.

        prompt, negative_prompt and guidance_scale: one for all images, one for each prompt or one for each image.
        height, width: multiples of the VAE's factor; None: what the model was trained at.
        guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 or less: none.
        seed: 0 to 2^64 - 1; one for each image, or a single one that counts up.
        latents [B h w C]: the initial standard normal noise, in place of the seeds'.
        prompt_embeds, negative_prompt_embeds [prompts or B, L, D]: text states, in place of the prompts.
        output_type: "pil", "np" (float32 [B H W 3] in 0..1) or "latent".
        callback: called after every step. A progress bar shows in a terminal or a notebook.
        Raises ValueError that names the argument, before anything is computed.
        """
        prompts, count = arguments.image_count(prompt, prompt_embeds, num_images_per_prompt)
        guidance = arguments.guidance_scales(guidance_scale, prompts, count)
        seeds = arguments.seeds(seed, count)
        default_size = (self.unet.config.sample_size or 64) * self.vae.config.factor
        height, width = default_size if height is None else height, default_size if width is None else width
        shape = self._latent_shape(height, width)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
        table = self._as_scheduler(self.scheduler if scheduler is None else scheduler).table(num_inference_steps)
        if latents is not None:
            latents = arguments.array("latents", latents, (count, *shape))

        sides = [("prompt", prompt, prompt_embeds)]
        if (guidance > 1).any():
            sides.insert(0, ("negative_prompt", negative_prompt or "", negative_prompt_embeds))
        texts = [self._text(*side, prompts, count) for side in sides]
        if len({text.shape[1] for text in texts}) > 1:
            raise ValueError(f"prompt and negative prompt have {' and '.join(str(t.shape[1]) for t in texts)} tokens")
        contexts = tuple(self._states(text) for text in texts)
        keys = self._padded(denoise.seed_keys(seeds))
        noise = programs.noise(self.mesh, keys, shape) if latents is None else self._padded(latents)
        samples = self._denoise(table, noise, keys, contexts, self._padded(guidance), count, callback)
        return StableDiffusionPipelineOutput(self._output(samples, count, output_type), seeds, None)

    def _network(self, name: str) -> tuple[Graph, list[jax.Array]]:
        module = getattr(self, name)
        if name not in self._networks or self._networks[name].module is not module:
            self._networks[name] = Network(module, self.mesh)
        return self._networks[name].graph, self._networks[name].params()

    def _padded(self, array: np.ndarray) -> jax.Array:
        return parallel.split(parallel.pad(array, parallel.padded_size(len(array), self.mesh.size)), self.mesh)

    def _text(self, name: str, text: Any, embeds: Any, prompts: int, count: int) -> np.ndarray:
        """A prompt for each image: token ids [B L], or the states that were given [B L D]."""
        config = self.text_encoder.config
        if embeds is not None:
            embeds = arguments.array(f"{name}_embeds", embeds, (None, None, config.hidden_size))
            return np.stack(arguments.per_image(f"{name}_embeds", embeds, prompts, count))
        tokens = self.tokenizer(arguments.texts(name, text))
        if tokens.shape[1] > config.max_position_embeddings or tokens.max() >= config.vocab_size:
            raise ValueError(
                f"the tokenizer does not fit the text encoder: it gives {tokens.shape[1]} tokens with ids up to "
                f"{tokens.max()}, for {config.max_position_embeddings} positions and {config.vocab_size} ids"
            )
        return np.stack(arguments.per_image(name, tokens, prompts, count))

    def _states(self, text: np.ndarray) -> jax.Array:
        """The states [padded B L D] of what `_text` gave."""
        padded = self._padded(text)
        return padded if text.ndim == 3 else programs.encode(self.mesh, *self._network("text_encoder"), padded)

    def _denoise(
        self,
        table: Table,
        noise: jax.Array,
        keys: jax.Array,
        contexts: tuple[jax.Array, ...],
        guidance_scale: jax.Array,
        count: int,
        callback: Callback | None,
    ) -> jax.Array:
        """The table's rows in dispatched segments; where somebody watches, row by row, one row ahead of the device."""
        table = Table.stack([table] * len(keys))
        unet = self._network("unet")
        sigma = parallel.split(table.init_noise_sigma.astype(np.float32), self.mesh)
        state, denoised = programs.start(self.mesh, noise, sigma), noise
        with progress.bar(len(table), self._show_progress) as advance:
            watched = advance is not None or callback is not None
            length = programs.SEGMENT_ROWS
            for segment in denoise.segments(table, length, active=1 if watched else length):
                previous = denoised
                arguments = (state, denoised, segment, keys, contexts, guidance_scale)
                state, denoised = programs.denoise_segment(self.mesh, *unet, *arguments)
                if watched:
                    jax.block_until_ready(previous)
                if advance is not None:
                    advance()
                if callback is not None:
                    callback(int(segment[1][0]) + 1, len(table), partial(self._output, denoised, count, "pil"))
        return state.x

    def _output(self, latents: jax.Array, count: int, output_type: str) -> list[Image.Image] | np.ndarray:
        if output_type == "latent":
            return np.asarray(latents)[:count]
        decoded = programs.decode(self.mesh, *self._network("vae"), latents)
        pictures = np.asarray(decoded)[:count]
        return images.to_pil(pictures) if output_type == "pil" else images.denormalize(pictures)
