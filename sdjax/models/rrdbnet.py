"""RRDBNet, the network of ESRGAN (arXiv:1809.00219, section 3.1) and Real-ESRGAN: pictures to larger ones."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.fields import Channels, Within
from sdjax.models.base import Model, ModelConfig
from sdjax.models.layers import LayerArgs, conv
from sdjax.ops.convolution import doubled

SHARE = 0.2  # of what a block adds
SLOPE = 0.2


@dataclass(frozen=True)
class RRDBNetConfig(ModelConfig):
    """num_feat: channels; num_grow_ch: those that each convolution of a dense block adds; num_block: of the body;
    scale: of the pictures, 4, or 2 and 1 from pixels side by side as channels."""

    num_feat: Channels = 64
    num_grow_ch: Channels = 32
    num_block: Annotated[int, Within(1, 64)] = 23
    scale: int = 4

    neutral: ClassVar = {"scale": {1, 2, 4}}


class ResidualDenseBlock(nnx.Module):
    """x + 0.2 x_5, where x_i = lrelu(conv_i([x, x_1 … x_i-1])), the last without lrelu: [B H W C] -> [B H W C]"""

    def __init__(self, config: RRDBNetConfig, **kw: Unpack[LayerArgs]):
        width, more = config.num_feat, config.num_grow_ch
        for i in range(1, 6):
            setattr(self, f"conv{i}", conv(width + (i - 1) * more, width if i == 5 else more, 3, **kw))

    def __call__(self, x: Array) -> Array:
        features = [x]
        for i in range(1, 5):
            features.append(_lrelu(getattr(self, f"conv{i}")(jnp.concatenate(features, axis=-1))))
        return x + SHARE * self.conv5(jnp.concatenate(features, axis=-1))


class RRDB(nnx.Module):
    """x + 0.2 of three dense blocks one after the other."""

    def __init__(self, config: RRDBNetConfig, **kw: Unpack[LayerArgs]):
        self.rdb1, self.rdb2, self.rdb3 = (ResidualDenseBlock(config, **kw) for _ in range(3))

    def __call__(self, x: Array) -> Array:
        return x + SHARE * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(Model):
    """[B H W 3] in 0..1 -> [B sH sW 3], of `scale` s; sides of the picture are multiples of 4 / s."""

    config_class = RRDBNetConfig
    renames = (
        (r"^model\.0\.", "conv_first."),
        (r"^model\.1\.sub\.(\d+)\.(?=RDB)", r"body.\1."),
        (r"^model\.1\.sub\.\d+\.", "conv_body."),
        (r"^model\.3\.", "conv_up1."),
        (r"^model\.6\.", "conv_up2."),
        (r"^model\.8\.", "conv_hr."),
        (r"^model\.10\.", "conv_last."),
        (r"^RRDB_trunk\.", "body."),
        (r"^trunk_conv\.", "conv_body."),
        (r"^upconv(\d)\.", r"conv_up\1."),
        (r"^HRconv\.", "conv_hr."),
        (r"\.RDB(\d)\.", r".rdb\1."),
        (r"(conv\d)\.0\.", r"\1."),
    )

    def __init__(self, config: RRDBNetConfig, **kw: Unpack[LayerArgs]):
        self.config = config
        width = config.num_feat
        self.conv_first = conv(3 * (4 // config.scale) ** 2, width, 3, **kw)
        self.body = nnx.List(RRDB(config, **kw) for _ in range(config.num_block))
        for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
            setattr(self, name, conv(width, width, 3, **kw))
        self.conv_last = conv(width, 3, 3, **kw)

    def __call__(self, x: Array) -> Array:
        first = x = self.conv_first(_side_by_side(x, 4 // self.config.scale))
        for block in self.body:
            x = block(x)
        x = first + self.conv_body(x)
        x = _lrelu(self.conv_up1(doubled(x)))
        x = _lrelu(self.conv_up2(doubled(x)))
        return self.conv_last(_lrelu(self.conv_hr(x)))


def _lrelu(x: Array) -> Array:
    return jax.nn.leaky_relu(x, SLOPE)


def _side_by_side(x: Array, n: int) -> Array:
    """[B H W C] -> [B H/n W/n C*n*n]: the pixels of each square of n x n as channels."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // n, n, W // n, n, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // n, W // n, C * n * n)
