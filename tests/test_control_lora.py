"""Control-LoRAs of Stability AI: ControlNets as changes of a UNet, against PyTorch diffusers."""

import warnings
from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import save_file
from test_controlnet import SHARED

import sdjax
from sdjax import components
from sdjax.checkpoints import ldm
from sdjax.models import UNet2DConditionModel

FAMILY = replace(oracle.SD1, unet=oracle.SD1.unet | {"layers_per_block": 2})
RANK = 2


def control_lora(config: dict, hints: tuple[int, ...], *, has_biases: bool = True) -> dict[str, torch.Tensor]:
    """A file of one of the UNet of this config, in the original layout: factors, and what has none.

    has_biases: whether layers with factors have other biases than those of the UNet.
    """
    shared = {name: config[name] for name in SHARED if name in config}
    own = oracle.randomised(
        diffusers.ControlNetModel(**shared, conditioning_embedding_out_channels=hints), 5
    ).state_dict()
    unet, generator, state = oracle.unet(config, 1).state_dict(), torch.Generator().manual_seed(6), {}
    for name, value in own.items():
        if name not in unet or value.ndim == 1 or name == "conv_in.weight":  # with which PEFT takes that of the hint
            weight = unet.get(name.replace(".bias", ".weight"))
            is_kept = not has_biases and name.endswith(".bias") and weight is not None and weight.ndim > 1
            state[name] = unet[name] if is_kept else value
            continue
        rank = [RANK] + [1] * (value.ndim - 2)
        state[name.replace(".weight", ".up")] = torch.randn(len(value), *rank, generator=generator) / 4
        state[name.replace(".weight", ".down")] = torch.randn(RANK, *value.shape[1:], generator=generator) / 4
    del state["mid_block.resnets.0.conv1.bias"]  # the UNet's, then
    down = [(f"{i}.0.op.bias" if i == 3 else f"{i}.0") for i in range(6)]
    hint = {f"input_hint_block.{2 * i}.bias" for i in range(2 * len(hints))}
    names = {*(f"input_blocks.{name}" for name in down), *hint, *(f"zero_convs.{i}.0.bias" for i in range(6))}
    table = {ours: [theirs] for ours, theirs in ldm.read_controlnet_table(names).items()}
    return {ldm.translated(name, table)[0]: value for name, value in state.items()} | {
        "lora_controlnet": torch.zeros(0)
    }


def merged(tensors: dict[str, torch.Tensor], unet: dict[str, torch.Tensor], name: str, original: str) -> torch.Tensor:
    """What a parameter is: W + up @ down, as ComfyUI computes it."""
    stem = original.removesuffix(".weight")
    if f"{stem}.up" not in tensors:
        return tensors.get(original, unet.get(name))
    up, down = (tensors[f"{stem}.{part}"].flatten(start_dim=1) for part in ("up", "down"))
    return unet[name] + (up @ down).reshape(unet[name].shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return oracle.save_pipeline(tmp_path_factory.mktemp("model"), FAMILY)


def test_in_a_pipeline(folder, tmp_path):
    """It becomes a ControlNet, which is saved as one; alone it is refused."""
    path = tmp_path / "control-lora-canny-rank2.safetensors"
    tensors = control_lora(FAMILY.unet, (4, 6, 8))
    save_file(tensors, path)
    ours = sdjax.StableDiffusionPipeline.from_pretrained(folder, controlnet=path)
    ours.save_pretrained(tmp_path / "saved")
    saved = diffusers.ControlNetModel.from_pretrained(tmp_path / "saved" / "controlnet").state_dict()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    table = ldm.read_controlnet_table(tensors)
    for name, value in saved.items():
        original = ldm.translated(name, {ours: [theirs] for ours, theirs in table.items()})[0]
        torch.testing.assert_close(value, merged(tensors, unet, name, original), rtol=0, atol=1e-6)
    with pytest.raises(sdjax.CheckpointError, match="a Control-LoRA, which changes a UNet: give it with a whole pipel"):
        components.load_model("controlnet", path, dtype=None)
    with pytest.raises(sdjax.CheckpointError, match="a ControlNet, no model: load a model, with controlnet="):
        sdjax.StableDiffusionPipeline.from_pretrained(path)


def test_residuals_are_those_of_pytorch(folder, tmp_path):
    """Of the network that diffusers makes of the same file, by PEFT; but for biases, which it does not take from it."""
    path = tmp_path / "control-lora-rank2.safetensors"
    save_file(control_lora(FAMILY.unet, (16, 32, 96, 256), has_biases=False), path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    reference = diffusers.ControlNetModel.from_unet(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        reference.load_lora_adapter(str(path), prefix=None, controlnet_config=reference.config)
    own = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    model = components.load_model("controlnet", path, dtype=None, unet=own)
    x, shown, texts = oracle.normal(1, 4, 4, 4), np.abs(oracle.normal(1, 32, 32, 3)) % 1, oracle.normal(1, 7, 24)
    made = oracle.run(model, x, np.float32([300]), texts, picture=model.embed_picture(shown))
    with torch.no_grad():
        down, middle = reference(
            oracle.nchw(x), torch.tensor([300]), torch.from_numpy(texts), oracle.nchw(shown), return_dict=False
        )
    for ours, theirs in zip(made, [*down, middle], strict=True):
        oracle.assert_close(ours, oracle.nhwc(theirs))


def test_of_another_unet(folder, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = control_lora(FAMILY.unet, (4, 6, 8))
    wrong = {
        "that does not fit this UNet": tensors | {"input_blocks.1.0.in_layers.2.up": torch.zeros(8, 2, 1, 1)},
        "fit this UNet: .*resnets.5.conv1": tensors | {"input_blocks.9.0.in_layers.2.up": torch.zeros(8, 2, 1, 1)},
        "that does not fit this UNet: matmul": tensors | {"input_blocks.1.0.in_layers.2.up": torch.tensor(1.0)},
        "resnets.0.conv1.up": {n: v for n, v in tensors.items() if n != "input_blocks.1.0.in_layers.2.up"},
        "missing: controlnet_mid_block.weight": {n: v for n, v in tensors.items() if n != "middle_block_out.0.weight"},
    }
    for message, own in wrong.items():
        save_file(own, path)
        with pytest.raises(sdjax.CheckpointError, match=message):
            sdjax.StableDiffusionPipeline.from_pretrained(folder, controlnet=path)
