"""Models as folders: PyTorch reads what is saved, what PyTorch saved is read, and what is broken is named."""

import json
from unittest.mock import Mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers
from flax import nnx
from oracle import SD2, assert_close, nchw, nhwc, normal, run
from safetensors.torch import load_file, save_file

from sdjax.checkpoints import folder
from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
)

KINDS = {
    "unet": (UNet2DConditionModel, diffusers.UNet2DConditionModel),
    "vae": (AutoencoderKL, diffusers.AutoencoderKL),
    "text_encoder": (CLIPTextModel, transformers.CLIPTextModel),
}
VAE_FILE = "diffusion_pytorch_model.safetensors"
FIRST = "encoder.conv_in.weight"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (CLIPTextModel, {"projection_dim": 8}),
        (UNet2DConditionModel, oracle.XL_UNET | {"projection_class_embeddings_input_dim": 8, "time_cond_proj_dim": 16}),
        (AutoencoderKL, {}),
        (AutoencoderTiny, {}),
        (StableDiffusionSafetyChecker, {}),
    ],
)
def test_the_name_of_a_parameter_tells_its_layout(model, config):
    """Kernels, which PyTorch has transposed, and tables are both called weight."""
    described = model.described(model.config_class(**config), "float32")
    for path, variable in nnx.to_flat_state(nnx.state(described)):
        shape = variable.shape
        expected = shape if path[-1] != "kernel" else (*shape[:-3:-1], *shape[:-2])
        assert folder.torch_shape(folder.torch_name(path), shape) == expected, path


def saved_config(path) -> dict:
    """config.json without what says who wrote it."""
    config = json.loads((path / "config.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}


@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_changes_no_bit(request, tmp_path, family, kind):
    """PyTorch saves, sdjax loads and saves, PyTorch loads."""
    ours, theirs = KINDS[kind]
    source, target = request.getfixturevalue(family) / kind, tmp_path / "new" / kind
    ours.from_pretrained(source).save_pretrained(target)
    first, second = theirs.from_pretrained(source), theirs.from_pretrained(target)
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    second.save_pretrained(tmp_path / "again")
    assert saved_config(tmp_path / "again") == saved_config(source)


def test_saving_over_a_checkpoint_replaces_it(sd1_folder, sd2_folder, tmp_path):
    AutoencoderKL.from_pretrained(sd1_folder, subfolder="vae").save_pretrained(tmp_path)
    AutoencoderKL.from_pretrained(sd2_folder, subfolder="vae").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", VAE_FILE]
    assert AutoencoderKL.from_pretrained(tmp_path).config.block_out_channels == SD2.vae["block_out_channels"]


def check_bfloat16(model: nnx.Module, result: jax.Array, expected: torch.Tensor | np.ndarray) -> None:
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    assert result.dtype == jnp.bfloat16
    assert_close(result.astype(jnp.float32), expected, 0.05)


def test_the_unet_in_bfloat16_is_near_the_float32_one(sd2_folder):
    sample, t, states = normal(1, 8, 8, 4), np.float32([500]), normal(1, 7, 24, seed=1)
    reference = diffusers.UNet2DConditionModel.from_pretrained(sd2_folder / "unet").requires_grad_(False)
    expected = nhwc(reference(nchw(sample), torch.from_numpy(t), torch.from_numpy(states)).sample)
    model = UNet2DConditionModel.from_pretrained(sd2_folder, subfolder="unet", dtype=jnp.bfloat16)
    check_bfloat16(model, run(model, sample, t, states), expected)


def test_the_vae_in_bfloat16_is_near_the_float32_one(sd2_folder):
    latents = normal(1, 4, 4, 4)
    reference = diffusers.AutoencoderKL.from_pretrained(sd2_folder / "vae").requires_grad_(False)
    model = AutoencoderKL.from_pretrained(sd2_folder, subfolder="vae", dtype=jnp.bfloat16)
    result = nnx.jit(AutoencoderKL.decode)(model, latents)
    check_bfloat16(model, result, nhwc(reference.decode(nchw(latents)).sample))


def test_the_text_encoder_in_bfloat16_is_near_the_float32_one(sd2_folder):
    ids = np.arange(77)[None]
    reference = transformers.CLIPTextModel.from_pretrained(sd2_folder / "text_encoder").requires_grad_(False)
    model = CLIPTextModel.from_pretrained(sd2_folder, subfolder="text_encoder", dtype=jnp.bfloat16)
    check_bfloat16(model, run(model, ids), reference(torch.from_numpy(ids)).last_hidden_state)


def test_parameters_are_float32_on_a_cpu(sd2_folder):
    model = AutoencoderKL.from_pretrained(sd2_folder, subfolder="vae")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(sd2_folder, tmp_path, dtype):
    """A file of halves loads, whatever the dtype asked for; bfloat16 is saved as bfloat16."""
    diffusers.AutoencoderKL.from_pretrained(sd2_folder / "vae", torch_dtype=dtype).save_pretrained(tmp_path)
    tensor = load_file(tmp_path / VAE_FILE)[FIRST]
    kernel = AutoencoderKL.from_pretrained(tmp_path).encoder.conv_in.kernel[...]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, tensor.float().numpy().transpose(2, 3, 1, 0))
    AutoencoderKL.from_pretrained(tmp_path, dtype=jnp.bfloat16).save_pretrained(tmp_path / "saved")
    assert torch.equal(load_file(tmp_path / "saved" / VAE_FILE)[FIRST], tensor.bfloat16())


def test_auto_keeps_the_dtype_of_every_tensor(sd2_folder, tmp_path):
    """What a checkpoint is converted with: mixed dtypes are saved as they came."""
    tensors = load_file(sd2_folder / "vae" / VAE_FILE)
    kinds = {
        name: torch.half if "conv" in name else torch.bfloat16 if "norm" in name else torch.float for name in tensors
    }
    mixed = {name: tensor.to(kinds[name]) for name, tensor in tensors.items()}
    config = json.loads((sd2_folder / "vae" / "config.json").read_text())
    AutoencoderKL.from_pretrained(sd2_folder / "vae").save_pretrained(tmp_path)
    save_file(mixed, tmp_path / VAE_FILE)
    model = AutoencoderKL.from_pretrained(tmp_path, dtype="auto")
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / VAE_FILE)
    assert all(again[name].dtype == tensor.dtype and torch.equal(again[name], tensor) for name, tensor in mixed.items())
    assert config["force_upcast"]  # which is about computing
    latents = normal(1, 4, 4, 4)
    assert nnx.jit(AutoencoderKL.decode)(model, latents).dtype == jnp.float32


