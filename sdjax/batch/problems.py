"""What is wrong with a job, all of it told in one error."""

from collections.abc import Callable
from typing import Any

PROBLEMS_SHOWN = 20


class Problems:
    """Collects what is wrong, and raises it."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, place: int | str | None, problem: str | Exception) -> None:
        """place: the number of a line, or another name; None: the job as a whole. What is said twice counts once."""
        name = f"line {place}" if isinstance(place, int) else place
        self._found[f"{name}: {problem}" if name else str(problem)] = None

    def raise_in(self, name: str) -> None:
        """Raises one ValueError for the first problems, and how many more there are."""
        if self:
            found = list(self._found)
            more = len(found) - PROBLEMS_SHOWN
            shown = found[:PROBLEMS_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
            count = f"{len(found)} problem{'s' * (len(found) > 1)}"
            raise ValueError("\n".join([f"{name}: {count}, nothing was started:", *shown]))


def refusal(attempt: Callable[[], Any]) -> str:
    """What the ValueError says that it raises, or ""."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""
