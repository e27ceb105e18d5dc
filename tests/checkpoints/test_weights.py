"""Weights in every file format, variant and number of shards give the same model; what does not fit is named."""

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import nnx, serialization
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from sdjax.checkpoints import casting, content, memory, weights
from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel

STEM = "diffusion_pytorch_model"
SAFETENSORS, PICKLE = f"{STEM}.safetensors", f"{STEM}.bin"


def same(first: nnx.Module, second: nnx.Module) -> bool:
    """Whether the parameters are alike, bit for bit."""
    ours, theirs = (jax.tree.leaves(nnx.state(module)) for module in (first, second))
    return all(a.dtype == b.dtype and bool((a == b).all()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def vae(sd2_folder, tmp_path) -> Path:
    """A copy of a VAE's folder without its weights."""
    (tmp_path / "vae").mkdir()
    shutil.copy(sd2_folder / "vae" / "config.json", tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def reference(sd2_folder) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(sd2_folder / "vae")


@pytest.fixture
def tensors(sd2_folder) -> dict[str, torch.Tensor]:
    return load_file(sd2_folder / "vae" / SAFETENSORS)


def error_of(path: Path, variant: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        AutoencoderKL.from_pretrained(path, variant=variant)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_pytorch_bin(vae, reference, tensors, legacy, wrapped):
    value = {"state_dict": tensors, "epoch": 3} if wrapped else tensors
    torch.save(value, vae / PICKLE, _use_new_zipfile_serialization=not legacy)
    assert same(AutoencoderKL.from_pretrained(vae), reference)


def test_what_diffusers_and_transformers_save_as_bin(sd1_folder, tmp_path):
    kinds = {
        "unet": (UNet2DConditionModel, diffusers.UNet2DConditionModel),
        "text_encoder": (CLIPTextModel, transformers.CLIPTextModel),
    }
    for name, (ours, theirs) in kinds.items():
        model = theirs.from_pretrained(sd1_folder / name)
        model.save_pretrained(tmp_path / name)
        if name == "unet":
            model.save_pretrained(tmp_path / name, safe_serialization=False)
        else:  # transformers 5 writes safetensors only
            torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
        [file] = (tmp_path / name).glob("*.safetensors")
        file.unlink()
        assert same(ours.from_pretrained(tmp_path / name), ours.from_pretrained(sd1_folder / name))


def test_safetensors_go_before_bin(vae, reference, tensors):
    save_file(tensors, vae / SAFETENSORS)
    (vae / PICKLE).write_bytes(b"not looked at")
    assert same(AutoencoderKL.from_pretrained(vae), reference)


@pytest.mark.parametrize("size", ["20KB", "200KB"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(sd1_folder, tmp_path, size, safe, variant):
    model = diffusers.UNet2DConditionModel.from_pretrained(sd1_folder / "unet")
    model.save_pretrained(tmp_path, max_shard_size=size, safe_serialization=safe, variant=variant)
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, variant=variant)
    assert same(loaded, UNet2DConditionModel.from_pretrained(sd1_folder / "unet"))


def test_shards_of_transformers(sd1_folder, tmp_path):
    model = transformers.CLIPTextModel.from_pretrained(sd1_folder / "text_encoder")
    model.save_pretrained(tmp_path, max_shard_size="40KB", variant="fp16")
    assert (tmp_path / "model.safetensors.index.fp16.json").is_file()
    loaded = CLIPTextModel.from_pretrained(tmp_path, variant="fp16")
    assert same(loaded, CLIPTextModel.from_pretrained(sd1_folder / "text_encoder"))


@pytest.fixture
def sharded(sd2_folder, tmp_path) -> Path:
    model = diffusers.AutoencoderKL.from_pretrained(sd2_folder / "vae")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    return tmp_path / "sharded"


def index_of(path: Path) -> tuple[Path, dict]:
    index = path / f"{SAFETENSORS}.index.json"
    return index, json.loads(index.read_text())


def test_a_shard_that_is_missing(sharded):
    shard = sorted(sharded.glob("*-of-*"))[1]
    shard.unlink()
    assert f"has no {shard.name}" in error_of(sharded)


def test_a_shard_that_lacks_a_tensor(sharded):
    index, content = index_of(sharded)
    _, shard = next(iter(content["weight_map"].items()))
    content["weight_map"]["decoder.more.weight"] = shard
    index.write_text(json.dumps(content))
    message = error_of(sharded)
    assert str(sharded / shard) in message
    assert message.endswith("decoder.more.weight")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": {"a": 1}}', '{"weight_map": 3}'])
def test_an_index_that_is_none(sharded, content):
    index, _ = index_of(sharded)
    index.write_text(content)
    assert str(index) in error_of(sharded)


def test_an_index_never_leads_out_of_its_folder(sharded, tensors):
    save_file(tensors, sharded.parent / "outside.safetensors")
    index, _ = index_of(sharded)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../outside.safetensors")}))
    assert "has no ../outside.safetensors" in error_of(sharded)


def test_a_variant(vae, tensors):
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, vae / SAFETENSORS)
    save_file(halves, vae / f"{STEM}.fp16.safetensors")
    full, half = AutoencoderKL.from_pretrained(vae), AutoencoderKL.from_pretrained(vae, variant="fp16")
    name = "encoder.conv_in.weight"
    np.testing.assert_array_equal(full.encoder.conv_in.kernel[...], tensors[name].permute(2, 3, 1, 0))
    np.testing.assert_array_equal(half.encoder.conv_in.kernel[...], halves[name].float().permute(2, 3, 1, 0))


def test_a_component_without_the_variant_is_read_without_it(vae, reference, tensors):
    save_file(tensors, vae / SAFETENSORS)
    assert same(AutoencoderKL.from_pretrained(vae, variant="fp16"), reference)


def test_the_variants_that_are_there_are_named(vae, tensors):
    save_file(tensors, vae / f"{STEM}.fp16.safetensors")
    torch.save(tensors, vae / f"{STEM}.non_ema.bin")
    (vae / f"{STEM}.bf16-00001-of-00002.safetensors").touch()
    for variant in (None, "int8"):
        message = error_of(vae, variant)
        assert "variant='fp16', but variant='non_ema'" in message
        assert SAFETENSORS in message
        assert "bf16" not in message


def test_names_of_files():
    names = ("a.safetensors", "b/A.SAFETENSORS", "a.sft", "a.fp16.Ckpt", "a.pt", "a.PTH", "a.bin", "a.msgpack")
    assert all(content.is_weight_name(name) for name in names)
    assert not any(content.is_weight_name(name) for name in ("a", "a.gguf", "safetensors", "a.safetensors.json"))
    assert [content.without_ending(name) for name in ("a.b.SAFETENSORS", "a.sft", "a.b")] == ["a.b", "a", "a.b"]


FORMATS = {
    "safetensors": lambda tensors, path: save_file(tensors, path),
    "zip": lambda tensors, path: torch.save(tensors, path),
    "stream": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "protocol 3": lambda tensors, path: torch.save(
        tensors, path, _use_new_zipfile_serialization=False, pickle_protocol=3
    ),
    "msgpack": lambda tensors, path: path.write_bytes(
        serialization.msgpack_serialize({name: x.numpy() for name, x in tensors.items()})
    ),
}


@pytest.mark.parametrize("written", FORMATS)
@pytest.mark.parametrize("name", ["a.safetensors", "A.SAFETENSORS", "a.sft", "a.ckpt", "a.pt", "a.BIN", "a.pth", "a"])
def test_the_content_says_what_a_file_is_not_its_name(tmp_path, written, name):
    tensors = {f"layer{i}": torch.full((2, 3), float(i)) for i in range(3)}
    FORMATS[written](tensors, tmp_path / name)
    loaded = weights.open_tensors(tmp_path / name)
    assert loaded.keys() == tensors.keys()
    assert all((loaded[key] == tensors[key].numpy()).all() for key in tensors)


@pytest.mark.parametrize("count", [1, 15, 16, 70_000])
def test_msgpack_of_every_size_is_known(tmp_path, count):
    """Its first byte depends on how many entries there are."""
    (tmp_path / "a").write_bytes(serialization.msgpack_serialize(dict.fromkeys(map(str, range(count)), np.zeros(1))))
    assert content.format_of(tmp_path / "a") == "msgpack"


def test_a_folder_whose_safetensors_is_a_pickle(vae, reference, tensors):
    torch.save(tensors, vae / SAFETENSORS)
    assert same(AutoencoderKL.from_pretrained(vae), reference)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NO_WEIGHTS = {
    "a pointer": (POINTER, "no weights: it is a Git LFS pointer"),
    "a page": (b"<!DOCTYPE html><html>403</html>", "no weights: it is a web page"),
    "a page after a mark and blanks": (b"\xef\xbb\xbf\r\n <HTML lang=en>", "no weights: it is a web page"),
    "gzip": (gzip.compress(bytes(99)), "no weights: it is compressed with gzip: unpack it first"),
    "gguf": (b"GGUF" + bytes(40), "no weights: it is quantised weights in GGUF"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(40), "no weights: it is a picture, where a network is needed"),
    "nothing": (b"", "truncated: the file is empty"),
}


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a", "a.gguf"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_a_download_leaves_in_place_of_weights_is_named(tmp_path, name, kind):
    written, message = NO_WEIGHTS[kind]
    (tmp_path / name).write_bytes(written)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        weights.open_tensors(tmp_path / name)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("model.safetensors", b"x")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .* zip archive of something else; .*unpack it first"):
        weights.open_tensors(tmp_path / "a.safetensors")


def test_text_of_some_other_name(tmp_path):
    (tmp_path / "notes.txt").write_text("a goose")
    with pytest.raises(CheckpointError, match=r"notes\.txt: no weights: neither safetensors, nor saved by PyTorch"):
        weights.open_tensors(tmp_path / "notes.txt")


def test_metadata_that_is_null_says_nothing(tmp_path):
    """The Rust library lets it pass."""
    header = b'{"__metadata__": null}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with safe_open(tmp_path / "a.safetensors", "np") as theirs:
        assert theirs.metadata() is None
    assert weights.read_metadata(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("metadata", [["v"], "v", {"modelspec.prediction_type": 1}, {"a": None}])
def test_metadata_that_is_not_texts_by_name(tmp_path, metadata):
    header = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: no safetensors file: __metadata__ .* not texts by name"
    ):
        weights.read_metadata(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.ckpt", "a.msgpack"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 100, b"{}" * 20])
def test_a_file_that_is_something_else(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: truncated"):
        weights.open_tensors(tmp_path / name)


HEADERS = {
    "a dtype that is none": {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}},
    "too few bytes": {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},
    "past the end": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}},
    "a negative offset": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
    "a negative shape": {"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}},
    "offsets in words": {"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
    "fields left out": {"a": {"dtype": "F32"}},
    "no object": [1, 2],
    "no objects": {"a": 3},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_are_not_right(tmp_path, kind):
    header = json.dumps(HEADERS[kind]).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: truncated or no safetensors file"):
        weights.open_tensors(path)


@pytest.mark.parametrize("dtype", sorted({np.dtype(d).name for d in weights.DTYPES.values()} - {"float8_e4m3fn"}))
def test_every_dtype_of_safetensors(tmp_path, dtype):
    if dtype == "float8_e5m2":
        array = torch.arange(6.0).reshape(2, 3).to(torch.float8_e5m2)
        save_file({"a": array}, tmp_path / "a.safetensors")
    else:
        save_numpy(
            {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.zeros((), dtype)}, tmp_path / "a.safetensors"
        )
    loaded = weights.open_tensors(tmp_path / "a.safetensors")["a"]
    assert loaded.dtype == dtype
    expected = np.arange(6).reshape(2, 3) > 0 if dtype == "bool" else np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(loaded.astype(np.float64), expected)


def resident(field: str) -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="counts pages as Linux does")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_is_read_where_it_is_looked_at_and_given_back(tmp_path, kind):
    size = 32 << 20
    array = np.random.default_rng(0).integers(0, 0x7000, size // 2, np.uint16).view(np.float16)
    path = tmp_path / f"a.{kind}"
    if kind == "bin":
        torch.save({"a": torch.from_numpy(array)}, path)
    else:
        save_numpy({"a": array}, path)
    before = resident("RssFile")
    loaded = weights.open_tensors(path)["a"]
    assert resident("RssFile") - before < size / 8
    assert loaded.view(np.uint16).max() < 0x7000
    assert resident("RssFile") - before > size * 7 / 8
    memory.release(loaded)
    assert resident("RssFile") - before < size / 8
    np.testing.assert_array_equal(loaded, array)


HALVES = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("target", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16])
def test_all_halves_are_cast_as_numpy_does(source, target):
    values = HALVES.view(source)
    finite = values[np.isfinite(values.astype(np.float32))]
    with np.errstate(over="ignore"):
        expected = finite.astype(target)
    fits = np.isfinite(expected.astype(np.float64))
    np.testing.assert_array_equal(
        casting.cast(finite[fits], np.dtype(target)).view(np.uint8), expected[fits].view(np.uint8)
    )
    for value in [*values[~np.isfinite(values.astype(np.float32))], *finite[~fits][:100]]:
        assert casting.cast(np.array([0, value, 1], source), np.dtype(target)) is None


def test_floats_are_rounded_to_bfloat16_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    ties = (np.arange(0, 0x7F80, 7, dtype=np.uint32) << 16) + 0x8000
    values = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    values = values[np.isfinite(torch.from_numpy(values).bfloat16().float().numpy())]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    np.testing.assert_array_equal(casting.cast(values, np.dtype(jnp.bfloat16)).view(np.int16), expected)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e5m2"])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    array = np.zeros((300, 600), dtype)
    for strides in (array, array.T):
        assert casting.cast(strides, np.dtype(np.float32)) is not None
        array[299, 599] = value
        assert casting.cast(strides, np.dtype(np.float32)) is None
        array[299, 599] = 0


SHAPES = [
    (),
    (0,),
    (5,),
    (1, 1),
    (300, 700),
    (0, 3),
    (3, 0),
    (130, 60, 3, 3),
    (300, 4, 1, 1),
    (2, 130, 14, 14),
    (2, 3, 40, 40),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16, np.int64])
def test_kernels_of_every_shape_are_transposed(shape, dtype):
    array = np.random.default_rng(0).normal(0, 9, shape).astype(dtype)
    for axes in ((2, 3, 1, 0), (3, 2, 0, 1), (0, 1, 2, 3)) if len(shape) == 4 else (None,):
        view = array.transpose(axes)
        cast = casting.cast(view, np.dtype(np.float32))
        assert cast.flags.c_contiguous
        np.testing.assert_array_equal(cast, view.astype(np.float32))


def test_jobs_are_done_in_order_and_only_so_many_are_begun():
    begun = []
    results = casting.in_parallel(lambda i: i * i, ((begun.append(i) or i,) for i in range(100)))
    for i, result in enumerate(results):
        assert result == i * i
        assert len(begun) <= i + casting.WORKERS + 2


def test_an_error_in_a_job_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(casting.in_parallel(lambda i: 1 // i, ((i,) for i in (2, 1, 0))))