@pytest.mark.parametrize(("force_upcast", "dtype"), [(True, jnp.float32), (False, jnp.float16)])
def test_an_autoencoder_that_overflows_float16_is_float32(sd2_folder, force_upcast, dtype):
    """SD 1 and SDXL say force_upcast, as does a config that says nothing; the fixed one of SDXL says no."""
    config = json.loads((sd2_folder / "vae" / "config.json").read_text()) | {"force_upcast": force_upcast}
    tensors = {name: tensor.numpy() for name, tensor in load_file(sd2_folder / "vae" / VAE_FILE).items()}
    model = AutoencoderKL.from_tensors(config, tensors.items(), source="here", dtype=jnp.float16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}
    assert nnx.jit(AutoencoderKL.decode)(model, normal(1, 4, 4, 4).astype(dtype)).dtype == dtype
    if force_upcast:
        del config["force_upcast"]
        again = AutoencoderKL.from_tensors(config, tensors.items(), source="here", dtype="float16")
        assert again.encoder.conv_in.kernel.dtype == jnp.float32
    half = AutoencoderKL.from_tensors(config, tensors.items(), source="here", dtype=jnp.bfloat16)
    assert half.encoder.conv_in.kernel.dtype == jnp.bfloat16


def test_tensors_come_from_anywhere(sd2_folder):
    """A generator of names and arrays; errors begin with what it is called."""
    config = json.loads((sd2_folder / "vae" / "config.json").read_text())
    pairs = [(name, tensor.numpy()) for name, tensor in load_file(sd2_folder / "vae" / VAE_FILE).items()]
    model = AutoencoderKL.from_tensors(config, iter(pairs), source="here")
    reference = AutoencoderKL.from_pretrained(sd2_folder / "vae")
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, reference)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    broken = [pair for pair in pairs if pair[0] != "quant_conv.bias"] + [(FIRST, dict(pairs)[FIRST])]
    lines = f"2 tensors do not fit:\n  more than once: {FIRST}\n  missing: quant_conv.bias"
    with pytest.raises(CheckpointError, match=f"^here: {lines}"):
        AutoencoderKL.from_tensors(config, broken, source="here")
    with pytest.raises(CheckpointError, match=r"^here: describes UNet2DConditionModel, not AutoencoderKL"):
        AutoencoderKL.from_tensors({"_class_name": "UNet2DConditionModel"}, pairs, source="here")
    with pytest.raises(CheckpointError, match=r"^here: .*act_fn='mish'"):
        AutoencoderKL.from_tensors(config | {"act_fn": "mish"}, pairs, source="here")


