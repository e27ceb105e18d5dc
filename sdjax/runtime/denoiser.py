"""The network that denoises: a UNet, and what ControlNets and T2I-Adapters add to it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.models import ControlNetModel, UNet2DConditionModel
from sdjax.models.controlnet_union import Typed
from sdjax.models.unet import DeepFeatures
from sdjax.runtime.network import Graph, Params
from sdjax.sampling.guidance import over
from sdjax.text.conditioning import Condition

OF_UNET = ("timestep_cond", "deep", "channel_share", "pictures", "perturbed", "freeu", "reads_prompt", "class_labels")
"""Conditions that ControlNets do not take"""
OF_DENOISER = ("channel_share", "reads_prompt")
"""Conditions that no network takes"""
FINEST = 0.1  # what the finest residual weighs in guess mode, where that of the middle weighs 1


class Control(NamedTuple):
    """What the ControlNets are given beside what the UNet is, and what T2I-Adapters made of their pictures."""

    pictures: tuple[Array | Typed, ...]
    """for each ControlNet [B h w C], the embedded picture: `ControlNetModel.embed_picture`; those of a Union"""
    is_guess: Array
    """[B] guess mode: whether branches that read the prompt alone are controlled (`reads_prompt`), and residual i of
    0 .. n, the middle's the last, weighs 0.1^(1 - i / n)"""
    features: tuple[list[Array], ...] = ()
    """for each adapter what is added to each of the UNet's levels, [B h w C]: `T2IAdapter.embed_picture`"""


class Denoiser(NamedTuple):
    """The static part of it: graphs."""

    unet: Graph
    controlnets: tuple[Graph, ...]

    def merge(self, params: Sequence[Params], *given: Any) -> "Merged":
        """With the parameters of each graph, the UNet's first. given: control and channels, see `Merged`."""
        unet, *controlnets = (
            graph.merge(own) for graph, own in zip((self.unet, *self.controlnets), params, strict=True)
        )
        return Merged(unet, controlnets, *given)


def composed(networks: Mapping[str, tuple[Graph, Params]]) -> tuple[Denoiser, list[Params]]:
    """The denoiser of a pipeline's networks by component, and its parameters."""
    names = ("unet", *(name for name in networks if name.startswith("controlnet")))
    (unet, *controlnets), params = zip(*(networks[name] for name in names), strict=True)
    return Denoiser(unet, tuple(controlnets)), list(params)


