"""A plan as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdjax.plan.counts import Count
from sdjax.plan.targets import Chip
from sdjax.runtime import lowering

STEPS = 50  # the default of `sdjax generate`


@dataclass(frozen=True)
class Plan:
    """What a call for `batch` pictures on each device takes, by program."""

    chip: Chip
    batch: int
    parameters: Mapping[str, int]
    """bytes by component: all of them are on each device"""
    counts: Sequence[Count]
    runs: Mapping[str, int]
    """how often what is counted of a program runs in a call; a program that is not here: once"""

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    @property
    def limit(self) -> float:
        """Bytes that a device may be filled with."""
        return lowering.SHARE * self.chip.hbm

    @property
    def parameter_bytes(self) -> int:
        return sum(self.parameters.values())

    @property
    def total(self) -> int:
        """Bytes on a device: all parameters, and what the program that takes most takes beside them."""
        return self.parameter_bytes + max(count.working for count in self.counts)

    @property
    def seconds(self) -> float:
        """The least time of a call."""
        return sum(self.runs.get(count.name, 1) * count.roofline(self.chip)[0] for count in self.counts)

    @property
    def estimated_batch(self) -> int:
        """The largest power of two that fits if what is beside the parameters grows with the batch; 0: none."""
        pictures = self.batch * (self.limit - self.parameter_bytes) / (self.total - self.parameter_bytes)
        return lowering.power_of_two(pictures) if pictures >= 1 else 0


def lines(plan: Plan) -> list[str]:
    """The table, and what follows from it."""
    text = [
        f"{'program':<10}{'runs':>5}{'temporary':>12}{'total HBM':>12}{'FLOP':>10}{'moved':>12}{'of HBM':>12}"
        f"{'roofline':>12}  {'bound by':<12}{'compiled in':>11}"
    ]
    for count in plan.counts:
        seconds, bound = count.roofline(plan.chip)
        total = plan.parameter_bytes + count.working
        text.append(
            f"{count.name:<10}{plan.runs.get(count.name, 1):>5}{_size(count.temporary):>12}{_size(total):>12}"
            f"{_flop(count.flops):>10}{_size(count.moved):>12}{_size(count.hbm):>12}{1e3 * seconds:>9.3f} ms"
            f"  {bound:<12}{count.seconds:>9.0f} s"
        )
    own = ", ".join(f"{component} {_size(size)}" for component, size in plan.parameters.items())
    fits = "fits" if plan.fits else "does not fit"
    share = f"{lowering.SHARE:.0%} of the {_size(plan.chip.hbm)} that programs may use on this chip"
    collectives = sorted({kind for count in plan.counts for kind in count.collectives})
    return [
        *text,
        f"parameters   {_size(plan.parameter_bytes)} on each device: {own}",
        f"total HBM    {_size(plan.total)} on each device: {fits} in {_size(plan.limit)}, {share}",
        f"roofline     {plan.seconds / plan.batch:.3g} s a picture and device, {STEPS} steps: the least, not measured",
        f"collectives  {', '.join(collectives) or 'none'}",
    ]


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _flop(number: float) -> str:
    return f"{number / 1e12:.3f} T" if number >= 1e11 else f"{number / 1e9:.3f} G"
