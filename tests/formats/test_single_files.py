"""Single files in the original layout give PyTorch's picture of the same weights."""

import sys
from types import ModuleType

import diffusers
import oracle
import original_layout as layout
import pytest
import torch
from original_pipelines import SINGLE
from references import TOLERANCE, assert_pictures, load, load_file_of, their_picture
from safetensors.torch import save_file

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers

TRAINING = ("betas", "alphas_cumprod", "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight", "logvar")


@pytest.fixture
def callback_of_lightning(monkeypatch) -> type:
    """The class that Stable Diffusion 1.4 as published has in its file."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", ModuleType("pytorch_lightning.callbacks"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.ModelCheckpoint


@pytest.mark.parametrize(
    ("kind", "ending"), [("sd1", "old.ckpt"), *((kind, end) for kind in SINGLE for end in ("safetensors", "ckpt"))]
)
def test_single_files(singles, tmp_path, callback_of_lightning, kind, ending):
    reference, _, tensors = singles(kind)
    state = tensors | {name: torch.zeros(1) for name in TRAINING}
    path = tmp_path / f"model.{ending}"
    if ending == "safetensors":
        save_file({name: x.half().contiguous() for name, x in state.items()}, path)
    else:
        optimizer = {
            "state": {0: {"step": 7, "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        }
        trained = {"epoch": 3, "global_step": 7, "optimizer_states": [optimizer], "lr_schedulers": []}
        trained |= {"callbacks": {callback_of_lightning: {"best_model_score": torch.tensor(1.0), "best": "x.ckpt"}}}
        zipped = ending == "ckpt"
        torch.save({**trained, "state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    assert_pictures(load_file_of(path, **SINGLE[kind][2]), reference)


def test_a_single_file_by_from_pretrained(singles, tmp_path):
    reference, _, tensors = singles("sd1")
    path = layout.written(tmp_path, tensors)
    assert_pictures(load(path), reference)
    words = {**reference.call, "prompt": "A photo of (an astronaut) riding a horse, 8k", "negative_prompt": "blurry"}
    given = words | {"prompt": words["prompt"].replace("(", r"\(").replace(")", r"\)")}
    oracle.assert_close(load(path)(**given).images, their_picture(reference.pipe, words), TOLERANCE)


def test_the_header_says_what_the_model_predicts(singles, tmp_path):
    """The biases of this one look like those of 768-v."""
    reference, _, tensors = singles("sd2")
    path = layout.written(tmp_path, tensors)
    save_file(tensors, path, metadata={"modelspec.prediction_type": "epsilon"})
    assert_pictures(load(path), reference)


def test_the_folder_of_a_smaller_model(singles, tmp_path):
    reference, _, _ = singles("ssd-1b")
    reference.pipe.save_pretrained(tmp_path)
    assert_pictures(load(tmp_path), reference)


@pytest.mark.parametrize("kind", ["sdxl", "lcm", "ssd-1b"])
def test_a_single_file_becomes_a_folder_for_pytorch(singles, tmp_path, kind):
    reference, _, tensors = singles(kind)
    load_file_of(layout.written(tmp_path, tensors)).save_pretrained(tmp_path / "folder")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(again) is type(reference.pipe)
    oracle.assert_close(their_picture(again, reference.call), reference.picture, TOLERANCE)
    assert_pictures(load(tmp_path / "folder"), reference)
