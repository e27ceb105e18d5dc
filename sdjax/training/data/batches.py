"""The batches of a run: each is a function of the seed and of its number, whatever was before it.

A bucket's pictures come in a new order each time that all have been seen; buckets take turns, as often as they have
pictures. Order, chance and reading ahead are those of `grain`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grain
import jax
import numpy as np

from sdjax.text.tokenizer import CLIPTokenizer
from sdjax.training.data import pixels
from sdjax.training.data.buckets import Crop, Size, crop, nearest
from sdjax.training.data.encoded import Moments, TextStates, View
from sdjax.training.data.examples import Example, total

THREADS, AHEAD = 4, 8
ENDLESS = 2**40  # pictures; what is longer overflows in grain

Batch = Mapping[str, Any]
"""Arrays [B ...] by name, see `Shown`"""


@dataclass(frozen=True)
class Shown:
    """What is shown of an example in a step, each without the batch's axis:

    "moments"       [h w 2C] of the VAE's posterior, float32; or without `moments` "pixels" [H W 3] in -1..1
    "text"          {"hidden": [L D], "pooled": [P]}; or without `texts` "input_ids" {text encoder: int32 [L]}
    "time_ids"      [6] with has_time_ids: `Crop.time_ids`
    "weights"       [] with weights: how much its loss counts
    "mask"          [h w 1] in 0..1 with mask_factor, the VAE's: where it is learnt
    "control_image" [H W 3] in 0..1 of an example that has one
    and what is `beside`
    """

    caption: Callable[[str, np.random.Generator], str]
    """the caption in this step"""
    moments: Moments | None
    texts: TextStates | None
    tokenizers: Mapping[str, CLIPTokenizer]
    """by text encoder"""
    flips: bool = False
    """whether half of the pictures are mirrored"""
    center: bool = False
    """whether crops are in the middle; else anywhere, with `moments` where `fixed_crop` has them"""
    has_time_ids: bool = False
    has_weights: bool = False
    mask_factor: int | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    """what is the same for all examples"""

    def crop(self, example: Example, bucket: Size, chance: np.random.Generator) -> Crop:
        """How an example is cut in this step."""
        fixed = fixed_crop(example, bucket, center=self.center)
        if self.center or self.moments is not None:
            return fixed
        return crop(example.picture.size, bucket, tuple(chance.random(2)))

    def arrays(self, example: Example, bucket: Size, weight: float, chance: np.random.Generator) -> dict[str, Any]:
        """All of it, with the chance of this step."""
        mirrored = bool(chance.integers(2)) if self.flips else False
        view = View(example, self.crop(example, bucket, chance), mirrored)
        caption = self.caption(example.caption, chance)
        found: dict[str, Any] = {**self.beside}
        if self.moments is not None:
            found["moments"] = self.moments.get(view)
        else:
            found["pixels"] = pixels.normalized(view.pixels())
        if self.texts is not None:
            found["text"] = self.texts.get(caption)
        else:
            found["input_ids"] = input_ids(self.tokenizers, caption)
        if self.has_time_ids:
            found["time_ids"] = np.array(view.crop.time_ids(mirrored=mirrored), np.float32)
        if self.has_weights:
            found["weights"] = np.float32(weight)
        if self.mask_factor is not None:
            mask = pixels.cut(pixels.mask_of(example), view.crop, mirrored=mirrored)
            found["mask"] = pixels.mask_of_latents(mask, self.mask_factor)
        if example.control is not None:
            control = pixels.cut(example.control.rgb(), view.crop, mirrored=mirrored)
            found["control_image"] = control.astype(np.float32) / 255
        return found


def input_ids(tokenizers: Mapping[str, CLIPTokenizer], caption: str) -> dict[str, np.ndarray]:
    """{text encoder: int32 [L]}"""
    return {name: own([caption])[0].astype(np.int32) for name, own in tokenizers.items()}


def fixed_crop(example: Example, bucket: Size, *, center: bool) -> Crop:
    """The one crop of an example: in the middle, or where the hash of the picture puts it."""
    where = np.frombuffer(bytes.fromhex(example.picture.sha256)[:8], np.uint32) / 2**32
    return crop(example.picture.size, bucket, (0.5, 0.5) if center else tuple(map(float, where)))


def bucketed(examples: Sequence[Example], sizes: list[Size], least: int = 1) -> dict[Size, list[Example]]:
    """The examples of each bucket that has any, in the order of the buckets.

    Those of a bucket with fewer pictures than `least`, of a batch, are in the nearest that has more: a bucket is
    a program to compile, and a batch of one picture many times teaches little.
    """
    found = _nearest(examples, sizes)
    while len(found) > 1:
        smallest = min(found, key=lambda size: (total(found[size]), size))
        if total(found[smallest]) >= least:
            break
        found = _nearest(examples, [size for size in found if size != smallest])
    return dict(sorted(found.items()))


def _nearest(examples: Sequence[Example], sizes: list[Size]) -> dict[Size, list[Example]]:
    found: dict[Size, list[Example]] = {}
    for example in examples:
        found.setdefault(nearest(example.picture.size, sizes), []).append(example)
    return found


@dataclass(frozen=True)
class Group:
    """Examples of which a batch has so many, each with this weight."""

    examples: Sequence[Example]
    count: int
    weight: float = 1.0


def batches(buckets: Mapping[Size, Sequence[Group]], shown: Shown, seed: int) -> grain.MapDataset:
    """The batches without end, by number: `batches(...)[n]`. Each is of one bucket, of its groups one after the other.

    A bucket has turns in proportion to the pictures of its first group.
    """
    parts, weights = [], []
    for size, groups in buckets.items():
        own = [_batches(group, size, shown, seed, number) for number, group in enumerate(groups)]
        parts.append(own[0] if len(own) == 1 else grain.MapDataset.range(ENDLESS).map(partial(_joined, own)))
        weights.append(total(groups[0].examples))
    return grain.MapDataset.mix(parts, weights)


def _batches(group: Group, size: Size, shown: Shown, seed: int, number: int) -> grain.MapDataset:
    every = [example for example in group.examples for _ in range(example.repeats)]

    def arrays(example: Example, chance: np.random.Generator) -> dict[str, Any]:
        return shown.arrays(example, size, group.weight, chance)

    ordered = grain.MapDataset.source(every).seed(_seed(seed, size, number)).shuffle()
    return ordered.repeat(ENDLESS // len(every)).random_map(arrays).batch(group.count)


def _seed(*parts: Any) -> int:
    """31 bits of a hash: buckets and groups draw apart from each other."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


def _joined(parts: Sequence[grain.MapDataset], number: int) -> Batch:
    """The batches of this number, one after the other."""
    return jax.tree.map(lambda *own: np.concatenate(own), *(part[number] for part in parts))


def from_number(data: grain.MapDataset, first: int) -> Iterator[Batch]:
    """The batches from this number on, read ahead by threads."""
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    return iter(data[first:].to_iter_dataset(options))
