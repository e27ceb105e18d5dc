"""A training run from its options to its result: checked, encoded, stepped, saved."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from sdjax import files
from sdjax.pictures import picture
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.training import dataset, log, plot, record, steps, stopping, trainable
from sdjax.training.checkpoints import Checkpoints
from sdjax.training.data import examples, shards, store
from sdjax.training.dataset import Prepared
from sdjax.training.log import Log
from sdjax.training.options import CONTROLNET, FILE, Options
from sdjax.training.report import Report
from sdjax.training.samples import DISTILLED, USUAL, Samples
from sdjax.training.step import TrainState
from sdjax.training.steps import Plan
from sdjax.training.trained import Trained
from sdjax.training.trainer import Trainer, training_mesh

ENDING = ".training"
LOG, SAMPLES, CURVE, EVENTS = "log.csv", "samples", "loss.png", "tensorboard"
DTYPES = {None: None, "no": "float32", "bf16": "bfloat16"}
SMALLEST = 64  # the resolution for which pictures are checked before the model's own is known
BEGIN = 2**31  # what is folded into the key for the first values; steps fold in their numbers


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
    on_progress: Report = lambda progress: None,
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


def run(options: Options, on_progress: Report = lambda progress: None) -> Result:
    """The run of these options, see `train`."""
    began = time.monotonic()
    shards.require("grain")
    if options.report_to is not None:
        shards.require("tensorboardX", extra="tensorboard")
    out = Path(options.out)
    _check_out(out)
    folder = out.with_name(f"{out.name.removesuffix(FILE)}{ENDING}")
    cache = Path(options.cache_dir) if options.cache_dir else store.default_folder()
    for path in options.validation_image:
        picture.read("validation_image", path)
    found = dataset.read(options, cache, options.resolution or SMALLEST)
    known = record.of(options, found)
    record.check(folder, known)
    on_progress(f"{len(found)} pictures, {examples.total(found)} with repeats")

    pipe = StableDiffusionPipeline.from_pretrained(
        options.model, DTYPES[options.mixed_precision], prediction_type=options.prediction_type
    )
    pipe.set_progress_bar_config(disable=True)
    resolution = dataset.resolution(options, pipe)
    examples.check_sizes(found, dataset.least_side(resolution), options.data)
    key = jax.random.fold_in(jax.random.key(np.uint32(options.seed % 2**32)), options.seed >> 32)
    trained = trainable.begin(options, pipe, jax.random.fold_in(key, BEGIN))
    trainer = trainable.trainer(options, pipe, trained, training_mesh(fsdp=options.fsdp))
    with record.held(folder, known):
        shown = dataset.prepare(options, pipe, folder, cache, resolution, found, trainer.mesh.size, on_progress)
        pipe.leave_devices()  # to training
        state, made = _stepped(options, pipe, trainer, shown, key, folder, on_progress)
        losses = _curve(folder, out.name)
        _save(options, trained, _result(state), out, losses)
    return Result(out, folder, made, _mean(losses), time.monotonic() - began)


def _stepped(
    options: Options,
    pipe: StableDiffusionPipeline,
    trainer: Trainer,
    shown: Prepared,
    key: Array,
    folder: Path,
    on_progress: Report,
) -> tuple[TrainState, int]:
    """The state after all steps, and how many of them were made here."""
    checkpoints = Checkpoints(folder / record.CHECKPOINTS, options.checkpoints_total_limit)
    how = DISTILLED if options.lcm else USUAL
    drawn = options.validation_prompt, options.num_validation_images, options.validation_image
    samples = Samples(folder / SAMPLES, *drawn, how)
    try:
        state, first = steps.restored(checkpoints, trainer.state(), options.resume_from_checkpoint)
        checkpoints.check_room(state)
        samples.drop_after(first)
        on_progress(f"from step {first} of {options.max_train_steps}; the first of each size is compiled")
        events = folder / EVENTS if options.report_to else None
        with Log(folder / LOG, first, events) as kept, stopping.requested() as stop:

            def validate(step: int, state: TrainState) -> None:
                trainer.trained.install(_result(state))
                kept.write_picture(step, SAMPLES, samples.draw(step, pipe))
                pipe.leave_devices()

            plan = Plan(
                options.max_train_steps,
                options.checkpointing_steps,
                validate if options.validation_prompt else None,
                options.validation_steps,
                on_progress,
            )
            if first and plan.validates(first) and not samples.has(first):  # it ended before it could
                validate(first, state)
            state = steps.run(trainer, state, first, shown.from_number, key, plan, checkpoints, kept, stop)
    finally:
        checkpoints.close()
    return state, max(0, options.max_train_steps - first)


def _check_out(out: Path) -> None:
    """Raises FileExistsError, FileNotFoundError or PermissionError for a result that could not be written."""
    if os.path.lexists(out):
        raise FileExistsError(f"out: {out} exists already; choose another name, or remove it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"out: the folder {out.parent} cannot be written to")
    files.sweep(out.parent)


def _result(state: TrainState) -> Any:
    """What is saved, and what samples are drawn with: the averages where they are kept."""
    return state.params if state.ema is None else state.ema


def _curve(folder: Path, title: str) -> list[float]:
    """Draws the loss of the whole run; the loss of each step."""
    rows = log.read(folder / LOG)
    losses = [row[steps.LOSS] for row in rows]
    if losses:
        with files.replacing(folder / CURVE) as temporary:
            plot.curve([row[log.STEP] for row in rows], losses, f"loss of {title}").save(temporary, "png")
    return losses


def _mean(losses: list[float]) -> float:
    """Of the last tenth."""
    return float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else float("nan")


def _save(options: Options, trained: Trained, tree: Any, out: Path, losses: list[float]) -> None:
    """Writes the result, whole or not at all."""
    said: dict[str, Any] = {}
    if options.is_low_rank:
        said = {"format": options.format, "metadata": _metadata(options, losses)}
    elif options.method != CONTROLNET and not options.makes_file:
        said = {"zero_terminal_snr": options.rescale_betas_zero_snr}
    if options.makes_file:
        trained.save(out, tree, **said)
        return
    with files.creating_folder(out) as temporary:
        trained.save(temporary, tree, **said)


def _metadata(options: Options, losses: list[float]) -> dict[str, Any]:
    """What the header of a LoRA says of its run, in kohya's words."""
    return {
        "ss_learning_rate": options.rate,
        "ss_lr_scheduler": options.lr_scheduler,
        "ss_lr_warmup_steps": options.lr_warmup_steps,
        "ss_max_train_steps": options.max_train_steps,
        "ss_steps": options.max_train_steps,
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_gradient_accumulation_steps": options.gradient_accumulation_steps,
        "ss_gradient_checkpointing": options.gradient_checkpointing,
        "ss_optimizer": options.optimizer,
        "ss_min_snr_gamma": options.snr_gamma,
        "ss_noise_offset": options.noise_offset,
        "ss_enable_bucket": options.enable_bucket,
        "ss_random_crop": not options.center_crop,
        "ss_flip_aug": options.random_flip,
        "ss_shuffle_caption": options.shuffle_caption,
        "ss_keep_tokens": options.keep_tokens,
        "ss_caption_dropout_rate": options.proportion_empty_prompts,
        "ss_seed": options.seed,
        "ss_output_name": Path(options.out).name.removesuffix(FILE),
        "ss_loss": _mean(losses),
    }
