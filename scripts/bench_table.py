"""The results of `bench.py` as tables."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

PYTORCH = ("pytorch", "torch.compile")

Cell = dict[str, Any]
"""A stage in one dtype: {"flops": of the products, "sides": {side: {"seconds": [...], "peak": bytes, ...}}}"""

Results = dict[str, dict[str, Cell]]
"""By dtype, then by stage"""


def median(cell: Cell, side: str) -> float:
    """The median of the seconds that a side took."""
    return statistics.median(cell["sides"][side]["seconds"])


def rate(stages: dict[str, Cell]) -> float | None:
    """The best rate of large matrix products that any side reached, operations a second."""
    if not (cell := stages.get("matmul")) or not cell["flops"]:
        return None
    return cell["flops"] / min(min(side["seconds"]) for side in cell["sides"].values())


def times(results: Results) -> Iterator[Sequence[str]]:
    """A row for each dtype, stage and side, below a header."""
    yield "dtype", "stage", "side", "median s", "least-most s", "first call s", "peak GB", "error", "of matrix rate"
    for dtype, stages in results.items():
        best = rate(stages)
        for stage, cell in stages.items():
            for side, found in cell["sides"].items():
                seconds = median(cell, side)
                share = f"{cell['flops'] / seconds / best:.0%}" if best and cell["flops"] else ""
                spread = f"{min(found['seconds']):.4g}-{max(found['seconds']):.4g}"
                error = "" if found["error"] is None else f"{found['error']:.1e}"
                numbers = f"{seconds:.4g}", spread, f"{found['first']:.4g}", f"{found['peak'] / 1e9:.2f}", error, share
                yield dtype, stage, _with_layouts(side, found), *numbers


def _with_layouts(side: str, found: dict[str, Any]) -> str:
    chosen = sorted({min(known, key=known.__getitem__) for known in found["layouts"].values()} - {"contiguous"})
    return " ".join([side, *chosen])


def ratios(results: Results) -> Iterator[Sequence[str]]:
    """How much faster sdjax is, and how much more memory it takes, for each stage and dtype."""
    yield "dtype", "stage", "PyTorch's best time / sdjax", "peak memory sdjax / PyTorch's least", "flax-0.35 / sdjax"
    for dtype, stages in results.items():
        for stage, cell in stages.items():
            theirs = [side for side in PYTORCH if side in cell["sides"]]
            if "sdjax" not in cell["sides"] or not theirs or stage == "matmul":
                continue
            peaks = {side: found["peak"] for side, found in cell["sides"].items()}
            old = median(cell, "flax-0.35") / median(cell, "sdjax") if "flax-0.35" in peaks else None
            yield (
                dtype,
                stage,
                f"{min(median(cell, side) for side in theirs) / median(cell, 'sdjax'):.2f}",
                f"{peaks['sdjax'] / min(peaks[side] for side in theirs):.2f}",
                "" if old is None else f"{old:.2f}",
            )


def markdown(rows: Iterator[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is its header."""
    header, *rest = rows
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rest)]
    return "\n".join(lines)


def tables(results: Results) -> str:
    """Both tables."""
    return f"{markdown(times(results))}\n\n{markdown(ratios(results))}"
