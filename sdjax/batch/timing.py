"""How long a job will take, from a few denoising steps of each of its shapes."""

import time
from typing import TYPE_CHECKING

from sdjax.batch.plan import Group, Plan
from sdjax.batch.prepare import Prepared

if TYPE_CHECKING:
    from sdjax.batch.job import Item

STEPS = (1, 3)
SAMPLER = "euler"  # a row of its table for each step


def rate(ready: Prepared, plan: Plan) -> float:
    """Pictures a second, over the whole plan: t = a + b rows for each call, with a and b of its shape as measured."""
    devices, seconds = ready.pipe.mesh.size, 0.0
    measured: dict[tuple, tuple[float, float]] = {}
    for group, members in zip(plan.groups, plan._members, strict=True):
        if group.shape not in measured:
            measured[group.shape] = _measured(ready, group, plan.items[members.indices[0]], devices * plan.batch)
        a, b = measured[group.shape]
        rows = len(ready.pipe._as_scheduler(group.scheduler or ready.pipe.scheduler).table(group.num_inference_steps))
        seconds += -(-len(members.indices) // (devices * plan.batch)) * (a + b * rows)
    return len(plan.items) / seconds


def _measured(ready: Prepared, group: Group, item: "Item", pictures: int) -> tuple[float, float]:
    """(seconds of a call without rows, of each row)"""

    def call(steps: int) -> float:
        start = time.perf_counter()
        made = ready.pipe(
            [item.prompt] * pictures,
            [item.negative_prompt or ""] * pictures if group.has_negative else None,
            height=group.height,
            width=group.width,
            num_inference_steps=steps,
            guidance_scale=item.guidance_scale,
            scheduler=SAMPLER,
            clip_skip=group.clip_skip,
            output_type="jax",
        )
        made.images.block_until_ready()
        return time.perf_counter() - start

    ready.pipe.set_progress_bar_config(disable=True)
    call(1)  # compiles
    few, many = map(call, STEPS)
    each = max(0.0, (many - few) / (STEPS[1] - STEPS[0]))
    return max(0.0, few - STEPS[0] * each), each
