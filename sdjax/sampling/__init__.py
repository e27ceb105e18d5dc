"""Samplers as tables of coefficients, made from diffusers scheduler configurations. NumPy, float64; no JAX."""

from sdjax.sampling.classes import NAMES, name_of
from sdjax.sampling.config import from_config
from sdjax.sampling.scheduler import Scheduler
from sdjax.sampling.table import Table

__all__ = ["NAMES", "Scheduler", "Table", "from_config", "name_of"]
