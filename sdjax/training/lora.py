"""LoRA (arXiv:2106.09685): what is trained beside chosen layers of the UNet and the text encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax import Array

from sdjax.checkpoints import lora_kinds
from sdjax.models import low_rank
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime.network import Graph
from sdjax.training import saving
from sdjax.training.trained import Trained, Tree, copied, described, in_float32, needed, parameters

UNET = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
"""Of the UNet's residual blocks and between its levels"""
INSTALLED = "in training"
"""What the LoRA that is installed is called in its pipeline"""
PART = ".lora."
"""Stands in the names of what is trained of a layer, before down.weight, up.weight and magnitude"""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which layers have a LoRA, and of which rank and alpha: it adds alpha / rank * up(down(x)).

    Attributes:
        rank, alpha: alpha None: the rank.
        targets: ends of the paths of the UNet's layers, whole names, as PEFT's target_modules.
        text_encoder_targets: those of the text encoders; none: these are not trained.
        conv_rank, conv_alpha: of CONVOLUTIONS (LoCon, arXiv:2309.14859); None: these are not trained.
        use_dora: magnitudes are trained too (arXiv:2402.09353).
    """

    rank: int = 4
    alpha: float | None = None
    targets: Sequence[str] = UNET
    text_encoder_targets: Sequence[str] = ()
    conv_rank: int | None = None
    conv_alpha: float | None = None
    use_dora: bool = False

    def layers(self, component: str, module: nnx.Module) -> dict[str, tuple[int, float]]:
        """{path: (rank, alpha)} of the layers of a component. Raises ValueError for a target that none has."""
        is_unet = component == "unet"
        targets = dict.fromkeys(self.targets if is_unet else self.text_encoder_targets, (self.rank, self.alpha))
        if is_unet and self.conv_rank:
            targets |= dict.fromkeys(CONVOLUTIONS, (self.conv_rank, self.conv_alpha))
        paths = low_rank.paths(module)
        found = {}
        for target, (rank, alpha) in targets.items():
            own = [path for path in paths if f".{path}".endswith(f".{target}")]
            if not own and target not in CONVOLUTIONS:
                raise ValueError(f"no layer of the {component} is called {target}")
            found |= dict.fromkeys(own, (rank, rank if alpha is None else alpha))
        return found


def begin(
    pipe: StableDiffusionPipeline,
    lora: Lora,
    key: Array,
    *,
    texts_cached: bool = False,
    pictures_cached: bool = True,
    gradient_checkpointing: bool = False,
) -> Trained:
    """A LoRA of a pipeline's models. The key decides how it begins; at first it changes nothing.

    texts_cached, pictures_cached: whether batches have text states and the VAE's moments, in place of tokens and
    pixels, so that the networks for them are left out. Raises ValueError for what cannot be trained.
    """
    if texts_cached and lora.text_encoder_targets:
        raise ValueError("text encoders are trained: their states cannot be cached")
    graphs, initial, frozen, layers = {}, {}, {}, {}
    for i, name in enumerate(needed(pipe, texts_cached=texts_cached, pictures_cached=pictures_cached)):
        module = copied(getattr(pipe, name), gradient_checkpointing=gradient_checkpointing)
        layers[name] = {} if name == "vae" else lora.layers(name, module)
        low_rank.adapt(module, layers[name], has_magnitude=lora.use_dora, key=jax.random.fold_in(key, i))
        graphs[name], params = Graph(module), parameters(module)
        initial[name] = in_float32({own: value for own, value in params.items() if PART in own})
        frozen[name] = {own: value for own, value in params.items() if PART not in own}
    initial = {name: own for name, own in initial.items() if own}
    if not initial:
        raise ValueError("no layers to train: no targets")
    layers = {name: own for name, own in layers.items() if own}
    save, install = partial(saving.save_lora, base=saving.Base.of(pipe), layers=layers), partial(_install, pipe, layers)
    return Trained(graphs, initial, frozen, **described(pipe), save=save, install=install)


def _install(pipe: StableDiffusionPipeline, layers: Mapping[str, Mapping[str, tuple[int, float]]], tree: Tree) -> None:
    """Gives the pipeline the LoRA, with weight 1, in place of what was installed before."""
    if pipe.loras is not None and INSTALLED in pipe.loras.layers:
        pipe.loras.remove(INSTALLED)
    loras = pipe.adapted_loras()
    changes = {component: {} for component in tree}
    for component, path, parts in saving.by_layer(tree):
        name = f"{path}.weight"
        own = {"down": parts["down.weight"], "up": parts["up.weight"], "alpha": np.float32(layers[component][path][1])}
        if "magnitude" in parts:
            own["lora_magnitude_vector"] = parts["magnitude"]
        shape = loras.shapes[component][name]
        found = lora_kinds.changes(own, {"weight": shape}, lambda rank, own=own: float(own["alpha"]) / rank)
        changes[component][name] = found["weight"]
    loras.add(INSTALLED, changes, 1.0)
