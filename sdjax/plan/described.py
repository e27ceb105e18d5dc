"""A pipeline whose weights are only described, and its programs, lowered for devices that need not be there."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from sdjax import components, inputs
from sdjax.checkpoints.folder import variables
from sdjax.components import ADAPTERS, CONTROLNETS
from sdjax.inputs import DEFAULT_SIZE
from sdjax.models import CLIPTextModel, ControlNetUnionModel
from sdjax.models.base import Model
from sdjax.models.controlnet_union import Typed
from sdjax.models.latent_upscaler import POOLED
from sdjax.models.unet_blocks import at
from sdjax.plan.configs import Configs
from sdjax.runtime import lowering, programs
from sdjax.runtime.denoiser import Control
from sdjax.runtime.lowering import LoweredProgram
from sdjax.runtime.network import Graph
from sdjax.runtime.parallel import REPLICATED
from sdjax.text import conditioning
from sdjax.text.conditioning import Condition
from sdjax.text.encoding import Text

DTYPE = jnp.bfloat16  # the pipeline's on TPUs
ENCODERS = ("text_encoder", "text_encoder_2")


class Described:
    """The models of a pipeline by their configs, in bfloat16, without weights.

    Raises CheckpointError for configs that are not supported, ValueError for models that do not fit together.
    """

    def __init__(self, configs: Configs):
        self.models = {name: _model(name, config) for name, config in configs.items()}
        self.unet, self.vae = self.models["unet"].config, self.models["vae"].config
        self.encoders: dict[str, CLIPTextModel] = {n: self.models[n] for n in ENCODERS if n in self.models}
        if not self.encoders:
            raise ValueError("this model has no text encoder")
        if self.unet.addition_embed_type == POOLED:
            raise ValueError("this UNet makes latents larger: it is for another task than text to image")
        if self.unet.takes_vector or self.unet.takes_number:
            raise ValueError("this UNet is conditioned on classes: it is for another task than text to image")
        if self.unet.in_channels != self.vae.latent_channels:
            raise ValueError(
                f"this UNet takes {self.unet.in_channels} channels where the VAE's latents have "
                f"{self.vae.latent_channels}: it is for inpainting or another task"
            )
        self.controls = [name for name in (*CONTROLNETS, *ADAPTERS) if name in self.models]
        if self.controls:
            components.check_fit("the model", self.models)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the pictures of the training."""
        size = self.unet.sample_size or DEFAULT_SIZE
        return at(size, 1) * self.vae.factor, at(size, 0) * self.vae.factor

    @property
    def sides(self) -> int:
        """Of guidance: how many texts a picture has, and predictions a step."""
        return 2 if conditioning.is_guided(self.unet) else 1

    def parameter_bytes(self) -> dict[str, int]:
        """By component."""
        return {name: lowering.size_in_bytes(nnx.state(model)) for name, model in self.models.items()}

    def lower(self, mesh: Mesh, batch: int, width: int, height: int) -> list[LoweredProgram]:
        """The programs of a call for `batch` pictures on each device, with guidance: encode, control for each
        ControlNet and T2I-Adapter, denoise, decode, check.

        Raises ValueError for a size that is no multiple of the VAE's factor.
        """
        rows = batch * mesh.size
        latents = (rows, *inputs.latent_size(height, width, self.vae.factor), self.vae.latent_channels)
        networks = {name: _network(model, mesh) for name, model in self.models.items()}
        encode = self._encode(mesh, networks, rows)
        condition = {key: lowering.split(mesh, leaf.shape, leaf.dtype) for key, leaf in encode.lowered.out_info.items()}
        conditions = [condition | self._beside(mesh, rows)] * self.sides
        embeds, forms = self._controls(mesh, networks, (rows, height, width, 3))
        return [encode, *embeds, *lowering.lower(mesh, networks, conditions, latents, keeps_features=False, **forms)]

    def _controls(
        self, mesh: Mesh, networks: Mapping[str, Any], pictures: tuple[int, ...]
    ) -> tuple[list[LoweredProgram], dict[str, Any]]:
        """For ControlNets and T2I-Adapters, each of which is shown one picture [B H W 3]: the programs that embed it,
        and what `lowering.lower` takes beside."""
        programs_of, embedded, rows = [], [], pictures[0]
        for name in self.controls:
            graph, params = networks[name]
            embed = programs.embed_control.lower(mesh, graph, params, lowering.split(mesh, pictures))
            programs_of.append(LoweredProgram("control", embed, params))
            own = jax.tree.map(lambda leaf: lowering.split(mesh, leaf.shape, leaf.dtype), embed.out_info)
            is_union = isinstance(self.models[name], ControlNetUnionModel)
            embedded.append(Typed((own,), lowering.split(mesh, (rows, 1), np.int32)) if is_union else own)
        count = len([name for name in self.controls if name in CONTROLNETS])
        control = Control(tuple(embedded[:count]), lowering.split(mesh, (rows,), np.bool_), tuple(embedded[count:]))
        return programs_of, {"control": control, "beside": {"control": (len(embedded),)}} if embedded else {}

    def _encode(self, mesh: Mesh, networks: Mapping[str, Any], rows: int) -> LoweredProgram:
        """For one side; each text a chunk long."""
        graphs, params = zip(*(networks[name] for name in self.encoders), strict=True)
        shapes = [(rows, 1, encoder.config.max_position_embeddings) for encoder in self.encoders.values()]
        texts = [Text(lowering.split(mesh, s, np.int32), lowering.split(mesh, s)) for s in shapes]
        reading = conditioning.READINGS[self.unet.addition_embed_type]
        sizes = tuple(encoder.config.vocab_size for encoder in self.encoders.values())
        encode = programs.encode.lower(mesh, graphs, list(params), reading, texts, [None] * len(texts), sizes)
        return LoweredProgram("encode", encode, params)

    def _beside(self, mesh: Mesh, rows: int) -> Condition:
        """What the UNet is conditioned on beside the text."""
        scales = jax.ShapeDtypeStruct((rows,), np.float32)
        beside = jax.eval_shape(partial(conditioning.guidance_embedding, self.unet), scales)
        if self.unet.addition_embed_type is not None:
            *_, last = self.encoders.values()
            beside["time_ids"] = jax.ShapeDtypeStruct((rows, self.unet.time_ids(last.config.pooled_width)), np.float32)
        if CONTROLNETS[0] in self.models:
            beside["reads_prompt"] = scales
        return {name: lowering.split(mesh, leaf.shape, leaf.dtype) for name, leaf in beside.items()}


def _model(name: str, values: Mapping[str, Any]) -> Model:
    cls = components.model_class(name, values)
    return cls.described(cls.config_class.from_dict(values), DTYPE)


def _network(model: Model, mesh: Mesh) -> tuple[Graph, dict[str, jax.ShapeDtypeStruct]]:
    sharding = NamedSharding(mesh, REPLICATED)
    return Graph(model), {
        name: jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)
        for name, variable in variables(model).items()
    }
