"""Samplers as tables of coefficients, made from diffusers scheduler configurations. NumPy, float64; no JAX."""

from sdjax.samplers.config import NAMES, Scheduler, from_config
from sdjax.samplers.table import Table

__all__ = ["NAMES", "Scheduler", "Table", "from_config"]
