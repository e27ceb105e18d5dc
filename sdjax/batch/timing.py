"""How long a job will take, from a few denoising steps of each of its shapes."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from sdjax import inputs
from sdjax.batch.plan import Plan
from sdjax.batch.prepare import Prepared
from sdjax.engine import Group
from sdjax.request import TableKey
from sdjax.runtime import programs
from sdjax.sampling import Table, loop

if TYPE_CHECKING:
    from sdjax.request import Request

STEPS = 3
SAMPLER = "euler"  # a row of its table for each step
GUIDED = 2.0  # any guidance_scale above 1


class _Cost(NamedTuple):
    """Seconds of the parts of a call."""

    rest: float
    """all but these"""
    row: float
    renewal: float
    """of the features that are kept from row to row; 0 where none are"""


def rate(ready: Prepared, plan: Plan) -> float:
    """Pictures a second, over the whole plan: the parts of each call, with their seconds as measured of its shape."""
    at_once, seconds = ready.pipe.mesh.size * plan.batch, 0.0
    measured: dict[tuple, _Cost] = {}
    for group, places in plan.groups.items():
        for keys, calls in _calls(plan, places, at_once).items():
            rows, renewals = _counts(ready, group, keys)
            for is_guided in rows:
                if (group.shape, is_guided) not in measured:
                    item = plan.items[places[0]]
                    measured[group.shape, is_guided] = _measured(ready, group, item, at_once, is_guided=is_guided)
            costs = {is_guided: measured[group.shape, is_guided] for is_guided in rows}
            call = max(cost.rest for cost in costs.values())
            call += sum(rows[kind] * cost.row + renewals[kind] * cost.renewal for kind, cost in costs.items())
            seconds += calls * call
    return len(plan.items) / seconds


def _calls(plan: Plan, places: Sequence[int], at_once: int) -> Counter[frozenset[TableKey]]:
    """How many calls there are of each mixture of tables."""
    starts = range(0, len(places), at_once)
    return Counter(frozenset(plan.items[i].table_key for i in places[start : start + at_once]) for start in starts)


def _counts(ready: Prepared, group: Group, keys: Iterable[TableKey]) -> tuple[Counter[bool], Counter[bool]]:
    """(rows, renewals) of a call with these tables, of those with and of those without guidance."""
    tables = [inputs.table_of(ready.pipe, key) for key in keys]
    length = programs.SEGMENT_ROWS
    rows, renewals = Counter(), Counter()
    for segment in loop.segments(Table.stack(tables), length, length, group.cache_interval):
        is_guided = group.is_guided and segment.guided
        rows[is_guided] += int(segment.rows[0].sum())
        renewals[is_guided] += segment.renewed
    return rows, renewals


def _measured(ready: Prepared, group: Group, item: "Request", pictures: int, *, is_guided: bool) -> _Cost:
    """Of calls whose rows all have guidance, or none."""
    keeps = group.cache_interval is not None

    def call(steps: int, cache_interval: int) -> float:
        start = time.perf_counter()
        own = replace(
            item,
            scheduler=SAMPLER,
            timestep_spacing=None,
            num_inference_steps=steps,
            strength=1.0 if item.strength is not None or inputs.strength_of(ready.pipe, item.table_key) < 1 else None,
            hires_strength=None if item.hires_scale is None else 1.0,
            timesteps=None,
            sigmas=None,
            guidance_scale=GUIDED if is_guided else 1.0,
            cfg_plus_plus=False,
            perp_neg_scale=item.perp_neg_scale if is_guided else 0.0,
            mimic_scale=item.mimic_scale if is_guided else 0.0,
            threshold_percentile=item.threshold_percentile if is_guided else 1.0,
            guidance_interval=None,
            cache_interval=cache_interval if keeps else None,
        )
        made = ready.pipe.sample([own] * pictures, output_type="jax")
        made.images.block_until_ready()
        return time.perf_counter() - start

    ready.pipe.set_progress_bar_config(disable=True)
    call(1, 1)  # compiles
    few, many = call(1, 1), call(STEPS, STEPS)
    row = max(0.0, (many - few) / (STEPS - 1))
    renewal = max(0.0, (call(STEPS, 1) - many) / (STEPS - 1)) if keeps else 0.0
    return _Cost(max(0.0, few - row - renewal), row, renewal)
