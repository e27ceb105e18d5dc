"""sdjax.models.rrdbnet against the formulas of ESRGAN's paper in PyTorch, in the spellings of its files."""

import numpy as np
import oracle
import pytest
import safetensors.torch
import torch
from torch.nn import functional

from sdjax import components
from sdjax.models import RRDBNet

WIDTH, GROWN, BLOCKS = 8, 4, 2


def tensors(scale: int) -> dict[str, torch.Tensor]:
    shapes = {"conv_first": (3 * (4 // scale) ** 2, WIDTH), "conv_last": (WIDTH, 3)}
    shapes |= dict.fromkeys(("conv_body", "conv_up1", "conv_up2", "conv_hr"), (WIDTH, WIDTH))
    for block in range(BLOCKS):
        for dense in (1, 2, 3):
            for i in range(1, 6):
                widths = WIDTH + (i - 1) * GROWN, WIDTH if i == 5 else GROWN
                shapes[f"body.{block}.rdb{dense}.conv{i}"] = widths
    generator, made = torch.Generator().manual_seed(0), {}
    for name, (cin, cout) in shapes.items():
        made[f"{name}.weight"] = torch.randn(cout, cin, 3, 3, generator=generator) / (9 * cin) ** 0.5
        made[f"{name}.bias"] = 0.1 * torch.randn(cout, generator=generator)
    return made


def reference(p: dict[str, torch.Tensor], x: torch.Tensor, scale: int) -> torch.Tensor:
    def conv(name, x):
        return functional.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1)

    def lrelu(x):
        return functional.leaky_relu(x, 0.2)

    def dense(name, x):
        features = [x]
        for i in range(1, 5):
            features.append(lrelu(conv(f"{name}.conv{i}", torch.cat(features, 1))))
        return x + 0.2 * conv(f"{name}.conv5", torch.cat(features, 1))

    first = h = conv("conv_first", functional.pixel_unshuffle(x, 4 // scale))
    for block in range(BLOCKS):
        inner = h
        for i in (1, 2, 3):
            inner = dense(f"body.{block}.rdb{i}", inner)
        h = h + 0.2 * inner
    h = first + conv("conv_body", h)
    for name in ("conv_up1", "conv_up2"):
        h = lrelu(conv(name, functional.interpolate(h, scale_factor=2, mode="nearest")))
    return conv("conv_last", lrelu(conv("conv_hr", h)))


def old(name: str) -> str:
    """As ESRGAN's first files have it: model.1.sub.0.RDB1.conv1.0.weight"""
    module, leaf = name.rsplit(".", 1)
    numbers = {"conv_first": 0, "conv_body": f"1.sub.{BLOCKS}", "conv_up1": 3, "conv_up2": 6, "conv_hr": 8}
    numbers["conv_last"] = 10
    if module in numbers:
        return f"model.{numbers[module]}.{leaf}"
    _, block, dense, conv = module.split(".")
    return f"model.1.sub.{block}.{dense.upper()}.{conv}.0.{leaf}"


def trunk(name: str) -> str:
    """As its repository has it: RRDB_trunk.0.RDB1.conv1.weight"""
    spelled = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    module, leaf = name.rsplit(".", 1)
    module = spelled.get(module, module).replace("body.", "RRDB_trunk.").replace("rdb", "RDB")
    return f"{module}.{leaf}"


@pytest.mark.parametrize(("scale", "spelled"), [(4, None), (2, None), (1, None), (4, old), (4, trunk)])
def test_pictures_are_those_of_the_formulas(tmp_path, scale, spelled):
    state = tensors(scale)
    renamed = {spelled(name) if spelled else name: value for name, value in state.items()}
    if spelled is old:
        path = tmp_path / "model.pth"
        torch.save(renamed, path)
    elif scale == 2:
        path = tmp_path / "model.pth"
        torch.save({"params_ema": renamed}, path)
    else:
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file(renamed, path)
    model = components.load_model("upscaler", path, dtype=None)
    assert isinstance(model, RRDBNet)
    assert model.config.to_dict() == {"num_feat": WIDTH, "num_grow_ch": GROWN, "num_block": BLOCKS, "scale": scale}
    x = np.random.default_rng(1).random((2, 8, 12, 3), np.float32)
    expected = oracle.nhwc(reference(state, oracle.nchw(x), scale))
    made = oracle.run(model, x)
    assert made.shape == (2, 8 * scale, 12 * scale, 3)
    oracle.assert_close(made, expected)
