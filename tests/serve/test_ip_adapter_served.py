"""A picture as a prompt over HTTP: a server with an IP-Adapter makes what the pipeline makes."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
import pytest
import test_ip_adapter as of_pytorch
from conftest import Served, start, stop
from PIL import Image
from safetensors.torch import save_file

from sdjax.pipeline import StableDiffusionPipeline

GOOSE = {"prompt": "goose", "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 7, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """The file of a plain IP-Adapter, beside which the image encoder is."""
    folder = tmp_path_factory.mktemp("adapter")
    of_pytorch.image_encoder(of_pytorch.VISION).save_pretrained(folder / "image_encoder")
    tensors = of_pytorch.flat(of_pytorch.adapter("plain", oracle.ONE_LEVEL, 0))
    save_file(tensors, folder / "plain.safetensors")
    return folder / "plain.safetensors"


@pytest.fixture(scope="module")
def adapted(one_level_folder, adapter) -> Iterator[Served]:
    served = start("--model", one_level_folder, "--ip-adapter", adapter, "--places", "2")
    yield served
    assert stop(served) == 0


def data(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def made(adapted, **given) -> np.ndarray:
    found = adapted.drawn(**GOOSE, **given)
    assert found["state"] == "done", found
    return np.asarray(Image.open(io.BytesIO(adapted.http.get(found["pictures"][0]["url"]).content)), float)


def test_a_picture_as_a_prompt(adapted, one_level_folder, adapter):
    """Alone, with a scale, where a mask has it, and beside requests without one."""
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipe.load_ip_adapter(adapter)
    image, mask = Image.effect_noise((48, 40), 90).convert("RGB"), Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    for given in ({}, {"ip_adapter_scale": 0.4}, {"ip_adapter_mask": mask}):
        sent = {name: data(value) if name == "ip_adapter_mask" else value for name, value in given.items()}
        expected = np.asarray(pipe(**GOOSE, ip_adapter_image=image, **given).images[0], float)
        assert np.abs(made(adapted, ip_adapter_image=data(image), **sent) - expected).max() <= 1
    without = np.asarray(StableDiffusionPipeline.from_pretrained(one_level_folder)(**GOOSE).images[0], float)
    assert np.abs(made(adapted) - without).max() <= 1
    assert np.abs(expected - without).max() > 1


def test_its_settings_say_that_there_was_a_picture(adapted):
    image = data(Image.effect_noise((48, 40), 90).convert("RGB"))
    found = adapted.drawn(**GOOSE, ip_adapter_image=image)
    settings = found["pictures"][0]["settings"]
    assert settings["had_image"]
    assert "ip_adapter_image" not in settings
