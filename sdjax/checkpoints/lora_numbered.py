"""LoRAs whose layers are numbered, as cloneofsimo/lora, the first for Stable Diffusion, wrote them.

safetensors: unet:0:up, unet:0:down, text_encoder:0:up, …
.pt:         a list of up, down, up, down, …: one file for the UNet, one for the text encoder

The numbers count the layers of some kinds in the order in which PyTorch diffusers registers them. Which kinds, and
which order, is what the shapes fit: the header names the kinds, but lists have none, and the order has changed.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from sdjax.checkpoints.lora_keys import Modules
from sdjax.checkpoints.lora_kinds import Misfit, Shape

KEY = re.compile(r"(?:(?P<component>\w+):)?(?P<number>\d+):(?P<part>up|down)")
KINDS = {
    "unet": (r"\.attn[12]\.", r"\.ff\.net\.0\.", r"\.resnets\.\d+\.(conv|time_emb_proj)"),
    "text_encoder": (r"\.self_attn\.",),
}
"""Whose weights were changed together: CrossAttention, GEGLU, ResnetBlock2D; CLIPAttention"""
ORDERS = tuple(
    (
        *("down_blocks", "up_blocks", "mid_block", "attentions", "resnets", *transformer),
        *("to_q", "to_k", "to_v", "to_out", "conv1", "time_emb_proj", "conv2", "conv_shortcut"),
        *("k_proj", "v_proj", "q_proj", "out_proj"),
    )
    for transformer in (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))
)
"""Of the modules that a module has; until diffusers 0.15 and after it"""


def named(tensors: list[np.ndarray]) -> dict[str, np.ndarray]:
    """A list of up, down, … with the keys of a file that does not name its component."""
    return {f"{i // 2}:{('up', 'down')[i % 2]}": tensor for i, tensor in enumerate(tensors)}


def is_numbered(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether any key is of this spelling."""
    return any(KEY.fullmatch(key) for key in tensors)


def modules(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Mapping[str, Shape]]) -> tuple[Modules, list[str]]:
    """The modules of a file, by component and path, and the keys that are no part of one.

    Raises Misfit where no kinds in no order have the shapes of the file.
    """
    numbered: dict[str | None, dict[int, dict[str, str]]] = {}
    strangers = []
    for key in tensors:
        if match := KEY.fullmatch(key):
            own = numbered.setdefault(match["component"], {})
            own.setdefault(int(match["number"]), {})[match["part"]] = key
        else:
            strangers.append(key)
    found: Modules = {}
    for component, own in numbered.items():
        pairs = [own[number] for number in sorted(own)]
        sizes = [_sizes(tensors, pair) for pair in pairs]
        for candidate, names in _candidates(component, shapes):
            expected = [shapes[candidate][name] for name in names]
            if sizes == [(shape[0], math.prod(shape[1:])) for shape in expected]:
                layers = (f"{candidate}.{name.removesuffix('.weight')}" for name in names)
                found |= zip(layers, pairs, strict=True)
                break
        else:
            raise Misfit(f"numbered layers that fit those of the {component or 'model'} in no order")
    return found, strangers


def _sizes(tensors: Mapping[str, np.ndarray], pair: Mapping[str, str]) -> tuple[int, int] | None:
    """(outputs, inputs with the window) of a layer; None for half of one."""
    if pair.keys() != {"up", "down"} or any(tensors[key].ndim < 2 for key in pair.values()):
        return None
    return len(tensors[pair["up"]]), math.prod(tensors[pair["down"]].shape[1:])


def _candidates(component: str | None, shapes: Mapping[str, Mapping[str, Shape]]) -> Iterator[tuple[str, list[str]]]:
    """(component, names of weights in order) for all kinds and orders."""
    for name in shapes if component is None else shapes.keys() & {component}:
        kinds = KINDS.get(name, ())
        for count, order in itertools.product(range(len(kinds), 0, -1), ORDERS):
            for chosen in itertools.combinations(kinds, count):
                pattern = re.compile("|".join(chosen))
                weights = [key for key in shapes[name] if key.endswith(".weight") and pattern.search(key)]
                yield name, sorted(weights, key=lambda key: _registered(key, order))


def _registered(name: str, order: tuple[str, ...]) -> list[int]:
    """Where a parameter comes among all."""
    return [int(part) if part.isdigit() else order.index(part) if part in order else -1 for part in name.split(".")]
