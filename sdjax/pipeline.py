"""Text in, pictures out: a thin layer over the pure core and its compiled programs."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdjax import inputs
from sdjax.checkpoints import ip_adapter
from sdjax.diffusion_pipeline import WORDS, DiffusionPipeline
from sdjax.inputs import NOTHING, Given, Inputs
from sdjax.pictures import finite, pixels
from sdjax.request import FIELDS, Request, for_images, image_count, values
from sdjax.runtime import bounds, jax_settings, lowering, programs, progress
from sdjax.runtime.bounds import Load
from sdjax.runtime.denoiser import composed
from sdjax.runtime.network import Graph, Network, Params, in_float32
from sdjax.runtime.programs import Decoded, Original
from sdjax.sampling import loop
from sdjax.text import conditioning, encoding
from sdjax.text.conditioning import PREFIXES, Condition
from sdjax.text.encoding import Embeddings, Text

OUTPUT_TYPES = ("pil", "np", "jax", "latent")

Callback = Callable[[int, int, Callable[[], list[Image.Image]]], Any]
"""callback(step, total, preview): `preview()` decodes and returns the pictures as the model sees them at this step"""

Decode = Callable[..., Decoded]
"""(graph and parameters of a VAE, latents) -> pictures"""


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


def with_request(call: Callable) -> Callable:
    """The call, whose keywords `**request` are the fields of `Request`, with them in its signature."""
    parameters = list(inspect.signature(call).parameters.values())[:-1]
    known = {parameter.name for parameter in parameters}
    for spec in FIELDS.values():
        if spec.call and spec.name not in known:
            kind, default = inspect.Parameter.KEYWORD_ONLY, spec.default
            parameters.append(inspect.Parameter(spec.name, kind, default=default, annotation=spec.kind.annotation))
    call.__signature__ = inspect.Signature(parameters, return_annotation=StableDiffusionPipelineOutput)
    return call


class StableDiffusionPipeline(DiffusionPipeline):
    """Stable Diffusion 1, 2 and XL, text to image (arXiv:2112.10752, arXiv:2307.01952), over all devices of a process.

    The components are attributes, see `DiffusionPipeline`.
    """

    @property
    def guidance_scale(self) -> float:
        """What guidance_scale=None stands for, see `inputs.guidance_scale`."""
        return inputs.guidance_scale(self)

    def text_to_latents(self, height: int, width: int) -> Callable[..., jax.Array]:
        """The pure function under the pipeline, for jit, vmap, pmap, grad: see `sampling.loop.text_to_latents`.

        sample(params, tokens, keys, table, guidance_scale) -> latents, where params is `pipe.params` (with the learned
        words that are loaded), keys are from `seed_keys`, table is from `pipe.scheduler.table`, and tokens are
        [B 2 L] from `pipe.tokenizer`, the negative prompt and the prompt ([B 1 L]: the prompt alone, no guidance), a
        list of one for each text encoder if there are two. Results are those of JAX's default settings
        (`sdjax.runtime.jax_settings`), whatever the caller's are.
        """
        names, config, reading = list(self.text_tokenizers), self.unet.config, inputs.reading(self, None)
        graphs = {name: self.network(name)[0] for name in (*names, "unet")}
        sizes = self.vocab_sizes

        def conditions(params: Any, tokens: Any, guidance_scale: jax.Array) -> list[Condition]:
            encoders = [graphs[name].merge(params[name]) for name in names]
            added = [params.get(WORDS, {}).get(name) for name in names]
            leaves = jax.tree.leaves(tokens)
            beside = conditioning.guidance_embedding(config, guidance_scale)
            columns = []
            for column in range(leaves[0].shape[1]):
                texts = [Text(ids[:, column, None], jnp.ones_like(ids[:, column, None], jnp.float32)) for ids in leaves]
                condition = conditioning.encode(encoders, reading, texts, added, sizes)
                negative = column + 1 < leaves[0].shape[1]
                ids = inputs.time_ids(self, [None] * len(leaves[0]), (height, width), PREFIXES[not negative])
                columns.append(condition | ids | beside)
            return columns

        sample = loop.text_to_latents(
            conditions,
            lambda params, x, t, condition: graphs["unet"].merge(params["unet"])(x, t, **condition),
            inputs.latent_shape(self, height, width),
        )
        return jax_settings.fixed()(sample)

    @with_request
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_images_per_prompt: int = 1,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        ip_adapter_image_embeds: Any = None,
        latents: Any = None,
        image: Any = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        output_type: str = "pil",
        callback: Callback | None = None,
        **request: Any,
    ) -> StableDiffusionPipelineOutput:
        """Makes num_images_per_prompt pictures of each prompt, or one for each of several seeds of a single prompt.

        The fields of `sdjax.request.Request` have one value for all images, one for each prompt or one for each image;
        the images of a call share what selects its programs: height, width, clip_skip, noise, cache_interval and
        vae_tiling; and prompt_syntax.

        prompt, negative_prompt: may be longer than the text encoder's 77 tokens and may weight words: `(word:1.3)`,
        `[word]`, see `text.prompts`. prompt_2, negative_prompt_2: what the second text encoder reads; None: the same.
        prompt_syntax: "web-ui", or "plain": brackets are text, and what is past 77 tokens is cut off with a warning, as
        in PyTorch diffusers.
        height, width: multiples of the VAE's factor; None: what the model was trained at.
        num_inference_steps: steps of the sampler, 50.
        timesteps: of each step, descending, in place of their number and spacing; or sigmas: the noise levels of each
        step and of the end. Of samplers whose class in PyTorch diffusers takes them.
        guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 or less: none; None: the model's own, else 7.5,
        with SDXL 5. A UNet that is distilled on the scale (LCM; None: 8.5) is conditioned on it, and reads no negative
        prompt.
        cfg_plus_plus: CFG++ (arXiv:2406.08070), of a sampler of first order: each row's x0 is the guided one, its noise
        that of the negative prompt. guidance_scale is then from 0 to 1; None: 0.6.
        perp_neg_scale: Perp-Neg (arXiv:2304.04968): what the negative prompt has perpendicular to the prompt is taken
        off, so many times guidance_scale; three predictions a row. 0: the usual guidance.
        mimic_scale: Dynamic Thresholding (CFG Scale Fix): each row's x0 is scaled, channel by channel, to the range
        that this guidance_scale would give it; values beyond the quantile threshold_percentile are cut. 0: not.
        guidance_rescale: how much of the contrast that guidance adds is taken back, 0 to 1 (arXiv:2305.08891).
        seed: 0 to 2^64 - 1; one for each image, or a single one that counts up.
        scheduler: a sampler's name, on the pipeline's noise schedule, a scheduler or its config; None: the pipeline's.
        timestep_spacing: "leading", "trailing" or "linspace", in place of the scheduler's.
        noise: what is drawn for a seed: "jax", or what PyTorch diffusers draws with a generator of the seed for each
            image, "torch" or "cuda".
        latents [B h w C]: the initial standard normal noise, in place of the seeds'.
        prompt_embeds, negative_prompt_embeds [prompts or B, L, D]: text states, in place of the prompts; for SDXL with
        pooled_prompt_embeds, negative_pooled_prompt_embeds [prompts or B, P].
        clip_skip: text encoder layers left out at the end, beyond those the model leaves out, for the prompt and, as in
        the web UI, the negative prompt; PyTorch diffusers leaves none out for the negative prompt.
        image: a picture to start from (image to image, arXiv:2108.01073): a file, a PIL picture or an array [H W 3],
        uint8 or float in 0..1; one for all images, one for each prompt or one for each image; or latents [B h w C]. It
        is resized to height x width; these are by default its own, rounded down to multiples of the VAE's factor.
        strength: how much of the picture is made anew, 0 to 1: the last int(num_inference_steps * strength) steps run,
        from the picture with the noise of the first of them; None: 0.8, with SDXL 0.3.
        mask_image: of the same size, white where the picture is made anew (inpainting), cut at half grey. A UNet of 9
        channels takes it beside the latents; with another, what is known is put back after each step.
        mask_blur: pixels over which its edge is blurred, and the picture's own pixels are blended in. soft_mask: grey
        says how early a pixel is free (arXiv:2306.00950). outpaint: pixels (left, top, right, bottom) by which the
        picture is made larger: its edge goes on there, under a white mask.
        keep_unmasked: whether the picture's own pixels stay where the mask is black; False: what the VAE makes of them,
        as in PyTorch diffusers. strength is by default 1, with SDXL 0.9999; at 1 it starts from noise alone.
        hires_scale: make the picture again so many times as large, from the small one made larger: hires_upscaler:
            "latent", its latents, "lanczos", its pixels, or "model", by the pipeline's `upscaler`. hires_strength: as
            strength, of this second pass; None: 0.7.
        padding_mask_crop: work on the region of the mask alone, with so many pixels around, at height x width, and put
            it back into the picture, which keeps its size.
        control_image: what each ControlNet, then each T2I-Adapter is shown; resized to height x width, which are by
            default its size.
        control_mode: of which type each picture is that a ControlNet-Union is shown; it may be shown several.
        control_preprocessor: what makes that of a picture, see `pictures.preprocessors`.
        controlnet_conditioning_scale, control_guidance_start, control_guidance_end: the weight of each of them, and
            the parts of the steps between which it acts. guess_mode: see `runtime.denoiser.Control`. With several,
            or a ControlNet-Union, a list has a value for each picture, and a list of lists one for each image.
        pag_scale: guidance away from the prediction of perturbed self-attention in pag_applied_layers, parts of the
            names of layers (PAG, arXiv:2403.17377). freeu: s1, s2, b1, b2 (FreeU, arXiv:2309.11497).
        noise_level: how much noise is on the picture that the x4 upscaler makes larger, or on the embedding of that
            which unCLIP varies, as a timestep; None: 20, with unCLIP 0. For these, and for the x2 latent upscaler,
            `image` is that picture; height and width of what is made larger follow from it.
        image_guidance_scale: how closely a UNet of InstructPix2Pix keeps to the picture, see `inputs.guidance`.
        denoising_end: where to stop, as a part of the noise (give output_type="latent"); another model goes on from
        these latents as `image` [B h w C] with the same denoising_start: SDXL's base and refiner. No noise is added.
        guidance_interval: the lowest and the highest noise level (sigma / alpha) at which there is guidance; steps
        outside of it cost half (arXiv:2404.07724). None: all.
        cache_interval: every so many rows the UNet is computed in full, in those between only its outermost layers
        (DeepCache, arXiv:2312.00858): faster, and another picture; None: always in full.
        vae_tiling: pictures larger than the VAE was trained at (and than 64x64 latents) are decoded in overlapping
        tiles of that size, in the memory of one; colours may differ a little from those of the picture as a whole.
        ip_adapter_image: what the IP-Adapters of `load_ip_adapter` are shown: a picture, or a list of one for each of
        them, or of lists of several for each; with a single one, a list has a picture, or several, for each image.
        ip_adapter_image_embeds: in its place, what `prepare_ip_adapter_image_embeds` makes of pictures, here or in
        PyTorch diffusers: an array for each adapter, or a file of them.
        ip_adapter_mask: given likewise, of height x width: each picture acts where its mask is white.
        ip_adapter_scale: how much each adapter weighs; 1: as much as the text. {"up": {"block_0": [0, 1, 0]}}: in the
        transformers of these blocks of the UNet, as in PyTorch diffusers, and not in the others.
        original_size, crops_coords_top_left, target_size, aesthetic_score, and these with negative_: what SDXL is
        conditioned on, see `text.conditioning.time_ids`.
        output_type: "pil", "np" (float32 [B H W 3] in 0..1), "jax" (the same on the devices, still being computed, so
        that the next call can be dispatched) or "latent".
        callback: called after every step. A progress bar shows in a terminal or a notebook.
        A picture that is not finite, as float16 may make it, is reported by NotFiniteWarning and by `not_finite` of the
        result (for "jax" by the latter alone). Where only a float16 VAE overflowed, it is decoded again in float32.
        Raises ValueError that names the argument, before anything is computed.
        """
        values.one_of("output_type", output_type, OUTPUT_TYPES)
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        request |= {"prompt": "" if prompt is None else prompt, "negative_prompt": negative_prompt}
        request.setdefault("seed", FIELDS["seed"].default)
        request = {name: list(value) if isinstance(value, Iterator) else value for name, value in request.items()}
        if prompt is None:
            prompts = len(encoding.array("prompt_embeds", prompt_embeds, (None, None, None)))
        else:
            prompts = len(FIELDS["prompt"].values(request["prompt"])) if values.is_listed(request["prompt"]) else 1
        states = {"": (prompt_embeds, pooled_prompt_embeds)}
        states["negative_"] = (negative_prompt_embeds, negative_pooled_prompt_embeds)
        embeddings = {prefix: Embeddings(*own, prompts) for prefix, own in states.items() if own[0] is not None}
        start, end = (
            values.finite(name, value, 0, 1)
            for name, value in (("denoising_start", denoising_start), ("denoising_end", denoising_end))
        )
        if image is not None and not self._are_latents(image):
            request["image"], image = image, None
        request = inputs.by_image(self, request)
        request = inputs.prompts_by_image(request, len(self.ip_adapters))
        images = image_count(prompts, num_images_per_prompt, request["seed"])
        inputs.check_fits(self, images, request, image)
        requests = for_images(request, prompts, images)
        seen = None if ip_adapter_image_embeds is None else ip_adapter.image_embeds(ip_adapter_image_embeds)
        given = Given(latents, image, None, start, end, embeddings, seen)
        return self.sample(requests, given, output_type=output_type, callback=callback)

    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image: Any, do_classifier_free_guidance: bool = True
    ) -> list[np.ndarray]:
        """What a call takes as `ip_adapter_image_embeds`: for each IP-Adapter the embeddings [2 n P] of its n pictures,
        beside the negative prompt and beside the prompt, or the states [2 n T P] of their patches.

        ip_adapter_image: a picture, or a list of one, or of a list of several, for each adapter.
        do_classifier_free_guidance: whether a call will have guidance; without it [1 n ...]. As in PyTorch diffusers,
        float32. Raises ValueError where there are not pictures for each adapter.
        """
        shown = FIELDS["ip_adapter_image"].check(ip_adapter_image)
        request = Request("", ip_adapter_image=shown)
        return inputs.image_embeds(self, request, is_guided=do_classifier_free_guidance)

    def sample(
        self,
        requests: Sequence[Request],
        given: Given = NOTHING,
        *,
        output_type: str = "pil",
        callback: Callback | None = None,
    ) -> StableDiffusionPipelineOutput:
        """Makes the picture of each request, as a call does, with the LoRAs that are set: requests' are not looked at.

        Raises ValueError for no requests, and one that names the field where requests differ in what selects programs.
        """
        if not requests:
            raise ValueError("sample needs at least one request")
        second = inputs.second_pass(self, requests, given)
        samples, decode = self._pass(requests, given, callback)
        if second is not None:
            first = self._larger(samples, decode, second[0], inputs.shared(requests, "hires_upscaler"))
            again = Given(first=first, embeddings=given.embeddings, image_embeds=given.image_embeds)
            samples, decode = self._pass(second, again, callback)
        return self.output(samples, [request.seed for request in requests], output_type, decode)

    def _pass(self, requests: Sequence[Request], given: Given, callback: Callback | None) -> tuple[jax.Array, Decode]:
        """The latents of the requests' pictures, and what decodes them."""
        cache_interval, tiled = inputs.shared(requests, "cache_interval"), inputs.shared(requests, "vae_tiling")
        prepared, seeds = inputs.prepare(self, requests, given), [request.seed for request in requests]
        self._ask_compiler(prepared, cache_interval, tiled)
        decode = self.decoder(prepared.original, tiled)
        return self._denoise(prepared, partial(self.preview, seeds, decode), callback, cache_interval), decode

    def decoder(self, original: Original | None, tiled: bool) -> Decode:
        """What decodes latents, and puts the pictures into these."""

        def decode(vae: Graph, params: Params, latents: jax.Array) -> Decoded:
            return programs.decode(self.mesh, vae, params, latents, original, tiled=tiled)

        return decode

    def _larger(self, latents: jax.Array, decode: Decode, request: Request, upscaler: str) -> jax.Array:
        """Latents of the size of a request, made of those of smaller pictures."""
        height, width = request.height, request.width
        if upscaler == "latent":
            return programs.larger_latents(self.mesh, latents, inputs.latent_shape(self, height, width)[:2])
        network = self.network("upscaler") if upscaler == "model" else (None, None)
        decoded = self._mended("vae", latents, decode, decode(*self.network("vae"), latents))
        pictures = programs.larger_pictures(self.mesh, *network, decoded.pictures, (height, width))
        return programs.encode_pictures(self.mesh, *self.network("vae"), pictures, None)

    def _are_latents(self, image: Any) -> bool:
        """Whether an image argument is latents [B h w C], not pictures."""
        channels = self.vae.config.latent_channels
        is_batch = getattr(image, "ndim", 0) == 4 and image.shape[3] == channels
        return is_batch and str(image.dtype) not in ("uint8", "bool")

    def _ask_compiler(self, prepared: Inputs, cache_interval: int | None, tiled: bool) -> None:
        """Raises DoesNotFit where the system might otherwise end the process for want of memory."""
        rows, *latents = prepared.parts[0].shape
        height, width = (side * self.vae.config.factor for side in latents[:2])
        load = Load.of(self.mesh, rows, height, width, tiled=tiled)
        if bounds.is_near(self.models, self.mesh, load):
            networks = {name: self.network(name) for name in self.models}
            forms = {"keeps_features": cache_interval is not None} | prepared.forms()
            lowered = lowering.lower(self.mesh, networks, prepared.branches, (rows, *latents), tiled=tiled, **forms)
            bounds.check_compiled(self.models, self.mesh, load, lowered)

    def _denoise(
        self,
        prepared: Inputs,
        preview: Callable[[jax.Array], list[Image.Image]],
        callback: Callback | None,
        cache_interval: int | None,
    ) -> jax.Array:
        """The table's rows in dispatched segments; where somebody watches, row by row, one row ahead of the device."""
        table, conditions, parts = prepared.table, prepared.branches, (prepared.channels, prepared.control)
        denoiser = composed({name: self.network(name) for name in ("unet", *self.controlnets)})
        state, denoised = programs.start(self.mesh, prepared.parts, prepared.scales), prepared.parts[0]
        with progress.bar(len(table), self.shows_progress) as advance:
            watched = advance is not None or callback is not None
            length = programs.SEGMENT_ROWS
            active = 1 if watched else length
            for segment in loop.segments(table, length, active, cache_interval, prepared.beside):
                previous, rows = denoised, segment.rows
                branches = conditions if segment.guided else conditions[-1:]
                if cache_interval is not None:
                    if segment.renewed:
                        first = loop.first_row(rows[1])
                        deep = programs.deep_features(self.mesh, *denoiser, state.x, first, branches, *parts)
                    branches = tuple(side | {"deep": own} for side, own in zip(branches, deep, strict=True))
                arguments = (state, denoised, rows, prepared.keys, branches, prepared.guidance(len(branches)))
                arguments += (prepared.known, *parts)
                state, denoised = programs.denoise_segment(self.mesh, *denoiser, *arguments)
                if watched:
                    jax.block_until_ready(previous)
                if advance is not None:
                    advance()
                if callback is not None:
                    callback(segment.first + 1, len(table), partial(preview, denoised))
        return state.x

    def preview(self, seeds: Sequence[int], decode: Decode, latents: jax.Array) -> list[Image.Image]:
        """Pictures of latents [B h w C] under way, the first of the batch, one for each seed."""
        name = "vae" if self.preview_vae is None else "preview_vae"
        decoded = self._mended(name, latents, decode, decode(*self.network(name), latents))
        pictures, _ = self._checked(decoded)
        not_finite = finite.reported(decoded.not_finite, seeds)
        return pixels.to_pil(finite.blackened(np.asarray(pictures)[: len(seeds)], not_finite))

    def _checked(self, decoded: Decoded) -> tuple[jax.Array, jax.Array | None]:
        """The pictures, black where the safety checker flags them, and its flags; None if there is none."""
        if self.safety_checker is None:
            return decoded.pictures, None
        return programs.check(self.mesh, *self.network("safety_checker"), decoded.pictures, decoded.not_finite)

    def _mended(self, name: str, latents: jax.Array, decode: Decode, decoded: Decoded) -> Decoded:
        """Waits; the same, with the pictures in which an autoencoder of float16 overflowed decoded again in float32."""
        if not any(leaf.dtype == jnp.float16 for leaf in self.network(name)[1].values()):
            return decoded
        lost = np.asarray(decoded.lost)
        if not lost.any():
            return decoded
        network = Network(in_float32(getattr(self, name)), self.mesh)
        again = decode(network.graph, network.params(), latents)
        pictures = jnp.where(lost[:, None, None, None], again.pictures, decoded.pictures)
        return Decoded(pictures, again.not_finite, again.lost)

    def output(
        self, latents: jax.Array, seeds: list[int], output_type: str, decode: Decode, *, mends: bool = False
    ) -> StableDiffusionPipelineOutput:
        """What a call returns for latents [B h w C], the first of the batch, one for each seed.

        mends: for "jax", whether to wait for the devices and decode again what overflowed.
        """
        count = len(seeds)
        if output_type == "latent":
            latents = np.asarray(latents)[:count]
            not_finite = finite.reported(~np.isfinite(latents).all(axis=(1, 2, 3)), seeds)
            return StableDiffusionPipelineOutput(latents, seeds, None, not_finite)
        first = decoded = decode(*self.network("vae"), latents)
        if mends or output_type != "jax":
            decoded = self._mended("vae", latents, decode, first)
        if decoded is not first and output_type != "jax":
            warnings.warn(finite.VAE_OVERFLOW, stacklevel=3)
        pictures, flags = self._checked(decoded)
        if output_type == "jax":
            pictures = jnp.clip(pictures[:count] / 2 + 0.5, 0, 1)
            flags = None if flags is None else flags[:count]
            mended = partial(self.output, latents, seeds, "jax", decode, mends=True)
            return StableDiffusionPipelineOutput(pictures, seeds, flags, decoded.not_finite[:count], mended)
        not_finite = finite.reported(decoded.not_finite, seeds)
        flags, pictures = None if flags is None else np.asarray(flags)[:count].tolist(), np.asarray(pictures)[:count]
        is_pil = output_type == "pil"
        pictures = pixels.to_pil(finite.blackened(pictures, not_finite)) if is_pil else pixels.denormalize(pictures)
        return StableDiffusionPipelineOutput(pictures, seeds, flags, not_finite)
