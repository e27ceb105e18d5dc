"""ControlNet (arXiv:2302.05543): a copy of half a UNet that sees a picture, and adds to what that half leaves."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sdjax import fields
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import torch_layout, variables
from sdjax.checkpoints.variables import get_value
from sdjax.fields import Channels, Levels
from sdjax.models.attention import Context
from sdjax.models.layers import LayerArgs, added, conv
from sdjax.models.unet import UNet2DConditionModel
from sdjax.models.unet_blocks import at
from sdjax.models.unet_encoder import Added, Encoder, EncoderConfig
from sdjax.ops.activations import silu

ZEROS: LayerArgs = {"init": nnx.initializers.zeros}
"""Of the layers that connect it: untrained, it adds nothing (section 3.1)."""


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """The fields of a diffusers `controlnet/config.json`, with its defaults.

    `controlnet_conditioning_channel_order` is that in which the network takes the picture's colours.
    `global_pool_conditions`: what it adds is averaged over height and width (Shuffle).
    """

    conditioning_channels: Channels = 3
    conditioning_embedding_out_channels: Annotated[tuple[Channels, ...], Levels] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    @property
    def factor(self) -> int:
        """Pixels of the picture on a side for each of the latents'."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    neutral: ClassVar = {
        **EncoderConfig.neutral,
        "controlnet_conditioning_channel_order": {"rgb", "bgr"},
        "conditioning_channels": {3},
    }


class ControlNetConditioningEmbedding(nnx.Module):
    """A picture [B H W 3] in 0..1 -> [B h w C], as large as the latents: convolutions, each but the last with silu."""

    def __init__(self, config: ControlNetConfig, **kw: Unpack[LayerArgs]):
        widths = config.conditioning_embedding_out_channels
        self.conv_in = conv(config.conditioning_channels, widths[0], 3, **kw)
        self.blocks = nnx.List()
        for cin, cout in itertools.pairwise(widths):
            self.blocks.extend([conv(cin, cin, 3, **kw), conv(cin, cout, 3, stride=2, **kw)])
        self.conv_out = conv(widths[-1], config.block_out_channels[0], 3, **kw | ZEROS)

    def __call__(self, x: Array) -> Array:
        for layer in (self.conv_in, *self.blocks):
            x = silu(layer(x))
        return self.conv_out(x)


class ControlNetModel(Encoder):
    """[B h w Cin] noisy latents, [B] timesteps, [B L D] text states, [B h w C] an embedded picture -> residuals

    The residuals are those of `UNet2DConditionModel`: one for each layer on the way down, and that of the middle.
    picture: what `embed_picture` gives. With k times as many text states there are k residuals, see there.
    """

    config_class = ControlNetConfig

    def __init__(self, config: ControlNetConfig, **kw: Unpack[LayerArgs]):
        super().__init__(config, **kw)
        widths = config.block_out_channels
        left = [widths[0]]
        for level, width in enumerate(widths):
            left += [width] * (at(config.layers_per_block, level) + (level < len(widths) - 1))
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(config, **kw)
        self.controlnet_down_blocks = nnx.List(conv(width, width, 1, **kw | ZEROS) for width in left)
        self.controlnet_mid_block = conv(widths[-1], widths[-1], 1, **kw | ZEROS)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, **config: Any) -> Self:
        """What training begins with: it adds nothing yet, and has the parameters that it has in common with a UNet.

        config: fields of ControlNetConfig, in place of the UNet's. Layers that these take away are left out.
        """
        dtypes = unet.conv_in
        values = cls._beside(unet, config)
        model = cls.from_config(values, dtype=dtypes.dtype, param_dtype=dtypes.kernel.dtype)
        own, given = (nnx.to_flat_state(nnx.state(each)) for each in (model, unet))
        given = dict(given)
        nnx.update(model, nnx.from_flat_state([(path, given.get(path, value)) for path, value in own]))
        return model

    @classmethod
    def from_control_lora(
        cls, unet: UNet2DConditionModel, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, source: str
    ) -> Self:
        """Of a Control-LoRA: each parameter is in the tensors, or is W + up @ down of the UNet's W, or is the UNet's.

        config: as of `from_unet`. tensors: by PyTorch's names of layers, with weight, bias, up and down. Raises
        CheckpointError as `from_tensors`, and for what changes no parameter of the UNet.
        """
        base = {name: torch_layout(name, np.asarray(get_value(own))) for name, own in variables(unet).items()}

        def value(name: str) -> np.ndarray:
            stem = name.removesuffix(".weight")
            if name in tensors or not {f"{stem}.up", f"{stem}.down"} & tensors.keys():
                return tensors[name] if name in tensors else base[name]
            up, down = (np.atleast_1d(np.float32(tensors[f"{stem}.{part}"])) for part in ("up", "down"))
            change = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            return np.float32(base[name]) + change.reshape(base[name].shape)

        values, dtype = cls._beside(unet, config), unet.conv_in.dtype
        own = variables(cls.described(cls.config_class.from_dict(values), dtype))
        changed = (re.sub(r"\.(up|down)$", ".weight", name) for name in tensors)
        names = dict.fromkeys([*(name for name in own if name in base), *changed])
        try:
            return cls.from_tensors(values, ((name, value(name)) for name in names), source=source, dtype=dtype)
        except (LookupError, ValueError) as error:
            raise CheckpointError(f"{source}: a Control-LoRA that does not fit this UNet: {error}") from error

    @classmethod
    def _beside(cls, unet: UNet2DConditionModel, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config of that of a UNet, with these fields in place of the UNet's."""
        known = fields.kinds_of(cls.config_class)
        return {name: value for name, value in unet.config.to_dict().items() if name in known} | dict(config)

    def embed_picture(self, picture: Array) -> Array:
        """A picture [B H W 3], RGB in 0..1, of which the latents are -> [B h w C]. It depends on nothing else."""
        is_reversed = self.config.controlnet_conditioning_channel_order == "bgr"
        return self.controlnet_cond_embedding(picture[..., ::-1] if is_reversed else picture)

    def __call__(
        self,
        sample: Array,
        timesteps: Array,
        encoder_hidden_states: Array,
        picture: Array,
        **conditions: Unpack[Added],
    ) -> list[Array]:
        temb = self.embed(sample, timesteps, **conditions)
        return self.residuals(sample, temb, encoder_hidden_states, picture)

    def residuals(self, sample: Array, temb: Array, encoder_hidden_states: Array, picture: Array) -> list[Array]:
        """The same for the embedding [B T] of the timesteps and of what it is conditioned on."""
        skips, x = self.encode(added(self.conv_in(sample), picture), temb, Context(encoder_hidden_states))
        layers = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        residuals = [layer(own) for layer, own in zip(layers, [*skips, x], strict=True)]
        if self.config.global_pool_conditions:
            residuals = [jnp.mean(own, axis=(1, 2), keepdims=True) for own in residuals]
        return residuals
