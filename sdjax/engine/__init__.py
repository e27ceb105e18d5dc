"""Requests in, pictures out, over all devices of a pipeline; knows no files."""

from sdjax.engine.calls import Engine
from sdjax.engine.groups import Group, Unit, cut, grouped, prompt_chunk_counter, row_counter
from sdjax.engine.sampled import Sampled

__all__ = ["Engine", "Group", "Sampled", "Unit", "cut", "grouped", "prompt_chunk_counter", "row_counter"]
