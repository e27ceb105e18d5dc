"""A job made ready: read, its model loaded, checked, and cut into work. Nothing is written."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sdjax.batch import job, memory
from sdjax.batch.fingerprint import fingerprint
from sdjax.batch.job import Items
from sdjax.batch.output import Output, open_target
from sdjax.batch.plan import Plan, plan
from sdjax.batch.record import Record
from sdjax.checkpoints import textual_inversion
from sdjax.components import MODELS, SEVERAL
from sdjax.engine import prompt_chunk_counter, row_counter
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request.values import MAX_PICTURES
from sdjax.runtime import bounds
from sdjax.runtime.bounds import Load
from sdjax.text.prompts import unused_words

CHUNK_SIZES = {"files": 64, "webdataset": 512}
"""The most pictures that are written together, and that an interruption costs"""

UNRECORDED = ("dtype", "scheduler", "mesh")
"""Options of loading that do not go into the settings of a picture, or are there already"""

JobSource = str | os.PathLike | Iterable[Mapping[str, Any]] | Items
Model = str | os.PathLike | StableDiffusionPipeline | None
Embeddings = Mapping[str | os.PathLike, str | None] | Sequence[str | os.PathLike]
"""Textual inversions, and the words for them; None, and for a sequence: the word in the file, else its name"""


@dataclass(frozen=True)
class Prepared:
    """A job that can start."""

    items: Items
    pipe: StableDiffusionPipeline
    output: Output
    shared: Mapping[str, Any]
    """settings of all its pictures"""


def prepare(
    source: JobSource,
    out: str | os.PathLike,
    *,
    model: Model = None,
    format: str = "files",
    image_format: str = "png",
    embeddings: Embeddings = (),
    ip_adapters: Sequence[str | os.PathLike] = (),
    image_encoder_folder: str = "image_encoder",
    **options: Any,
) -> Prepared:
    """Reads a job, loads its model, and checks the one against the other; the arguments are those of `run`."""
    given = words_of(embeddings)
    items = source if isinstance(source, Items) else job.read(source, words=given.values())
    target = open_target(out)
    Output(target, format, image_format, "")  # raises for what is not right before the model is loaded
    pipe = model
    if not isinstance(model, StableDiffusionPipeline):
        pipe = StableDiffusionPipeline.from_pretrained(model, **options)
    elif options:
        raise ValueError(f"{', '.join(options)}: for loading a model, and this one is a pipeline already")
    words = {path: pipe.load_textual_inversion(path, word) for path, word in given.items()}
    for warning in unused_words(words, items.prompts()):
        warnings.warn(warning, stacklevel=2)
    ip_adapters = [ip_adapters] if isinstance(ip_adapters, str | os.PathLike) else ip_adapters
    if ip_adapters:
        pipe.load_ip_adapter(list(ip_adapters), image_encoder_folder=image_encoder_folder)
    items = job.check(items, pipe)
    shared = {
        "model": type(pipe).__name__ if model is pipe else str(model or "embedded"),
        "dtype": str(pipe.unet.conv_in.kernel.dtype),
        "version": version("sdjax"),
    }
    if words:
        shared["embeddings"] = words
    if ip_adapters:
        shared |= {"ip_adapters": list(map(str, ip_adapters)), "image_encoder_folder": image_encoder_folder}
    for name, value in options.items():
        if value is not None and name not in UNRECORDED:
            listed = value if isinstance(value, list | tuple) else [value]
            is_list = name in {names[0] for names in SEVERAL}
            shared[name] = list(map(str, listed)) if is_list else str(value)
        elif value is None and name in MODELS:
            shared[name] = None  # left out
    return Prepared(items, pipe, Output(target, format, image_format, fingerprint(pipe)), shared)


def words_of(embeddings: Embeddings) -> dict[str, str]:
    """path -> the word for it. Raises CheckpointError for a file that is no textual inversion."""
    given = embeddings if isinstance(embeddings, Mapping) else dict.fromkeys(embeddings)
    return {str(path): textual_inversion.word(path, word) for path, word in given.items()}


def check_batch(batch: int | None) -> None:
    """Raises ValueError for a batch that the pipeline would fill up to a power of two."""
    if batch is not None and (not 1 <= batch <= MAX_PICTURES or batch & (batch - 1)):
        raise ValueError(f"batch must be a power of two, up to {MAX_PICTURES:,}, such as 4 or 8, not {batch}")


def lay_out(
    ready: Prepared, known: Record | None = None, batch: int | None = None, chunk_size: int | None = None
) -> Plan:
    """The plan of a job: with the batch and the chunks of an earlier run, where nothing else is asked for.

    Otherwise the batch is what fits the devices, and no more than they need for the largest group: see
    `memory.per_device_batch`. Raises DoesNotFit for a batch, or a picture, that cannot fit.
    """
    batch = batch or (known.batch if known else None)
    chunk_size = chunk_size or (known.chunk_size if known else CHUNK_SIZES[ready.output.layout])
    form = f"{ready.output.layout} {ready.output.format}"
    rows = row_counter(ready.pipe)
    chunks = prompt_chunk_counter(list(ready.pipe.tokenizers.values()), rows)
    loras = job.lora_digests(ready.items)

    draft = plan(
        ready.items,
        ready.output.fingerprint,
        batch or 1,
        chunk_size,
        format=form,
        prompt_chunks=chunks,
        rows=rows,
        loras=loras,
    )
    length = max((tokenizer.model_max_length for tokenizer in ready.pipe.tokenizers.values()), default=0)
    for group, places in draft.groups.items():
        tokens, size = group.prompt_chunks * length, memory.picture_size(ready.pipe, ready.items[places[0]])
        load = Load(draft.batch, *size, tokens=tokens, tiled=group.vae_tiling)
        bounds.check(ready.pipe.models, ready.pipe.mesh, load)
    if batch:
        return draft
    shapes = {group.shape: ready.items[places[0]] for group, places in draft.groups.items()}
    largest = -(-max(map(len, draft.groups.values())) // ready.pipe.mesh.size)
    batch = memory.per_device_batch(ready.pipe, list(shapes.values()), 2 ** (largest - 1).bit_length())
    return draft.rebatched(batch, chunk_size)
