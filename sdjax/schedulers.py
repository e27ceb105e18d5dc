"""The schedulers of a folder: that of the sampler, and those whose noise is on what a UNet is shown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax import sampling
from sdjax.checkpoints import folder, outdated
from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import checked
from sdjax.sampling import Scheduler
from sdjax.sampling.classes import CLASSES

NOISING = ("low_res_scheduler", "image_noising_scheduler")
"""Of a picture that the x4 upscaler makes larger, and of the embedding of a picture that unCLIP varies"""
FILE = "scheduler_config.json"


def read(
    path: Path, kind: str, index: Mapping[str, Any], stated: Mapping[str, Any], name: str = "scheduler"
) -> tuple[Scheduler, list[str]]:
    """The scheduler with options that the caller states, and what was corrected in its config.

    kind: the class of the pipeline. Raises CheckpointError that names the file for what is not supported.
    """
    file = path / name / FILE
    config = folder.read_json(file)
    try:
        defaulted = (
            checked("_use_default_values", config.pop("_use_default_values", None), tuple[str, ...] | None) or ()
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    config = {key: value for key, value in config.items() if key not in defaulted}
    class_name = folder.indexed(path, index, name) or str(config.get("_class_name")).removeprefix("Flax")
    whole = {**CLASSES[class_name].options, **config} if class_name in CLASSES else config
    corrections = outdated.scheduler(kind, whole)
    try:
        scheduler = sampling.from_config(config | {"_class_name": class_name} | corrections | stated)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return scheduler, outdated.changes(whole, corrections)


def read_noising(path: Path, kind: str, index: Mapping[str, Any]) -> dict[str, Scheduler]:
    """Those of NOISING that the index lists, by component. Raises CheckpointError as `read`."""
    listed = [name for name in NOISING if folder.indexed(path, index, name)]
    return {name: read(path, kind, index, {}, name)[0] for name in listed}


def write(path: Path, schedulers: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Writes configs by component into the folder, and returns their entries in model_index.json."""
    for name, config in schedulers.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        folder.write_json(path / name / FILE, dict(config))
    return {name: ["diffusers", config["_class_name"]] for name, config in schedulers.items()}
