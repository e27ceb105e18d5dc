"""Whether the networks of a pipeline fit together, by their configs."""

import os
from collections.abc import Mapping

from sdjax.checkpoints.errors import CheckpointError
from sdjax.models.autoencoder_tiny import AutoencoderTinyConfig
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.clip_vision import CLIPVisionModelConfig
from sdjax.models.controlnet import ControlNetConfig
from sdjax.models.image_normalizer import ImageNormalizerConfig
from sdjax.models.latent_upscaler import POOLED
from sdjax.models.t2i_adapter import T2IAdapterConfig
from sdjax.models.unet import UNet2DConditionConfig
from sdjax.models.unet_blocks import at
from sdjax.models.vae import AutoencoderKLConfig


def check(
    source: str | os.PathLike,
    unet: UNet2DConditionConfig,
    vae: AutoencoderKLConfig | AutoencoderTinyConfig,
    texts: Mapping[str, CLIPTextConfig],
    controlnets: Mapping[str, ControlNetConfig],
    adapters: Mapping[str, T2IAdapterConfig],
    normalizer: ImageNormalizerConfig | None = None,
    encoder: CLIPVisionModelConfig | None = None,
) -> None:
    """Raises CheckpointError, which begins with source, unless they do. Of which there may be several, by component."""
    if unet.addition_embed_type == POOLED and (others := [*controlnets, *adapters]):
        raise CheckpointError(f"{source}: {others[0]}: not with the x2 latent upscaler")
    context = at(unet.cross_attention_dim, 0)
    sizes = {
        "the UNet's out_channels": (unet.predicted_channels, "the VAE's latent_channels", vae.latent_channels),
        "the VAE's out_channels": (vae.out_channels, "those of a picture", 3),
    }
    if texts:
        width = sum(text.hidden_size for text in texts.values())
        sizes["the UNet's cross_attention_dim"] = (context, "the text encoders' width", width)
        if unet.addition_embed_type == POOLED:
            sizes["the UNet's pooled_channels"] = (unet.pooled_channels, "the text encoder's width", width)
    for name, own in controlnets.items():
        layers = [[at(config.layers_per_block, level) for level in config.levels] for config in (own, unet)]
        sizes[f"the block_out_channels of {name}"] = (own.block_out_channels, "the UNet's", unet.block_out_channels)
        sizes[f"the layers of {name}"] = (layers[0], "the UNet's", layers[1])
        if (kind := own.addition_embed_type) is not None:  # some of SDXL read the text states alone
            sizes[f"the addition_embed_type of {name}"] = (kind, "the UNet's", unet.addition_embed_type)
        sizes[f"the cross_attention_dim of {name}"] = (at(own.cross_attention_dim, 0), "the UNet's", context)
        sizes[f"the in_channels of {name}"] = (own.in_channels, "the VAE's latent_channels", vae.latent_channels)
        sizes[f"the factor of {name}"] = (own.factor, "the VAE's", vae.factor)
    if normalizer is not None:
        width, given = normalizer.embedding_dim, unet.projection_class_embeddings_input_dim
        sizes["the UNet's projection_class_embeddings_input_dim"] = (given, "twice the image_normalizer's", 2 * width)
        if encoder is not None:
            sizes["the image_encoder's projection_dim"] = (encoder.projection_dim, "the image_normalizer's", width)
    taken = unet.features(vae.factor) if adapters else ()
    for name, own in adapters.items():
        first, *_ = adapters.values()
        sizes[f"the channels and scales of {name}"] = (
            own.features[: len(taken)],
            "those of the UNet's levels",
            taken,
        )
        sizes[f"all the channels and scales of {name}"] = (own.features, "those of the first adapter", first.features)
    for name, (ours, other, theirs) in sizes.items():
        if ours != theirs:
            raise CheckpointError(f"{source}: {name}, {ours}, are not {other}, {theirs}: not of one checkpoint")
