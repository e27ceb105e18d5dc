"""Requests in, pictures out, over all devices of a pipeline; knows no files."""

from sdjax.engine.calls import Engine
from sdjax.engine.continuous import ContinuousEngine
from sdjax.engine.groups import Group, Unit, cut, grouped, prompt_chunk_counter, row_counter
from sdjax.engine.sampled import Sampled
from sdjax.engine.waiting import QueueFull

__all__ = [
    "ContinuousEngine",
    "Engine",
    "Group",
    "QueueFull",
    "Sampled",
    "Unit",
    "cut",
    "grouped",
    "prompt_chunk_counter",
    "row_counter",
]
