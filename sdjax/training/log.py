"""What is kept of each step: a line in a CSV file, and for TensorBoard."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdjax.files import replacing

STEP = "step"


class Log:
    """Appends the values of steps to a CSV file, which is on the disk after each line; a run that is taken up again
    goes on after the step of its checkpoint.

    first: the step after which it goes on; later lines are cut off. tensorboard: the folder of its events; None: none.
    """

    def __init__(self, path: Path, first: int = 0, tensorboard: Path | None = None):
        self.path, self._first = path, first
        self._writer = None
        if tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=first + 1)

    def __enter__(self) -> Self:
        rows = [row for row in read(self.path) if row[STEP] <= self._first]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            if rows:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        self._file = open(self.path, "a", newline="", encoding="utf-8")
        self._has_header = bool(rows)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's values, by name."""
        row = {STEP: step, **values}
        writer = csv.DictWriter(self._file, list(row))
        if not self._has_header:
            writer.writeheader()
            self._has_header = True
        writer.writerow(row)
        self._file.flush()
        for name, value in values.items() if self._writer is not None else ():
            self._writer.add_scalar(name, value, step)

    def write_picture(self, step: int, name: str, picture: Any) -> None:
        """A PIL picture, for TensorBoard alone."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, numbers as numbers; a last one that is not whole is left out. None: there is no log."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [found for row in rows if (found := _numbers(row)) is not None]


def _numbers(row: Mapping[str, str | None]) -> dict[str, Any] | None:
    try:
        values = {name: float(value) for name, value in row.items()}
    except (TypeError, ValueError):
        return None
    return {**values, STEP: int(values[STEP])} if math.isfinite(values[STEP]) else None