def test_an_error_of_the_source_is_passed_on(sd2_folder):
    def tensors():
        yield FIRST, np.zeros((8, 3, 3, 3), np.float32)
        raise CheckpointError("a shard is missing")

    config = json.loads((sd2_folder / "vae" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="a shard is missing"):
        AutoencoderKL.from_tensors(config, tensors(), source="here")


@pytest.fixture
def checkpoint(sd2_folder, tmp_path):
    """A writable copy of a VAE: (folder, its tensors)."""
    for path in (sd2_folder / "vae").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path, load_file(tmp_path / VAE_FILE)


def error_of_loading(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        AutoencoderKL.from_pretrained(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_all_that_is_wrong_with_the_weights_is_one_message(checkpoint):
    path, tensors = checkpoint
    tensors["decoder.spare.weight"] = torch.zeros(3, 2)
    tensors["encoder.conv_in.bias"] = torch.zeros(5)
    tensors["encoder.mid_block.attentions.0.to_q.weight"] = torch.zeros(16, 16, 1, 1)
    tensors["decoder.conv_out.bias"][1] = float("nan")
    tensors["decoder.conv_in.weight"][0, 0, 0, 0] = float("-inf")
    del tensors["encoder.conv_in.weight"], tensors["quant_conv.bias"]
    save_file(tensors, path / VAE_FILE)
    lines = error_of_loading(path).splitlines()
    assert lines[0] == f"{path}: 7 tensors do not fit:"
    assert sorted(line.strip() for line in lines[1:]) == [
        "misshapen: encoder.conv_in.bias [5] instead of [8]",
        "misshapen: encoder.mid_block.attentions.0.to_q.weight [16, 16, 1, 1] instead of [16, 16]",
        "missing: encoder.conv_in.weight [8, 3, 3, 3]",
        "missing: quant_conv.bias [8]",
        "not finite (NaN or infinity): decoder.conv_in.weight",
        "not finite (NaN or infinity): decoder.conv_out.bias",
        "unknown: decoder.spare.weight [3, 2]",
    ]


def test_the_folder_of_another_model(sd1_folder):
    path = sd1_folder / "unet"
    assert error_of_loading(path) == f"{path / 'config.json'}: describes UNet2DConditionModel, not AutoencoderKL"


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(checkpoint, kept):
    path, _ = checkpoint
    content = (path / VAE_FILE).read_bytes()
    (path / VAE_FILE).write_bytes(content[:kept])
    message = error_of_loading(path)
    assert str(path / VAE_FILE) in message
    assert "truncated" in message


def test_no_weights(checkpoint):
    path, _ = checkpoint
    (path / VAE_FILE).unlink()
    assert VAE_FILE in error_of_loading(path)


def test_no_config(checkpoint):
    path, _ = checkpoint
    (path / "config.json").unlink()
    assert "not a checkpoint folder: it has no config.json" in error_of_loading(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"", "not valid JSON"),
    ],
)
def test_a_broken_config(checkpoint, content, message):
    path, _ = checkpoint
    (path / "config.json").write_bytes(content)
    assert f"{path / 'config.json'}: {message}" in error_of_loading(path)


def test_config_values_that_are_not_implemented(checkpoint):
    path, _ = checkpoint
    config = json.loads((path / "config.json").read_text())
    config |= {"shift_factor": 0.1, "act_fn": "mish"}
    (path / "config.json").write_text(json.dumps(config))
    message = error_of_loading(path)
    assert message.startswith(str(path / "config.json"))
    assert message.endswith("not implemented: shift_factor=0.1, act_fn='mish'")


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    folder.write_json(tmp_path / "ours", {"goose": "ø"})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert folder.read_json(tmp_path / "ours") == {"goose": "ø"}


def test_a_save_that_fails_leaves_the_old_checkpoint(checkpoint, monkeypatch):
    path, _ = checkpoint
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    model = AutoencoderKL.from_pretrained(path)
    monkeypatch.setattr(folder, "save_file", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
