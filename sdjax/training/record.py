"""Which run a folder is of: its options and its data, so that it is only gone on with as it began."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdjax.checkpoints.folder import write_json
from sdjax.training.data.examples import Example
from sdjax.training.data.store import key_of
from sdjax.training.options import Options

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME, LOCK = "run.json", "run.lock"
CHECKPOINTS, CLASS = BEGUN = "checkpoints", "class"
"""Folders whose content only the same run can use"""
FREE = (
    "data",
    "out",
    "class_data_dir",
    "validation_prompt",
    "validation_image",
    "validation_steps",
    "num_validation_images",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "cache_dir",
    "cache_latents",
)
"""Options that change no step: what the data is, its hash says"""


def of(options: Options, examples: list[Example]) -> dict[str, Any]:
    """What has to stay as it is."""
    own = {name: value for name, value in options.record().items() if name not in FREE}
    if options.lr_scheduler in ("constant", "constant_with_warmup"):
        del own["max_train_steps"]  # more of them change none of the first
    seen = [
        [one.picture.sha256, one.caption, one.repeats, *(part and part.sha256 for part in (one.control, one.mask))]
        for one in examples
    ]
    return {"options": own, "pictures": len(examples), "data": key_of(seen)}


def check(folder: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError where the folder has the beginning of another run, naming what differs."""
    path = folder / NAME
    if not path.is_file() or not any((folder / name).is_dir() and any((folder / name).iterdir()) for name in BEGUN):
        return
    try:
        known = json.loads(path.read_text("utf-8"))
        options = known["options"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: damaged; remove {folder} to begin again") from None
    differ = [name for name, value in wanted["options"].items() if options.get(name) != value]
    parts = [f"{name} {options.get(name)}, not {wanted['options'][name]}" for name in differ]
    if known.get("data") != wanted["data"]:
        parts.append(f"{known.get('pictures')} pictures and captions that are not those of now")
    if parts:
        raise ValueError(
            f"{folder}: is of another run: {'; '.join(parts)}; give another --out, or remove it to begin again"
        )


@contextmanager
def held(folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """Writes it, and keeps other processes from the folder meanwhile, where the system has locks.

    Raises BlockingIOError where one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "wb") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(f"{folder}: another process is training there") from None
        write_json(folder / NAME, record)
        yield
