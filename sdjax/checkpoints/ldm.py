"""Names of the original LDM and SGM repositories (CompVis, Stability AI) and of OpenCLIP, against diffusers' names.

A table maps module paths of diffusers to the original ones, parameter names where a parameter has no counterpart of its
own. A name is translated by its longest prefix in the table; what follows is spelled alike.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

NUMBER = re.compile(r"(?<![^.])[0-9]{1,2}(?=\.)")
Table = Mapping[str, str]
Inverse = Mapping[str, Sequence[str]]

UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_MID_RESNETS = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{f"{half}.{name}": f"{half}.{name}" for half in ("encoder", "decoder") for name in ("conv_in", "conv_out")},
    **{f"{half}.conv_norm_out": f"{half}.norm_out" for half in ("encoder", "decoder")},
    **{f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1" for half in ("encoder", "decoder")},
}
VAE_MID_RESNETS = {
    f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for half in ("encoder", "decoder") for i in range(2)
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{p}_proj.{leaf}": f"attn.in_proj_{leaf}" for p in "qkv" for leaf in ("weight", "bias")},
}


def unet_name(name: str, config: Mapping) -> str:
    """The original name of a parameter or module of a UNet2DConditionModel with this config.

    "down_blocks.1.attentions.0.proj_in.weight" -> "input_blocks.4.1.proj_in.weight" (layers_per_block 2). Raises
    ValueError for a name that such a UNet does not have.
    """
    crosses = tuple("CrossAttn" in kind for kind in config["up_block_types"])
    layers = config["layers_per_block"]
    layers = (layers,) * len(crosses) if isinstance(layers, int) else tuple(layers)
    return _original(name, unet_table(layers, crosses))


def vae_name(name: str, config: Mapping) -> str:
    """The original name of a parameter or module of an AutoencoderKL with this config. Raises ValueError as above."""
    return _original(name, vae_table(len(config["block_out_channels"]), config["layers_per_block"]))


def open_clip_name(name: str, config: Mapping) -> str:
    """The OpenCLIP name of a parameter or module of a CLIPTextModel with this config. Raises ValueError as above.

    q_proj, k_proj and v_proj are the thirds of one in_proj; text_projection is stored transposed.
    """
    return _original(name, open_clip_table(config["num_hidden_layers"]))


@lru_cache
def unet_table(layers: tuple[int, ...], crosses: tuple[bool, ...]) -> Table:
    """layers: of each level on the way down, the finest first. crosses: whether each level on the way up attends."""
    last = len(layers) - 1
    blocks, resnets = dict(UNET), dict(UNET_MID_RESNETS)
    n = 1
    for level, count in enumerate(layers):
        for i in range(count):
            resnets[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{n}.0"
            blocks[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{n}.1"
            n += 1
        if level < last:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for block, (count, cross) in enumerate(zip(reversed(layers), crosses, strict=True)):
        for i in range(count + 1):
            resnets[f"up_blocks.{block}.resnets.{i}"] = f"output_blocks.{n}.0"
            blocks[f"up_blocks.{block}.attentions.{i}"] = f"output_blocks.{n}.1"
            n += 1
        if block < last:
            blocks[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{1 + cross}.conv"
    return {**blocks, **resnets, **_inside(resnets, UNET_RESNET)}


@lru_cache
def vae_table(levels: int, layers: int) -> Table:
    """The decoder's levels are numbered from the coarsest in diffusers, from the finest in the original."""
    blocks, resnets = dict(VAE), dict(VAE_MID_RESNETS)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        blocks[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        blocks[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
        resnets |= {f"{down}.resnets.{i}": f"encoder.down.{level}.block.{i}" for i in range(layers)}
        resnets |= {f"{up}.resnets.{i}": f"decoder.up.{level}.block.{i}" for i in range(layers + 1)}
    attentions = {ours: theirs for ours, theirs in VAE.items() if ".attentions." in ours}
    return {**blocks, **resnets, **_inside(resnets, VAE_RESNET), **_inside(attentions, VAE_ATTENTION)}


@lru_cache
def open_clip_table(layers: int) -> Table:
    """The table of a text encoder with so many layers."""
    blocks = {f"text_model.encoder.layers.{i}": f"transformer.resblocks.{i}" for i in range(layers)}
    return {**OPEN_CLIP, **_inside(blocks, OPEN_CLIP_LAYER)}


def _inside(blocks: Table, parts: Table) -> dict[str, str]:
    return {f"{a}.{part}": f"{b}.{theirs}" for a, b in blocks.items() for part, theirs in parts.items()}


def read_unet_table(names: Collection[str]) -> Table:
    """The table of the UNet whose original names these are."""
    layers = _layers(names)
    firsts = accumulate((1 + count for count in reversed(layers[1:])), initial=0)
    crosses = (f"output_blocks.{n}.1.norm.weight" in names for n in firsts)
    return unet_table(layers, tuple(crosses))


def read_controlnet_table(names: Collection[str]) -> Table:
    """The table of the ControlNet whose original names these are."""
    found, layers = counts(names), _layers(names)
    last = (found["input_hint_block."] - 1) // 2
    hints = ["conv_in", *(f"blocks.{i}" for i in range(last - 1)), "conv_out"]
    own = {f"controlnet_cond_embedding.{name}": f"input_hint_block.{2 * i}" for i, name in enumerate(hints)}
    own |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(found["zero_convs."])}
    return {**unet_table(layers, (False,) * len(layers)), **own, "controlnet_mid_block": "middle_block_out.0"}


def read_adapter_table(names: Collection[str]) -> Table:
    """The table of the T2I-Adapter whose original names these are: of a light one, or of one that has two residual
    blocks a level, which are counted through."""
    blocks = counts(names)["body."]
    if "conv_in.weight" not in names:
        inside = {f"adapter.body.{i}.resnets": f"body.{i}.body" for i in range(blocks)}
        return {f"adapter.body.{i}": f"body.{i}" for i in range(blocks)} | inside
    table = {f"adapter.body.{i // 2}.resnets.{i % 2}": f"body.{i}" for i in range(blocks)}
    table |= {f"adapter.body.{i // 2}.in_conv": f"body.{i}.in_conv" for i in range(0, blocks, 2)}
    return table | {"adapter.conv_in": "conv_in"}


def _layers(names: Collection[str]) -> tuple[int, ...]:
    """Of each level on the way down, from the original names."""
    layers = [0]
    for n in range(1, counts(names)["input_blocks."]):
        if any(f"input_blocks.{n}.0.op.{leaf}" in names for leaf in ("weight", "bias")):
            layers.append(0)
        else:
            layers[-1] += 1
    return tuple(layers)


def read_vae_table(names: Collection[str]) -> Table:
    """The table of the VAE whose original names these are."""
    found = counts(names)
    return vae_table(found["encoder.down."], found["encoder.down.0.block."])


def read_open_clip_table(names: Collection[str]) -> Table:
    """The table of the text encoder whose OpenCLIP names these are."""
    return open_clip_table(counts(names)["transformer.resblocks."])


def inverse(table: Table) -> Inverse:
    """From an original path to all that it stands for in diffusers."""
    inverted: dict[str, list[str]] = {}
    for ours, theirs in table.items():
        inverted.setdefault(theirs, []).append(ours)
    return inverted


def translated(name: str, table: Inverse) -> list[str]:
    """The names of one name; none if it has no prefix in the table."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:n])) in table:
            return [".".join((other, *parts[n:])) for other in table[prefix]]
    return []


def _original(name: str, table: Table) -> str:
    for theirs in translated(name, {ours: [theirs] for ours, theirs in table.items()}):
        return theirs
    raise ValueError(f"{name}: not a name in a model of this config")


def value(name: str, original: str, array: np.ndarray) -> np.ndarray:
    """The tensor of a diffusers name, from the one that the original layout has for it.

    A third of OpenCLIP's fused projections; its text_projection transposed; the VAE's attention as matrices, not
    convolutions of one pixel.
    """
    if ".in_proj_" in original and array.ndim:
        start, size = "qkv".index(name.split(".")[-2][0]), len(array) // 3
        return array[start * size :][:size]
    if original == "text_projection":
        return array.T
    if ".mid.attn_1." in original and array.shape[2:] == (1, 1):
        return array[:, :, 0, 0]
    return array


def counts(names: Iterable[str]) -> Mapping[str, int]:
    """{prefix: how many numbered parts follow it}: 1 + the largest n of names `<prefix>n.…`; 0 for any other prefix.

    Numbers of more than two digits are none, which no model has: so many layers would be looped over.
    """
    found: dict[str, int] = defaultdict(int)
    for name in names:
        for match in NUMBER.finditer(name):
            prefix = name[: match.start()]
            found[prefix] = max(found[prefix], int(match[0]) + 1)
    return found