class Merged(NamedTuple):
    """A denoiser with its parameters, and with what is the same in all rows and branches."""

    unet: UNet2DConditionModel
    controlnets: Sequence[ControlNetModel]
    control: Control | None
    channels: Array | None
    """[B h w D] what the UNet takes beside x"""

    def predict(self, weights: Array | None, x: Array, t: Array, condition: Condition) -> Array:
        """The UNet's prediction [k B h w C] for x [B h w C]. weights: of the K pictures of ControlNets and adapters in
        this row, [B K]."""
        added = {} if "deep" in condition else self._added(weights, x, t, condition)
        return self.unet(*self._with_channels(x, t, condition), **added, **_of_unet(condition))

    def deep_features(self, weights: Array | None, x: Array, t: Array, condition: Condition) -> DeepFeatures:
        """What `UNet2DConditionModel.deep_features` gives; arguments as of `predict`."""
        sample, added = self._with_channels(x, t, condition), self._added(weights, x, t, condition)
        return self.unet.deep_features(*sample, **added, **_of_unet(condition))

    def _with_channels(self, x: Array, t: Array, condition: Condition) -> tuple[Array, Array]:
        """x and the channels beside it, and t; once for all branches, unless each has a share of the channels."""
        if self.channels is None:
            return x, t
        channels = self.channels
        if (share := condition.get("channel_share")) is not None:
            x, t, channels = (jnp.concatenate([own] * (len(share) // len(own))) for own in (x, t, channels))
            channels = over(share, channels) * channels
        return jnp.concatenate([x, channels], axis=-1), t

    def _added(self, weights: Array | None, x: Array, t: Array, condition: Condition) -> dict[str, list[Array]]:
        """The UNet's `residuals` and `features`."""
        if self.control is None:
            return {}
        shown = sum(map(_count, self.control.pictures))
        residuals = self._residuals(weights[:, :shown], x, t, condition)
        return {"residuals": residuals, "features": self._features(weights[:, shown:])}

    def _features(self, weights: Array) -> list[Array]:
        """The sum of those of all adapters, each times its weight."""
        each = zip(self.control.features, weights.T, strict=True)
        return _summed([[(over(weight, own) * own).astype(own.dtype) for own in features] for features, weight in each])

    def _residuals(self, weights: Array, x: Array, t: Array, condition: Condition) -> list[Array]:
        """The sum of those of all ControlNets. One that weighs nothing in any image is not computed, unless it is shown
        several pictures: then the weights are those of the pictures."""
        if not self.controlnets:
            return []
        reads_prompt = condition["reads_prompt"] > 0
        condition = {name: value for name, value in condition.items() if name not in OF_UNET}
        is_off = jnp.tile(self.control.is_guess, len(reads_prompt) // len(x)) & ~reads_prompt
        found, first = [], 0
        for network, shown in zip(self.controlnets, self.control.pictures, strict=True):
            own = weights[:, first : first + _count(shown)]
            run = partial(_weighted, network, x, t, condition, shown, own, self.control.is_guess, is_off)
            is_needed = (own != 0).any() | (_count(shown) > 1)
            found.append(jax.lax.cond(is_needed, run, partial(_zeros, jax.eval_shape(run))))
            first += _count(shown)
        return _summed(found)


def _count(shown: Array | Typed) -> int:
    """Of pictures."""
    return len(shown.pictures) if isinstance(shown, Typed) else 1


def _summed(found: list[list[Array]]) -> list[Array]:
    """The sums of the first arrays, of the second ones, and so on."""
    return [sum(own[1:], start=own[0]) for own in zip(*found, strict=True)]


def _of_unet(condition: Condition) -> Condition:
    return {name: value for name, value in condition.items() if name not in OF_DENOISER}


def _weighted(
    network: ControlNetModel,
    x: Array,
    t: Array,
    condition: Condition,
    shown: Array | Typed,
    weights: Array,
    is_guess: Array,
    is_off: Array,
) -> list[Array]:
    """The residuals of a ControlNet, [k B h w C] each, times its weight [B 1], or 0 where it is off [k B].

    Of one that is shown P pictures the weights [B P] are the scales of these in its sight, and it weighs 1.
    """
    if network.config.addition_embed_type is None:  # some of SDXL read the text states alone
        condition = {"encoder_hidden_states": condition["encoder_hidden_states"]}
    picture, weight = shown, weights[:, 0]
    if isinstance(shown, Typed):
        one, is_alone = jnp.ones_like(weights), _count(shown) == 1
        picture, condition = network.fused(*shown, one if is_alone else weights), condition | {"modes": shown.modes}
        weight = weight if is_alone else one[:, 0]
    residuals = network(x, t, picture=picture, **condition)
    branches = len(is_off) // len(x)
    is_guess = jnp.tile(is_guess, branches)
    weight = jnp.where(is_off, 0, jnp.tile(weight, branches))
    made, last = [], len(residuals) - 1
    for i, residual in enumerate(residuals):
        share = 1 if network.config.global_pool_conditions else jnp.where(is_guess, FINEST ** (1 - i / last), 1)
        residual = jnp.tile(residual, (branches * len(x) // len(residual), 1, 1, 1))
        made.append((over(share * weight, residual) * residual).astype(residual.dtype))
    return made


def _zeros(shapes: list[jax.ShapeDtypeStruct]) -> list[Array]:
    return [jnp.zeros(own.shape, own.dtype) for own in shapes]
