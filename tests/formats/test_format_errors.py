"""A checkpoint that cannot give a picture says why."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import original_layout as layout
import pytest
import torch
from references import UNET_FILE, VAE_FILE, load, load_file_of
from safetensors.torch import load_file, save_file
from saved_formats import write_json

from sdjax import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers


def altered(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_weights_that_do_not_fit_are_listed_with_their_component(copied):
    folder = copied("sd1")

    def change(tensors):
        del tensors["conv_in.weight"], tensors["mid_block.resnets.0.norm1.bias"]
        tensors["conv_out.bias"] = torch.zeros(3)
        tensors["banana.weight"] = torch.zeros(2)

    altered(folder / UNET_FILE, change)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / 'unet'}: 4 tensors do not fit:")
    for line in (
        "missing: conv_in.weight [16, 4, 3, 3]",
        "missing: mid_block.resnets.0.norm1.bias [32]",
        "misshapen: conv_out.bias [3] instead of [4]",
        "unknown: banana.weight [2]",
    ):
        assert line in message


def test_tensors_of_a_single_file_that_do_not_fit_are_listed(singles, tmp_path):
    tensors = dict(singles("sd1").tensors)
    del tensors[f"{layout.UNET}middle_block.0.in_layers.0.bias"]
    tensors[f"{layout.UNET}out.2.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        load_file_of(layout.written(tmp_path, tensors))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: unet: ")
    assert "missing: mid_block.resnets.0.norm1.bias [64]" in message


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_component_that_is_listed_but_not_there(copied, monkeypatch, tmp_path, name, relative):
    folder = copied("sd1")
    shutil.rmtree(folder / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"copied.*{name}"):
        load("copied" if relative else folder)


@pytest.mark.parametrize("name", ["unet", "vae", "scheduler"])
def test_an_index_that_lacks_a_component(copied, name):
    folder = copied("sd1")
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", {k: v for k, v in index.items() if k != name})
    if name == "scheduler":
        assert load(folder).scheduler.config["_class_name"] == "PNDMScheduler"
        return
    with pytest.raises(CheckpointError, match=f"copied.*{name}"):
        load(folder)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "StableCascadeCombinedPipeline"])
def test_a_folder_of_another_family_is_named(copied, name):
    folder = copied("sd1")
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", {**index, "_class_name": name})
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder))}: a {name} is not supported; supported: "):
        load(folder)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "SD 3, which is not supported"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux, which is not supported"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "load_lora"),
        ("<goose>", "load_textual_inversion"),
    ],
)
def test_a_file_of_something_else_is_named(folders, tmp_path, key, said):
    path = layout.written(tmp_path, {key: torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=rf"(?s){re.escape(str(path))}: .*{said}"):
        load(path)
    with pytest.raises(CheckpointError, match=rf"(?s){re.escape(str(path))}: .*{said}"):
        load(folders("sd1"), unet=path)


class Malicious:
    """What runs a command when a pickle is read carelessly."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_that_a_pickle_asks_for_runs(singles, copied, tmp_path):
    sign = tmp_path / "ran"
    evil = Malicious(f"touch {sign}")
    path = tmp_path / "model.ckpt"
    for state in ({"callbacks": evil, "state_dict": singles("sd1").tensors}, {**singles("sd1").tensors, "evil": evil}):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}: refused: it uses posix\.system"):
            load_file_of(path)
    folder = copied("sd1")
    (folder / VAE_FILE).unlink()
    torch.save({"evil": evil}, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"vae.*diffusion_pytorch_model\.bin: refused: .*posix\.system"):
        load(folder)
    assert not sign.exists()
    torch.load(path, weights_only=False)
    assert sign.exists()  # it is what it says


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_named(singles, tmp_path, ending, part):
    path = layout.written(tmp_path, singles("sd1").tensors, f"model.{ending}")
    os.truncate(path, int(part * path.stat().st_size))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: truncated"):
        load(path)


def test_truncated_files_of_a_folder_are_named(copied):
    path = copied("sd1") / UNET_FILE
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: truncated"):
        load(path.parents[1])
