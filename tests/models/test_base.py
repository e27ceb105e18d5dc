"""The dtype of a model where none is asked for."""

from types import SimpleNamespace

import jax
import pytest

from sdjax.models.base import default_dtype


@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [
        ("cpu", {}, "float32"),
        ("tpu", {}, "bfloat16"),
        ("gpu", {"compute_capability": "7.5"}, "float16"),
        ("gpu", {"compute_capability": "8.0"}, "bfloat16"),
        ("gpu", {"compute_capability": "12.0"}, "bfloat16"),
        ("gpu", {"compute_capability": "gfx942"}, "bfloat16"),
    ],
)
def test_the_dtype_that_the_device_multiplies_fast(backend, device, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**device)])
    assert default_dtype().__name__ == dtype
