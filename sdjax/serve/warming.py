"""Compiles the usual programs before anybody waits for them."""

import asyncio
import warnings

from sdjax import inputs
from sdjax.engine import ContinuousEngine
from sdjax.engine.job import Job
from sdjax.request import Request
from sdjax.serve.studio import Studio

STEPS = 8  # so that all are under way at once
OWNER, PRIORITY = "warming", -1


async def warm(studio: Studio) -> None:
    """Makes pictures of the model's own size: on each device one, two, four … up to all of its places."""
    try:
        engine = (await studio.models.get()).engine
        if not inputs.takes_pictures(engine.pipe):
            for count in counts(studio.places, engine.pipe.mesh.size, studio.queue):
                await _made(engine, count)
        studio.has_warmed = True
    except Exception as error:  # it is only slower then
        warnings.warn(f"the usual programs could not be compiled: {error}", stacklevel=1)
    studio.is_warm = True


def counts(places: int, devices: int, queue: int) -> list[int]:
    """Of pictures at once, for each number of places, powers of two, that a device may have."""
    each = [2**power for power in range(places.bit_length()) if 2**power < places] + [places]
    return sorted({min(own * devices, queue) for own in each})


async def _made(engine: ContinuousEngine, count: int) -> None:
    jobs = await asyncio.to_thread(lambda: [_job(engine, seed) for seed in range(count)])
    preview = jobs[0].preview()
    await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    preview.cancel()


def _job(engine: ContinuousEngine, seed: int) -> Job:
    request = Request("", seed=seed, num_inference_steps=STEPS)
    return engine.submit(request, owner=OWNER, priority=PRIORITY)
