"""The compiler's figures of a program: memory, operations, bytes moved; and the least time that follows."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax

from sdjax.plan import traffic
from sdjax.plan.targets import Chip
from sdjax.runtime import lowering, programs
from sdjax.runtime.lowering import DoesNotFit, LoweredProgram

COLLECTIVE = re.compile(
    r"\s(all-reduce|all-gather|(?:ragged-)?all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(?:-start)?\("
)


@dataclass(frozen=True)
class Count:
    """On one device. `flops`, `moved` (the compiler's "bytes accessed") and `hbm` are of one run.

    The compiler counts the body of a loop once, and of the branches of a condition the dearer one: of the denoising
    program that is one row of the table, a step; of the decoding program the pictures that are decoded at a time.
    """

    name: str
    flops: float
    moved: float
    """bytes, of which most may stay on the chip: the compiler counts all memories, and prefetched slices as wholes"""
    hbm: float
    """bytes to and from the HBM, see `traffic.hbm_bytes`"""
    temporary: int
    working: int
    """bytes beside the parameters, arguments and results as often as they wait"""
    collectives: tuple[str, ...]
    seconds: float
    """of compiling"""

    def roofline(self, chip: Chip) -> tuple[float, str]:
        """(seconds, what binds): the larger of hbm / bandwidth ("HBM") and flops / peak ("arithmetic")."""
        return max((self.hbm / chip.bandwidth, "HBM"), (self.flops / chip.peak, "arithmetic"))


def count(program: LoweredProgram) -> Count:
    """Compiles a program. Raises DoesNotFit where the compiler finds that it cannot."""
    begun = time.perf_counter()
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not lowering.is_out_of_memory(error):
            raise
        raise DoesNotFit(f"{program.name}: {str(error).partition(chr(10))[0]}") from error
    seconds = time.perf_counter() - begun
    costs, text = compiled.cost_analysis(), compiled.as_text()
    return Count(
        program.name,
        costs["flops"],
        costs["bytes accessed"],
        traffic.hbm_bytes(text),
        compiled.memory_analysis().temp_size_in_bytes,
        program.working_bytes(compiled),
        tuple(sorted(set(COLLECTIVE.findall(text)))),
        seconds,
    )


def decodings(batch: int, pixels: int) -> int:
    """How many times the decoding program decodes for a batch of pictures of so many pixels on a device."""
    return batch // programs.decoded_at_once(batch, pixels)


def largest_batch(fits: Callable[[int], bool], first: int) -> int:
    """The largest power of two that fits, tried from `first`, one, by halving or by doubling; 0: none."""
    batch = first
    if fits(batch):
        while fits(2 * batch):
            batch *= 2
        return batch
    while batch and not fits(batch := batch // 2):
        pass
    return batch
