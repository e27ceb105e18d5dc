"""Every format of a folder gives PyTorch's picture of the same weights."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from flax import nnx
from references import TOLERANCE, VAE_FILE, assert_pictures, load, their_picture
from saved_formats import save, save_flax, save_mixed, save_pickles, write_json

from sdjax import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers

HALF = {"dtype": torch.float16, "variant": "fp16"}
FORMATS: dict[str, tuple[Callable, dict[str, Any], dict[str, Any], str]] = {
    "safetensors": (save, {}, {}, VAE_FILE),
    "fp16": (save, HALF, {"variant": "fp16"}, "vae/diffusion_pytorch_model.fp16.safetensors"),
    "halves": (save, {"dtype": torch.bfloat16}, {}, VAE_FILE),
    "shards": (save, {"max_shard_size": "40KB"}, {}, "unet/diffusion_pytorch_model.safetensors.index.json"),
    "fp16 shards": (
        save,
        {**HALF, "max_shard_size": "20KB"},
        {"variant": "fp16"},
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ),
    "bin": (save_pickles, {}, {}, "unet/diffusion_pytorch_model.bin"),
    "bin shards": (save_pickles, {"max_shard_size": "40KB"}, {}, "unet/diffusion_pytorch_model.bin.index.json"),
    "mixed": (save_mixed, {}, {"variant": "fp16"}, "vae/diffusion_pytorch_model.bin"),
    "flax": (save_flax, {}, {}, "unet/diffusion_flax_model.msgpack"),
    "flax bf16": (save_flax, {"dtype": ml_dtypes.bfloat16}, {}, "unet/diffusion_flax_model.msgpack"),
}
"""name -> (what saves it, its options, those of loading, a file that such a folder has)"""

OTHERS = {
    "sd1": ("bin shards", "mixed", "flax"),
    "sd2": ("fp16", "bin", "flax bf16"),
    "refiner": ("fp16", "shards"),
    "lcm": ("fp16 shards", "bin"),
}
CASES = [*(("sdxl", name) for name in FORMATS), *((kind, name) for kind, names in OTHERS.items() for name in names)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_folders(references, tmp_path, kind, name):
    write, options, loading, file = FORMATS[name]
    write(references(kind).pipe, tmp_path, **options)
    assert (tmp_path / file).is_file()
    assert_pictures(load(tmp_path, **loading), references(kind))


def test_a_variant_is_what_was_asked_for(references, tmp_path):
    half = references("sd1")
    other = oracle.pipeline(tmp_path / "other", oracle.SD1)
    save(half.pipe, tmp_path / "both", **HALF)
    with pytest.raises(CheckpointError, match=r"(?s)text_encoder: has no model.safetensors.*variant='fp16'"):
        load(tmp_path / "both")
    save(other, tmp_path / "both")
    assert_pictures(load(tmp_path / "both", variant="fp16"), half)
    full = half._replace(picture=their_picture(other, half.call))
    assert np.abs(full.picture - half.picture).max() > 10 * TOLERANCE
    assert_pictures(load(tmp_path / "both"), full)


def dtypes(model: nnx.Module) -> set[Any]:
    return {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))}


def test_dtypes(references, tmp_path):
    reference = references("sd1")
    save(reference.pipe, tmp_path, torch.float16)
    kept = load(tmp_path, dtype="auto")
    assert {jnp.dtype("float16")} == dtypes(kept.unet) | dtypes(kept.vae) | dtypes(kept.text_encoder)
    assert_pictures(kept, reference)
    pipe = load(tmp_path, dtype="bfloat16")
    assert {jnp.dtype("bfloat16")} == dtypes(pipe.unet) | dtypes(pipe.vae) | dtypes(pipe.text_encoder)
    assert_pictures(pipe, reference, 0.15)
    pipe = load(tmp_path, dtype=jnp.float16)
    assert (dtypes(pipe.unet), dtypes(pipe.vae)) == ({jnp.dtype("float16")}, {jnp.dtype("float32")})
    assert_pictures(pipe, reference, 2e-2)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    write_json(tmp_path / "vae" / "config.json", {**config, "force_upcast": False})
    assert dtypes(load(tmp_path, dtype="float16").vae) == {jnp.dtype("float16")}
