"""Textual-inversion files of every tool, as PyTorch writes them."""

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import save_file

from sdjax import CheckpointError
from sdjax.checkpoints import textual_inversion

WIDTH = oracle.TEXT["hidden_size"]


def vectors(*shape, seed=0):
    return torch.from_numpy(oracle.normal(*shape, seed=seed))


def web_ui(parameters, name):
    """What the web UI and the repository of the paper save: with the ids of the token, the model and the step."""
    return {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": parameters,
        "name": name,
        "step": 4000,
        "sd_checkpoint": "a1b2c3d4",
        "sd_checkpoint_name": None,
    }


ONE_ENCODER = {
    "diffusers.bin": ({"<cat>": vectors(WIDTH)}, "<cat>"),
    "diffusers.safetensors": ({"<cat>": vectors(3, WIDTH)}, "<cat>"),
    "web-ui.pt": (web_ui({"*": torch.nn.Parameter(vectors(3, WIDTH))}, "cat"), "cat"),
    "paper.pt": (web_ui(torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors(2, WIDTH))}), "cat"), "cat"),
    "array.pt": (vectors(2, WIDTH), None),
    "nameless.pt": (web_ui({"*": vectors(2, WIDTH)}, "*"), None),
    "empty.pt": (web_ui({"*": vectors(2, WIDTH)}, " "), None),
    "star.safetensors": ({"*": vectors(2, WIDTH)}, None),
    "spaces.safetensors": ({" <cat> ": vectors(2, WIDTH)}, "<cat>"),
    "web-ui.safetensors": ({"emb_params": vectors(4, WIDTH)}, None),
}


def save(path, content):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


@pytest.mark.parametrize("name", ONE_ENCODER)
def test_vectors_are_those_that_pytorch_adds(name, tmp_path):
    content, token = ONE_ENCODER[name]
    read = textual_inversion.read(save(tmp_path / name, content))
    assert read.token == token
    [(encoder, ours)] = read.vectors.items()
    assert encoder is None
    assert ours.dtype == np.float32
    theirs = oracle.pipeline(tmp_path, oracle.SD1)
    size = theirs.text_encoder.get_input_embeddings().num_embeddings
    theirs.load_textual_inversion(content, token="cat")
    assert np.array_equal(ours, theirs.text_encoder.get_input_embeddings().weight[size:].numpy())


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_pair_for_sdxl(names, suffix, tmp_path):
    pair = vectors(2, 768), vectors(2, 1280, seed=1)
    read = textual_inversion.read(save(tmp_path / f"cat.{suffix}", dict(zip(names, pair, strict=True))))
    assert read.token is None
    assert list(read.vectors) == ["text_encoder", "text_encoder_2"]
    assert all(np.array_equal(ours, theirs.numpy()) for ours, theirs in zip(read.vectors.values(), pair, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_half_precision_becomes_float32_without_a_change(dtype, suffix, tmp_path):
    half = vectors(2, WIDTH).to(dtype)
    [ours] = textual_inversion.read(save(tmp_path / f"cat.{suffix}", {"cat": half})).vectors.values()
    assert ours.dtype == np.float32
    assert np.array_equal(ours, half.float().numpy())


@pytest.mark.parametrize(
    "content, found",
    [
        (
            {"a.lora_down.weight": vectors(2, 4), "a.lora_up.weight": vectors(4, 2)},
            r"2 entries: a.lora_down.weight \[2, 4\]",
        ),
        ({"conv_in.weight": vectors(2, 4, 3, 3)}, r"1 entries: conv_in.weight \[2, 4, 3, 3\]"),
        ({f"{i}": vectors(2) for i in range(9)}, r"9 entries: 0 \[2\].*…"),
        ({"<cat>": vectors(2, WIDTH) / 0}, r"<cat> \[2, 24\], where one token has vectors .* of finite numbers"),
        (web_ui({"*": vectors(2, 4), "+": vectors(2, 4)}, "cat"), "6 entries: string_to_token"),
        ({"cat": "dog"}, r"1 entries: cat"),
        ({}, "0 entries"),
        ([vectors(2)], "holds a list"),
    ],
)
def test_what_is_no_textual_inversion_is_named(content, found, tmp_path):
    path = save(tmp_path / "cat.pt", content)
    with pytest.raises(CheckpointError, match=rf"cat.pt: not a textual inversion: .*{found}"):
        textual_inversion.read(path)


def test_a_pair_of_different_lengths_is_named(tmp_path):
    path = save(tmp_path / "cat.pt", {"clip_l": vectors(2, 8), "clip_g": vectors(3, 8)})
    with pytest.raises(
        CheckpointError, match=r"cat.pt: the text encoders have different numbers of vectors: .*\[3, 8\]"
    ):
        textual_inversion.read(path)
