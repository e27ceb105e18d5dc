"""What is trained of a model, as data: arrays by name, apart from those that stay as they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sdjax.checkpoints.folder import variables
from sdjax.checkpoints.variables import get_value, set_value
from sdjax.diffusion_pipeline import WORDS
from sdjax.models import AutoencoderKLConfig, UNet2DConditionConfig
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime.network import Graph
from sdjax.text.conditioning import READINGS, Condition

Tree = dict[str, dict[str, Array]]
"""{component: {parameter: array}}; WORDS: {text encoder: [N D]}, as `pipe.params`"""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Trained:
    """What is trained, and what its loss takes beside it.

    The parameters that networks compute with are `joined(frozen, trained)`, whatever is trained: a LoRA is
    parameters that its layers have more, a textual inversion rows that an embedding has more, a ControlNet a component
    more, a whole network a component that is not frozen.

    Attributes:
        graphs: the networks, by component.
        initial: what training begins with, float32, on the host.
        frozen: all other parameters, in the dtypes of the pipeline's models.
        unet, vae: configs.
        dtype: that networks compute in.
        save: (path, tree like `initial`, **options) writes it in the layout that PyTorch diffusers opens.
        install: (tree like `initial`) gives the pipeline that it was made with these values, to draw with them.
    """

    graphs: Mapping[str, Graph]
    initial: Tree
    frozen: Tree
    unet: UNet2DConditionConfig
    vae: AutoencoderKLConfig
    dtype: DTypeLike
    save: Callable[..., None]
    install: Callable[[Tree], None]

    def latents(self, params: Mapping[str, Any], batch: Mapping[str, Array], noise: Array) -> Array:
        """[B h w C] of a batch's pictures, drawn from the VAE's posterior with this noise, scaled for the denoiser."""
        moments = batch["moments"] if "moments" in batch else self._encoded(params, batch["pixels"])
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return self.vae.scaled(mean + jnp.exp(jnp.clip(logvar, -30, 20) / 2) * noise)

    def latents_shape(self, batch: Mapping[str, Array]) -> tuple[int, int, int, int]:
        """[B h w C] of a batch."""
        if "moments" in batch:
            B, h, w, _ = batch["moments"].shape
        else:
            B, H, W, _ = batch["pixels"].shape
            h, w = H // self.vae.factor, W // self.vae.factor
        return B, h, w, self.vae.latent_channels

    def predict(self, params: Mapping[str, Any], batch: Mapping[str, Array], x: Array, timesteps: Array) -> Array:
        """The UNet's prediction [B h w C] for noised latents x, with the batch's texts, sizes and control picture."""
        states, added = self._condition(params, batch)
        x, states = (each.astype(self.dtype) for each in (x, states))
        residuals = ()
        if "control_image" in batch:
            net = self.graphs["controlnet"].merge(params["controlnet"])
            residuals = net(x, timesteps, states, net.embed_picture(batch["control_image"].astype(x.dtype)), **added)
        unet = self.graphs["unet"].merge(params["unet"])
        return unet(x, timesteps, states, residuals=residuals, **added)

    def _condition(self, params: Mapping[str, Any], batch: Mapping[str, Array]) -> tuple[Array, Condition]:
        reading = READINGS[self.unet.addition_embed_type]
        if "text" in batch:
            states, pooled = batch["text"]["hidden"], batch["text"].get("pooled")
        else:
            outputs = [self._text(params, name, ids) for name, ids in sorted(batch["input_ids"].items())]
            states, pooled = jnp.concatenate([output.states for output in outputs], axis=-1), outputs[-1].pooled
        return states, {"text_embeds": pooled, "time_ids": batch["time_ids"]} if reading.pooled else {}

    def _text(self, params: Mapping[str, Any], name: str, input_ids: Array) -> Any:
        reading = READINGS[self.unet.addition_embed_type]
        encoder, words = self.graphs[name].merge(params[name]), params.get(WORDS, {}).get(name)
        return encoder.encode(input_ids, layer=reading.layer, normalize=reading.normalize, added_embeddings=words)

    def _encoded(self, params: Mapping[str, Any], pixels: Array) -> Array:
        posterior = self.graphs["vae"].merge(params["vae"]).encode(pixels)
        return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)


def joined(frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of each component, those that are trained among the others."""
    return {name: {**frozen.get(name, {}), **trained.get(name, {})} for name in {**frozen, **trained}}


def needed(pipe: StableDiffusionPipeline, *, texts_cached: bool, pictures_cached: bool) -> list[str]:
    """The components that a loss computes with. Raises ValueError for models that are not trained here."""
    config = pipe.unet.config
    if not isinstance(config, UNet2DConditionConfig) or not isinstance(pipe.vae.config, AutoencoderKLConfig):
        raise ValueError(f"not trained here: {type(pipe.unet).__name__} with {type(pipe.vae).__name__}")
    if config.in_channels != pipe.vae.config.latent_channels or config.class_embed_type or config.num_class_embeds:
        raise ValueError(
            f"this UNet takes {config.in_channels} channels or a class label: such as are made for inpainting, depth "
            "and upscaling are not trained here"
        )
    if config.time_cond_proj_dim is not None:
        raise ValueError("this UNet is distilled on the guidance scale (LCM), which is not trained here")
    if dtype_of(pipe) == jnp.float16:
        raise ValueError("float16: gradients are too small for it; load the model in bfloat16 or float32")
    texts = [] if texts_cached else [name for name in TEXT_ENCODERS if getattr(pipe, name) is not None]
    return ["unet", *texts, *([] if pictures_cached else ["vae"])]


def described(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    """What `Trained` has to know of a pipeline beside its networks."""
    return {"unet": pipe.unet.config, "vae": pipe.vae.config, "dtype": dtype_of(pipe)}


def dtype_of(pipe: StableDiffusionPipeline) -> Any:
    """That the UNet computes in: its parameters', unless it has its own."""
    first = pipe.unet.conv_in
    return jnp.dtype(first.kernel.dtype if first.dtype is None else first.dtype)


def copied(module: nnx.Module, *, gradient_checkpointing: bool) -> nnx.Module:
    """A module with the same arrays, whose structure can be changed.

    gradient_checkpointing: a gradient computes each block once more, in place of keeping what is computed in it.
    """
    copy = nnx.merge(*nnx.split(module))
    for _, part in nnx.iter_graph(copy):
        if hasattr(part, "is_recomputed"):
            part.is_recomputed = gradient_checkpointing
    return copy


def parameters(module: nnx.Module) -> dict[str, Array]:
    """By name."""
    return {name: get_value(variable) for name, variable in variables(module).items()}


def in_float32(params: Mapping[str, Any]) -> dict[str, Any]:
    """On the host; of shapes in place of arrays, shapes."""
    return {
        name: jax.ShapeDtypeStruct(value.shape, np.float32)
        if isinstance(value, jax.ShapeDtypeStruct)
        else np.asarray(value).astype(np.float32)
        for name, value in params.items()
    }


def filled(module: nnx.Module, params: Mapping[str, Array], dtype: DTypeLike) -> nnx.Module:
    """A copy of a module with these parameters, in this dtype, on the host: a pipeline brings them to its devices."""
    copy = nnx.merge(*nnx.split(module))
    for name, variable in variables(copy).items():
        set_value(variable, np.asarray(params[name]).astype(dtype))
    return copy


def move_to_host(module: nnx.Module) -> None:
    """Takes a module's parameters off the devices: a pipeline that draws brings them back."""
    for variable in variables(module).values():
        value = get_value(variable)
        if isinstance(value, jax.Array):
            set_value(variable, np.asarray(value))
