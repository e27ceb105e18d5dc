"""The array in a variable of Flax, which says it in two ways: 0.12.0, which Colab has, in another than later ones."""

from typing import Any

from flax import nnx


def get_value(variable: nnx.Variable) -> Any:
    """The array, or its description."""
    return variable.get_value() if hasattr(nnx.Variable, "get_value") else variable.value


def set_value(variable: nnx.Variable, value: Any) -> None:
    """Replaces the array, also by one of another shape or dtype."""
    if hasattr(nnx.Variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value
