"""The record of a job at its target: what makes the pictures there those of this job and of no other."""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Annotated

import jax

from sdjax.batch.output import Output, Target
from sdjax.batch.plan import Plan
from sdjax.fields import Within, checked, encodable, kinds_of

NAME = "job.json"
COMPARED = ("model", "fingerprint", "pictures", "batch", "chunk_size", "layout", "format")
EXPLAINED = {"fingerprint": "another model, or one of an earlier version of sdjax: fingerprint"}
Count = Annotated[int, Within(1, 2**63)]
CHANGES = "give another folder, or the same job again"


@dataclass(frozen=True)
class Record:
    """What a job is, as `job.json` has it."""

    model: str
    """as it was named"""
    fingerprint: str
    """of the model: see `sdjax.batch.fingerprint`"""
    pictures: Count
    batch: Count
    """pictures that a device samples at once"""
    chunk_size: Count
    layout: str
    format: str
    chunks: tuple[str, ...]
    """ids, which depend on all items"""
    made_with: dict[str, str] = field(default_factory=lambda: versions())
    """what may change pictures by rounding"""

    @classmethod
    def of(cls, plan: Plan, output: Output, model: str) -> "Record":
        """The record of a job that is planned."""
        own = {"fingerprint": output.fingerprint, "layout": output.layout, "format": output.format}
        laid = {"batch": plan.batch, "chunk_size": plan.chunk_size, "chunks": tuple(plan.ids)}
        return cls(model=model, pictures=len(plan.items), **own, **laid)

    def write(self, target: Target) -> None:
        """Raises OSError that names the file where it cannot be written."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        target.write(NAME, encodable(text).encode())

    def check(self, known: "Record", url: str) -> None:
        """Raises ValueError that lists how a job that is known at the target differs from this one."""
        there, here = asdict(known), asdict(self)
        differing = [key for key in COMPARED if there[key] != here[key]]
        wrong = [f"{EXPLAINED.get(key, key)} {there[key]!r}, not {here[key]!r}" for key in differing]
        if not wrong and known.chunks != self.chunks:
            other = sum(a != b for a, b in zip(known.chunks, self.chunks, strict=False))
            wrong = [f"other pictures (or LoRA files) in {other} of its {len(known.chunks)} chunks"]
        if wrong:
            raise ValueError(f"{url} has another job: {'; '.join(wrong)}; {CHANGES}")


def versions() -> dict[str, str]:
    """The versions and the kind of device."""
    return {"sdjax": version("sdjax"), "jax": version("jax"), "device": jax.local_devices()[0].device_kind}


def read(target: Target) -> Record | None:
    """The record of the target; None where there is none. Raises ValueError where it is damaged."""
    data = target.read(NAME)
    if data is None:
        return None
    try:
        found = json.loads(data)
        return Record(**{name: checked(name, found.get(name), kind) for name, kind in kinds_of(Record).items()})
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{target.shown(NAME)}: damaged, or of another version of sdjax") from None
