"""The data of a run, as its options have it: read and checked, encoded, as batches."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.inputs.sizes import picture_size, side_factor
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.text.conditioning import TEXT_TIME
from sdjax.training import priors
from sdjax.training.data import buckets, captions, examples, folders, shards
from sdjax.training.data.batches import Group, Shown, batches, bucketed, fixed_crop, from_number, input_ids
from sdjax.training.data.buckets import Size
from sdjax.training.data.encoded import Moments, TextStates, View
from sdjax.training.data.examples import MOST_ENLARGED, Example
from sdjax.training.data.known import Known
from sdjax.training.data.store import Store, key_of
from sdjax.training.distillation import UNCONDITIONAL
from sdjax.training.options import CONTROLNET, INVERSION, Options
from sdjax.training.record import CLASS

CHECKED = "checked"
"""The folder of the cache for what is known of the pictures of a data set"""

Buckets = dict[Size, list[Group]]


def least_side(resolution: int) -> int:
    """Pixels that the shorter side of a picture needs."""
    return max(1, resolution // MOST_ENLARGED)


def read(options: Options, cache: Path, resolution: int) -> list[Example]:
    """The pictures that are trained on, all of them checked. Raises DataError."""
    caption = "" if options.method == INVERSION else options.instance_prompt
    folder = shards.local(options.data, cache)
    found = folders.read(folder)
    if options.method != CONTROLNET:
        found = [replace(one, control=None) for one in found]
    if not options.masked_loss:
        found = [replace(one, mask=None) for one in found]
    return examples.checked(
        found,
        where=options.data,
        known=Known(cache / CHECKED / f"{key_of(str(folder.absolute()))}.json"),
        caption=caption,
        least=least_side(resolution),
        paired=options.method == CONTROLNET,
    )


def resolution(options: Options, pipe: StableDiffusionPipeline) -> int:
    """The side of a square picture, in pixels. Raises ValueError for less than the model takes."""
    multiple = side_factor(pipe)
    own = options.resolution or min(picture_size(pipe))
    if own < multiple:
        raise ValueError(f"resolution: {own} is less than {multiple}, the least of this model")
    return own


@dataclass(frozen=True)
class Prepared:
    """What a run is shown."""

    buckets: Buckets
    shown: Shown
    seed: int

    def from_number(self, first: int) -> Iterator[Any]:
        """The batches from this number on."""
        return from_number(batches(self.buckets, self.shown, self.seed), first)


def prepare(
    options: Options,
    pipe: StableDiffusionPipeline,
    folder: Path,
    cache: Path,
    resolution: int,
    found: Sequence[Example],
    devices: int,
    on_progress: Callable[[str], None],
) -> Prepared:
    """Encodes what is encoded once, after class pictures are made where a DreamBooth has any.

    folder: of the run. devices: over how many a batch is split.
    """

    def report(what: str, done: int, total: int) -> None:
        on_progress(f"{what}: {done} of {total}")

    _warn_of_cut(pipe, found)
    sizes = _sizes(options, pipe, resolution)
    prior = _class_examples(options, pipe, folder, resolution, report)
    grouped = _grouped(options, found, prior, sizes, devices)
    moments = texts = None
    if options.cache_latents:
        moments = Moments(pipe, Store(cache / "pictures"))
        moments.prepare(_views(options, grouped), report)
    if options.caches_texts:
        texts = TextStates(pipe, Store(cache / "texts"))
        empty = [""] if options.proportion_empty_prompts or options.lcm else []
        texts.prepare([*(example.caption for example in (*found, *prior)), *empty], report)
    shown = Shown(
        _caption(options),
        moments,
        texts,
        pipe.text_tokenizers,
        flips=options.random_flip,
        center=options.center_crop,
        has_time_ids=pipe.unet.config.addition_embed_type == TEXT_TIME,
        has_weights=bool(prior),
        mask_factor=pipe.vae.config.factor if options.masked_loss else None,
        beside=_unconditional(pipe, texts) if options.lcm else {},
    )
    return Prepared(grouped, shown, options.seed)


def _unconditional(pipe: StableDiffusionPipeline, texts: TextStates | None) -> dict[str, Any]:
    """What a distilled model is shown as no caption: an empty one, for SDXL zeros."""
    if texts is None:
        return {f"{UNCONDITIONAL}input_ids": input_ids(pipe.text_tokenizers, "")}
    empty = texts.get("")
    is_zero = pipe.unet.config.addition_embed_type == TEXT_TIME
    return {f"{UNCONDITIONAL}text": {name: value * (not is_zero) for name, value in empty.items()}}


def _warn_of_cut(pipe: StableDiffusionPipeline, found: Sequence[Example]) -> None:
    """Warns of captions that text encoders do not read to their end."""
    tokenizers = pipe.text_tokenizers.values()
    cut = [one for one in found if any(own.truncated(one.caption) for own in tokenizers)]
    if cut:
        most = min(own.model_max_length for own in tokenizers)
        warnings.warn(
            f"{len(cut)} of {len(found)} captions are cut at {most} tokens, the first of {cut[0].picture}", stacklevel=2
        )


def _sizes(options: Options, pipe: StableDiffusionPipeline, resolution: int) -> list[Size]:
    multiple = side_factor(pipe)
    if options.enable_bucket:
        return buckets.sizes(resolution, buckets.step_of(resolution, multiple))
    side = resolution // multiple * multiple
    return [(side, side)]


def _class_examples(
    options: Options,
    pipe: StableDiffusionPipeline,
    folder: Path,
    resolution: int,
    report: Callable[[str, int, int], None],
) -> list[Example]:
    """The pictures of a DreamBooth's class, those that lack made by the model as it is."""
    if options.class_prompt is None:
        return []
    own = Path(options.class_data_dir) if options.class_data_dir else folder / CLASS
    side = resolution // side_factor(pipe) * side_factor(pipe)
    priors.make(pipe, own, options.class_prompt, options.num_class_images, (side, side), report)
    found = folders.read(own)[: options.num_class_images]
    return examples.checked(found, where=str(own), caption=options.class_prompt, least=least_side(resolution))


def _grouped(
    options: Options, found: Sequence[Example], prior: Sequence[Example], sizes: list[Size], devices: int
) -> Buckets:
    """The groups of each bucket. A DreamBooth's loss is mean(own) + prior_loss_weight * mean(class's), as much as a
    mean over both with twice these weights; in each bucket all pictures of the class are cut to its size."""
    count = options.train_batch_size * options.gradient_accumulation_steps * devices
    by_size = bucketed(found, sizes, count)
    if not prior:
        return {size: [Group(own, count)] for size, own in by_size.items()}
    weight = 2 * options.prior_loss_weight
    return {size: [Group(own, count, 2.0), Group(prior, count, weight)] for size, own in by_size.items()}


def _views(options: Options, grouped: Buckets) -> list[View]:
    """Each way in which a picture is seen."""
    mirrored = (False, True) if options.random_flip else (False,)
    return [
        View(example, fixed_crop(example, size, center=options.center_crop), way)
        for size, groups in grouped.items()
        for group in groups
        for example in group.examples
        for way in mirrored
    ]


def _caption(options: Options) -> Callable[[str, np.random.Generator], str]:
    if options.method == INVERSION:
        templates = captions.TEMPLATES[options.learnable_property]
        return lambda _, chance: captions.sentence(templates, options.placeholder_token, chance)
    return partial(
        _seen, shuffle=options.shuffle_caption, keep=options.keep_tokens, empty=options.proportion_empty_prompts
    )


def _seen(caption: str, chance: np.random.Generator, **how: Any) -> str:
    return captions.seen(caption, chance, **how)
