"""Results as Markdown tables."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

PYTORCH = ("pytorch", "torch.compile")

Cell = dict[str, Any]
"""A stage in one dtype: {"flops": of the products, "sides": {side: {"seconds": [...], "peak": bytes, ...}}}"""

Results = dict[str, dict[str, Cell]]
"""By dtype, then by stage"""


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; floats are shown with three digits."""

    def shown(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(shown, line)) + " |" for line in lines)


def median(cell: Cell, side: str) -> float:
    """The median of the seconds that a side took."""
    return statistics.median(cell["sides"][side]["seconds"])


def times(results: Results) -> Iterator[Sequence[Any]]:
    """A row for each dtype, stage and side."""
    for dtype, stages in results.items():
        best = _matrix_rate(stages)
        for stage, cell in stages.items():
            for side, found in cell["sides"].items():
                seconds, layouts = median(cell, side), sorted(set(found["layouts"].values()) - {"contiguous"})
                share = f"{cell['flops'] / seconds / best:.0%}" if best and cell["flops"] else ""
                spread = f"{min(found['seconds']):.4g}-{max(found['seconds']):.4g}"
                error = "" if found["error"] is None else f"{found['error']:.1e}"
                numbers = f"{seconds:.4g}", spread, f"{found['first']:.4g}", f"{found['peak'] / 1e9:.2f}", error, share
                yield dtype, stage, " ".join([side, *layouts]), *numbers


def _matrix_rate(stages: dict[str, Cell]) -> float | None:
    """The best rate of large matrix products that any side reached, operations a second."""
    if not (cell := stages.get("matmul")) or not cell["flops"]:
        return None
    return cell["flops"] / min(min(found["seconds"]) for found in cell["sides"].values())


def ratios(results: Results, others: Sequence[str]) -> Iterator[Sequence[Any]]:
    """sdjax against PyTorch's best in time and in memory, and against each of the others in time."""
    for dtype, stages in results.items():
        for stage, cell in stages.items():
            theirs = [side for side in PYTORCH if side in cell["sides"]]
            if stage == "matmul" or "sdjax" not in cell["sides"] or not theirs:
                continue
            peak = {side: found["peak"] for side, found in cell["sides"].items()}
            time = {side: median(cell, side) / median(cell, "sdjax") for side in cell["sides"]}
            memory = peak["sdjax"] / min(peak[side] for side in theirs)
            best = min(time[side] for side in theirs)
            yield dtype, stage, *(f"{time[o]:.2f}" if o in time else "" for o in others), f"{best:.2f}", f"{memory:.2f}"


def tables(results: Results) -> str:
    """Both tables."""
    header = "dtype", "stage", "side", "median s", "least-most s", "first call s", "peak GB", "error", "of matrix rate"
    sides = [side for stages in results.values() for cell in stages.values() for side in cell["sides"]]
    others = [side for side in dict.fromkeys(sides) if side not in ("sdjax", *PYTORCH)]
    against = *(f"{other} / sdjax" for other in others), "PyTorch's best time / sdjax"
    ratio_header = "dtype", "stage", *against, "peak memory sdjax / PyTorch's least"
    return f"{markdown(header, times(results))}\n\n{markdown(ratio_header, ratios(results, others))}"
