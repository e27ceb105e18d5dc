"""Samplers as tables of coefficients, made from diffusers scheduler configurations. NumPy, float64; no JAX."""

from sdjax.sampling.config import NAMES, Scheduler, from_config, name_of
from sdjax.sampling.table import Table

__all__ = ["NAMES", "Scheduler", "Table", "from_config", "name_of"]
