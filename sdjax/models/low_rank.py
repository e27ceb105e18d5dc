"""Low-rank adaptation of a layer (arXiv:2106.09685), as it is trained: beside the layer, whose weight is not touched.

It is computed on what the layer reads. Merged into a weight in bfloat16, changes smaller than the weight's last digit
would be lost, and the gradient of the whole weight would have to be computed and kept.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.models.layers import Conv, Linear

ZEROS = nnx.initializers.zeros
EVEN = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(fan in), as nn.Linear begins
SMALLEST_NORM = 1e-12


class LowRank(nnx.Module):
    """y + s up(down(x)) for what a layer makes, y, of x; s = alpha / rank. It begins with up = 0, which adds nothing.

    Of a convolution, down has its kernel, stride and padding, and up is of one pixel (LoCon, arXiv:2309.14859). Factors
    are float32 and compute in the layer's dtype.

    has_magnitude: DoRA (arXiv:2402.09353): m (W + s up down) / |W + s up down| in place of W, m begins as |W|, the
    norms are those of the weights of each output, and the gradient takes them for constants (section 4.3).
    """

    def __init__(self, layer: Linear | Conv, rank: int, alpha: float, *, has_magnitude: bool, rngs: nnx.Rngs):
        cin, cout = layer.kernel.shape[-2:]
        kw = {"use_bias": False, "dtype": layer.dtype, "param_dtype": jnp.float32, "rngs": rngs}
        self.scale = alpha / rank
        if isinstance(layer, Conv):
            own = {"strides": layer.strides, "padding": layer.padding}
            self.down = Conv(cin, rank, layer.kernel_size, kernel_init=EVEN, **own, **kw)
            self.up = Conv(rank, cout, (1, 1), strides=(1, 1), padding=((0, 0), (0, 0)), kernel_init=ZEROS, **kw)
        else:
            self.down = Linear(cin, rank, kernel_init=EVEN, **kw)
            self.up = Linear(rank, cout, kernel_init=ZEROS, **kw)
        self.magnitude = nnx.Param(_norm(layer.kernel[...])) if has_magnitude else None

    def __call__(self, layer: Linear | Conv, x: Array, y: Array, *, is_doubled: bool = False) -> Array:
        change = self.scale * self.up(self.down.of_doubled(x) if is_doubled else self.down(x))
        if self.magnitude is None:
            return y + change
        norm = jax.lax.stop_gradient(_norm(layer.kernel[...] + self._product()))
        factor = self.magnitude[...] / norm  # float32: it is close to 1
        without_bias = y if layer.bias is None else y - layer.bias[...].astype(y.dtype)
        return y + (factor - 1).astype(y.dtype) * without_bias + factor.astype(y.dtype) * change

    def _product(self) -> Array:
        """What it adds to the weight: [… cin cout]"""
        down, up = self.down.kernel[...], self.up.kernel[...]
        return self.scale * down @ up.reshape(up.shape[-2:])


def _norm(kernel: Array) -> Array:
    """The norm of the weights of each output: [… cin cout] -> [cout], float32"""
    squares = jnp.square(kernel.astype(jnp.float32)).reshape(-1, kernel.shape[-1])
    return jnp.maximum(jnp.sqrt(squares.sum(axis=0)), SMALLEST_NORM)


def adapt(
    module: nnx.Module, layers: Mapping[str, tuple[int, float]], *, has_magnitude: bool = False, key: Array
) -> None:
    """Gives layers of a module, {path: (rank, alpha)}, a `LowRank` each. The key decides how they begin."""
    found = paths(module)
    for i, (path, (rank, alpha)) in enumerate(sorted(layers.items())):
        rngs = nnx.Rngs(params=jax.random.fold_in(key, i))
        found[path].lora = LowRank(found[path], rank, alpha, has_magnitude=has_magnitude, rngs=rngs)


def paths(module: nnx.Module) -> dict[str, Linear | Conv]:
    """The linear layers and convolutions of a module by their paths in checkpoints."""
    return {".".join(map(str, path)): part for path, part in nnx.iter_graph(module) if isinstance(part, Linear | Conv)}
