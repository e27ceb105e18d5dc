"""A training run from its options to its result: checked, encoded, stepped, saved."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax.files import creating_folder, replacing
from sdjax.inputs.sizes import picture_size, side_factor
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.text.conditioning import TEXT_TIME
from sdjax.training import log, plot, priors, record, steps, stopping
from sdjax.training.checkpoints import Checkpoints
from sdjax.training.data import buckets, captions, examples, folders, shards, store
from sdjax.training.data.batches import Group, Shown, batches, bucketed, fixed_crop, from_number
from sdjax.training.data.buckets import Size
from sdjax.training.data.encoded import Moments, TextStates, View
from sdjax.training.data.examples import Example
from sdjax.training.options import CONTROLNET, INVERSION, Options
from sdjax.training.samples import Samples
from sdjax.training.steps import Plan, Progress

SMALLEST_MODEL = 64  # pixels: pictures are checked for it before the model's own resolution is known
CHECKPOINTS, LOG, SAMPLES, CURVE, EVENTS = "checkpoints", "log.csv", "samples", "loss.png", "tensorboard"
DTYPES = {None: None, "no": "float32", "bf16": "bfloat16"}
FULLY_RESUMED = 0  # steps of a run that was over


@dataclass(frozen=True)
class Result:
    """What a run made."""

    out: Path
    folder: Path
    """its checkpoints, log, samples and curve"""
    steps: int
    """that this call made; others were there"""
    loss: float
    """the mean of the last tenth of the run"""
    seconds: float


def train(
    method: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    on_progress: Callable[[Progress | str], None] = lambda progress: None,
    **options: Any,
) -> Result:
    """Trains what `method` says (lora, dreambooth, textual-inversion, controlnet, full) on pictures; writes `out`.

    options: those of `Options` that the method has, `max_train_steps=500` and so on; those of the command `sdjax train`
    with underscores. Beside `out` a folder with the ending .training has checkpoints, log and samples; the same call
    goes on with it, bit for bit on one device, whatever ended it before.

    Raises ValueError or OSError, before anything slow begins, for what cannot be trained; NotFiniteError, Stopped and
    NotWrittenError of steps.run.
    """
    given = Options.of(method, data=data, out=out, **options)
    return run(given, on_progress)


def run(options: Options, on_progress: Callable[[Progress | str], None]) -> Result:
    """The run of these options, see `train`."""
    began = time.monotonic()
    shards.require("grain")
    out = Path(options.out)
    _check_out(out)
    folder = out.with_name(f"{out.name.removesuffix('.safetensors')}.training")
    cache = Path(options.cache_dir) if options.cache_dir else store.default_folder()
    found = _examples(options, cache, options.resolution or SMALLEST_MODEL)
    known = record.of(options, found)
    record.check(folder, known)
    on_progress(f"{len(found)} pictures")

    pipe = StableDiffusionPipeline.from_pretrained(
        options.model, DTYPES[options.mixed_precision], prediction_type=options.prediction_type
    )
    pipe.set_progress_bar_config(disable=True)
    resolution = _resolution(options, pipe)
    if options.resolution is None:
        found = _examples(options, cache, resolution)
    record.write(folder, known)

    def report(what: str, done: int, total: int) -> None:
        on_progress(f"{what}: {done} of {total}")

    class_pictures = _class_pictures(options, pipe, folder, resolution, report)
    return _trained(options, pipe, folder, cache, resolution, found, class_pictures, report, on_progress, began)
