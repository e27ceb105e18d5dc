"""Flax's weight files: trees built from PyTorch's parameters by the rules that diffusers' Flax models had."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization, traverse_util
from safetensors.numpy import load_file

from sdjax.checkpoints import weights
from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}


def path_in_diffusers(name: str) -> list[str]:
    """'a.0.to_out.0.weight' -> ['a_0', 'to_out_0', 'weight']: lists are attributes with a number."""
    return re.sub(r"\.(\d+)", r"_\1", name).split(".")


def path_in_vae(name: str) -> list[str]:
    """The same with the names that attention had before, which the Flax autoencoder kept."""
    return [OLD_NAMES.get(part, part) for part in path_in_diffusers(name)]


def path_in_transformers(name: str) -> list[str]:
    """Layers are in a dict by number."""
    return name.split(".")


def flax_leaf(parents: list[str], leaf: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """What Flax Linen's layers call a parameter, in their layout."""
    if leaf != "weight":
        return leaf, array
    if array.ndim == 1:
        return "scale", array
    if "embedding" in parents[-1] and array.ndim == 2:
        return "embedding", array
    return "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def flax_tree(tensors: dict[str, np.ndarray], path: Callable[[str], list[str]], dtype: str) -> dict:
    flat = {}
    for name, array in tensors.items():
        *parents, leaf = path(name)
        leaf, array = flax_leaf(parents, leaf, array)
        flat[*parents, leaf] = jnp.asarray(np.ascontiguousarray(array), dtype)
    return traverse_util.unflatten_dict(flat)


KINDS = {
    "unet": (UNet2DConditionModel, path_in_diffusers, "diffusion_flax_model.msgpack"),
    "vae": (AutoencoderKL, path_in_vae, "diffusion_flax_model.msgpack"),
    "text_encoder": (CLIPTextModel, path_in_transformers, "flax_model.msgpack"),
}


def flax_folder(source: Path, target: Path, kind: str, dtype: str = "float32") -> Path:
    """A folder as Flax saved it, with the weights that PyTorch saved in another."""
    cls, path, file = KINDS[kind]
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    if "_class_name" in config:
        config["_class_name"] = f"Flax{cls.__name__}"
    (target / "config.json").write_text(json.dumps(config))
    [weight_file] = source.glob("*.safetensors")
    tensors = load_file(weight_file)
    if kind == "text_encoder":  # every published file has the prefix
        tensors = {re.sub(r"^(?!text_model\.)", "text_model.", name): array for name, array in tensors.items()}
    (target / file).write_bytes(serialization.to_bytes(flax_tree(tensors, path, dtype)))
    return target


def parameters(module: nnx.Module) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(module))


@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flax_folder_is_the_same_model(request, tmp_path, family, kind):
    """Convolutional and linear projections, group norms, embeddings: every parameter, bit for bit."""
    source = request.getfixturevalue(family) / kind
    model = KINDS[kind][0].from_pretrained(flax_folder(source, tmp_path / kind, kind))
    for ours, theirs in zip(parameters(model), parameters(KINDS[kind][0].from_pretrained(source)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_flax_folder_in_bfloat16(sd1_folder, tmp_path):
    """The revision "bf16"."""
    source = sd1_folder / "unet"
    path = flax_folder(source, tmp_path / "unet", "unet", "bfloat16")
    reference = UNet2DConditionModel.from_pretrained(source)
    for dtype in (jnp.bfloat16, jnp.float32):
        model = UNet2DConditionModel.from_pretrained(path, dtype=dtype)
        for ours, theirs in zip(parameters(model), parameters(reference), strict=True):
            assert ours.dtype == dtype
            np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16).astype(dtype))


def test_large_arrays_are_in_chunks(tmp_path, monkeypatch):
    """Flax cuts arrays of more than 1 GiB."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"embeddings": {"token_embedding": {"embedding": np.arange(60.0).reshape(20, 3)}}}
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree))
    loaded = weights.open_tensors(tmp_path / "a.msgpack")
    assert list(loaded) == ["embeddings.token_embedding.weight"]
    np.testing.assert_array_equal(loaded["embeddings.token_embedding.weight"], np.arange(60.0).reshape(20, 3))


def test_parameters_of_no_layer_keep_their_names(tmp_path):
    """The safety checker's concepts, CLIP's class embedding; names that end in a number in PyTorch too."""
    tree = {
        "concept_embeds": np.ones((17, 4)),
        "vision_model": {"vision_model": {"embeddings": {"class_embedding": np.ones(4)}}},
        "time_embedding": {"linear_1": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}},
        "ff": {"net_0": {"proj": {"kernel": np.ones((2, 6))}}, "net_2": {"bias": np.ones(3)}},
    }
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree))
    shapes = {name: array.shape for name, array in weights.open_tensors(tmp_path / "a.msgpack").items()}
    assert shapes == {
        "concept_embeds": (17, 4),
        "vision_model.vision_model.embeddings.class_embedding": (4,),
        "time_embedding.linear_1.weight": (3, 2),
        "time_embedding.linear_1.bias": (3,),
        "ff.net.0.proj.weight": (6, 2),
        "ff.net.2.bias": (3,),
    }


def test_pytorchs_files_go_first(sd1_folder, tmp_path):
    path = flax_folder(sd1_folder / "vae", tmp_path / "vae", "vae")
    shutil.copy(sd1_folder / "vae" / "diffusion_pytorch_model.safetensors", path)
    (path / "diffusion_flax_model.msgpack").write_bytes(b"not looked at")
    AutoencoderKL.from_pretrained(path)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file(sd1_folder, tmp_path, kept):
    path = flax_folder(sd1_folder / "vae", tmp_path / "vae", "vae") / "diffusion_flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"diffusion_flax_model\.msgpack: truncated"):
        AutoencoderKL.from_pretrained(path.parent)


@pytest.mark.parametrize("tree", [{"a": "text"}, {"a": {"kernel": 3}}, {"a": [1, 2]}, {1: {"kernel": 3}}])
def test_a_tree_of_something_else(tmp_path, tree):
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(CheckpointError, match=r"a\.msgpack: truncated, or no weights saved by Flax"):
        weights.open_tensors(tmp_path / "a.msgpack")
