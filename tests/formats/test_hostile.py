"""Files made to break what reads them give one error that names the file, at once and in little memory."""

import json
import os
import struct
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sdjax import CheckpointError, sampling
from sdjax.checkpoints import casting, lora, pickles, single_file, textual_inversion, weights
from sdjax.checkpoints.folder import fill, read_json
from sdjax.models import AutoencoderKL, CLIPTextModel, StableDiffusionSafetyChecker, UNet2DConditionModel
from sdjax.request import kinds
from sdjax.runtime import ahead
from sdjax.text import prompts
from sdjax.text.tokenizer import CLIPTokenizer

SECONDS = 5
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        module = import_module("fuzz")
        yield module
        del sys.modules["fuzz"]


@pytest.fixture(autouse=True)
def at_once():
    start = time.process_time()
    yield
    assert time.process_time() - start < 2 * SECONDS


@pytest.mark.parametrize("kinds", [("config", "weights", "header"), ("job", "arguments")])
def test_a_few_cases_of_the_script(fuzz, kinds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = fuzz.Fuzz(tmp_path, kinds)

    @settings(
        max_examples=150,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.data())
    def some(data):
        cases.check(data.draw)

    some()
    assert sum(cases.cases.values()) >= 150
    assert cases.slowest[0] < SECONDS


BASE = {
    UNet2DConditionModel: "UNET",
    AutoencoderKL: "VAE",
    CLIPTextModel: "TEXT",
    StableDiffusionSafetyChecker: "MODELS",
}
WRONG = [
    (UNet2DConditionModel, "layers_per_block", 10**9, "from 1 to 8"),
    (UNet2DConditionModel, "sample_size", 10**9, "from 1 to 1024"),
    (UNet2DConditionModel, "sample_size", 0, "from 1 to 1024"),
    (UNet2DConditionModel, "block_out_channels", [8, 0], "from 4 to 65536"),
    (UNet2DConditionModel, "block_out_channels", [8, 9], r"norm_num_groups=4 does not divide 9"),
    (UNet2DConditionModel, "block_out_channels", 8, "a list"),
    (UNet2DConditionModel, "block_out_channels", [8] * 100_000, "of length 1 to 6"),
    (UNet2DConditionModel, "attention_head_dim", 3, "does not divide 8"),
    (UNet2DConditionModel, "transformer_layers_per_block", 64, "transformer blocks, more than 160"),
    (UNet2DConditionModel, "norm_eps", float("nan"), "a finite number"),
    (UNet2DConditionModel, "in_channels", 10**400, "a whole number"),
    (UNet2DConditionModel, "in_channels", True, "a whole number"),
    (UNet2DConditionModel, "use_linear_projection", "no", "true or false"),
    (UNet2DConditionModel, "mid_block_type", {"a": [1]}, "a text or null"),
    (AutoencoderKL, "scaling_factor", 0, "from 1e-06"),
    (AutoencoderKL, "scaling_factor", None, "from 1e-06"),
    (AutoencoderKL, "latents_std", [0, 1, 1, 1], "from 1e-06"),
    (CLIPTextModel, "vocab_size", 10**8, "from 1 to"),
    (CLIPTextModel, "num_hidden_layers", 0, "from 1 to 64"),
    (CLIPTextModel, "num_attention_heads", 3, "does not divide 8"),
    (CLIPTextModel, "layer_norm_eps", "1e-5", "a finite number"),
]


@pytest.mark.parametrize(("cls", "field", "value", "message"), WRONG)
def test_configs_of_models(fuzz, tmp_path, cls, field, value, message):
    (tmp_path / "config.json").write_text(json.dumps({**getattr(fuzz, BASE[cls]), field: value}))
    with pytest.raises(CheckpointError, match=message) as error:
        cls.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json")) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train_timesteps", 10**12),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", "1000"),
        ("beta_end", 2),
        ("beta_start", None),
        ("trained_betas", [0.1, "x"]),
        ("steps_offset", -1),
        ("beta_schedule", ["linear"]),
        ("prediction_type", {"a": 1}),
        ("set_alpha_to_one", "no"),
        ("_use_default_values", 7),
        (1, 1),
    ],
)
def test_configs_of_schedulers(field, value):
    with pytest.raises(ValueError, match=str(field)):
        sampling.from_config({**sampling.from_config("ddim").config, "_use_default_values": (), field: value})


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", {"a": "x"}),
        ("vocab.json", {"a": -1}),
        ("vocab.json", {"a": 10**30}),
        ("tokenizer_config.json", {"model_max_length": 10**5}),
        ("tokenizer_config.json", {"model_max_length": 0.5}),
        ("tokenizer_config.json", {"model_max_length": "77"}),
        ("tokenizer_config.json", {"bos_token": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
        ("tokenizer.json", {"model": [1]}),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": [["a"]]}}),
    ],
)
def test_configs_of_tokenizers(fuzz, tmp_path, file, content):
    for name, own in {**fuzz.TOKENIZER, file: content}.items():
        (tmp_path / name).write_text(json.dumps(own))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    with pytest.raises(CheckpointError) as error:
        CLIPTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(os.name == "nt", reason="devices and pipes are files of Unix")
@pytest.mark.parametrize("make", [endless, os.mkfifo])
@pytest.mark.parametrize("read", [read_json, weights.open_tensors, pickles.load, ahead.load])
def test_files_without_an_end(tmp_path, make, read):
    make(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=r"a\.json: no regular file"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("content", ["[" * 10**6, '{"a":' * 10**5, '{"a": ' + "9" * 10**5 + "}", "[1]", "\ufeff{}"])
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"a\.json: not "):
        read_json(tmp_path / "a.json")


def test_json_that_is_too_large(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="larger than 16 MiB"):
        read_json(tmp_path / "a.json")


SHARED = b"\x80\x02}" + b"K\x01" + b"q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s."
PICKLES = {
    "a shared nested tuple as a key": SHARED,
    "the same in a set": b"\x80\x04K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"0\x8f(h\x00\x90.",
    "the same in an OrderedDict": b"\x80\x02K\x01q\x00"
    + b"h\x00h\x00\x86q\x00" * 60
    + b"0ccollections\nOrderedDict\n]h\x00K\x01\x86a\x85R.",
    "a huge memo index": b"\x80\x02]r\xff\xff\xff\x0fj\xfe\xff\xff\x0f.",
    "colliding keys": b"\x80\x02}("
    + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 30_000))
    + b"u.",
    "an integer of a million digits": b"\x80\x02\x8b\x40\x42\x0f\x00" + b"\x7f" * 1_000_000 + b".",
    "many operations": b"\x80\x02]" + b"]0" * 600_000 + b".",
    "a list copied again and again": b"\x80\x02]("
    + b"K\x01" * 100_000
    + b"eq\x00"
    + b"cbuiltins\nset\nh\x00\x85R0" * 1000
    + b".",
    "a text encoded again and again": b"\x80\x02X\x40\x42\x0f\x00"
    + b"a" * 1_000_000
    + b"q\x00X\x06\x00\x00\x00latin1q\x01"
    + b"c_codecs\nencode\nh\x00h\x01\x86R0" * 1000
    + b".",
    "an empty stack": b"\x80\x02K\x01a.",
    "no mark": b"\x80\x02K\x01t.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_bombs_in_pickles(tmp_path, name):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", PICKLES[name])
    with pytest.raises(CheckpointError, match=r"a\.ckpt: "):
        pickles.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02]" + b"N" * 10**6 + b".")
    with pytest.raises(CheckpointError, match=r"data\.pkl' is compressed"):
        pickles.load(path)


def repeated(fuzz, path: Path, name: str, *shape: int) -> Path:
    """A file with a tensor whose strides are 0: many numbers out of one."""
    wanted = fuzz.shape(shape)
    program = fuzz.program({name: np.zeros(4, np.float32)})
    program = program.replace(fuzz.shape((4,)), wanted).replace(fuzz.shape((1,)), fuzz.shape((0,) * len(shape)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", bytes(16))
    return path


def test_tensors_of_stride_0(fuzz, tmp_path):
    assert pickles.load(repeated(fuzz, tmp_path / "a.pt", "a", 3, 4))["a"].shape == (3, 4)
    with pytest.raises(CheckpointError, match="it unfolds to more than 4 times the size of the file"):
        pickles.load(repeated(fuzz, tmp_path / "a.pt", "a", 10**8, 768))


def safetensors(path: Path, header: object, content: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "of 100 MB": (b"{" + b" " * (17 << 20), 17 << 20),
    "nested": (b'{"a":' * 100_000, None),
    "overlapping": ({f"a{i}": ENTRY for i in range(100)}, None),
    "a shape of many digits": ({"a": {**ENTRY, "shape": [10**400]}}, None),
    "a shape of fractions": ({"a": {**ENTRY, "shape": [2.0]}}, None),
    "offsets of texts": ({"a": {**ENTRY, "data_offsets": ["0", "8"]}}, None),
    "a long name": ({"a." * 100_000: ENTRY}, None),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_safetensors(tmp_path, kind):
    header, length = HEADERS[kind]
    path = safetensors(tmp_path / "a.safetensors", header, bytes(8), length)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: ") as error:
        weights.open_tensors(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.999999999999999999.0.op.weight",
        "output_blocks.\u00b2.0.in_layers.0.weight",
    ],
)
def test_numbers_in_names_are_not_counted_to(fuzz, tmp_path, name):
    tensors = fuzz.contents()["unet"] | {f"model.diffusion_model.{name}": np.ones(2, np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
        single_file.read(tmp_path / "a.safetensors")


def test_many_levels(fuzz, tmp_path):
    for count, message in ((30_000, "30,000 tensors"), (10_000, "a.safetensors: ")):
        names = {f"down_blocks.{i}.resnets.0.conv1.bias": np.ones(1, np.float32) for i in range(count)}
        save_file(names, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=message):
            single_file.read(tmp_path / "a.safetensors")


def test_words_of_many_vectors(tmp_path):
    save_file({"<x>": np.zeros((100_000, 8), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="100,000 vectors for one word, more than 1,000"):
        textual_inversion.read(tmp_path / "a.safetensors")
    save_file({"<x>": np.full((1, 8), 1e300)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="finite numbers"):
        textual_inversion.read(tmp_path / "a.safetensors")


KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 2, "lora_alpha": 10**400}, "lora_alpha="),
        ({"r": -2, "lora_alpha": 1}, "r=-2"),
        ({"r": 2, "alpha_pattern": {"(a+)+x": 1}}, "pattern that is not supported"),
        ({"r": 2, "alpha_pattern": {".*.*.*.*.*.*.*x": 1}}, "pattern that is not supported"),
        ({"r": 2, "alpha_pattern": {r"(.)\1x": 1}}, "pattern that is not supported"),
        ([["r", 2]], "no JSON object"),
    ],
)
def test_configs_of_loras(fuzz, tmp_path, config, message):
    tensors = {f"{KEY}.lora_A.weight": np.ones((2, 8), np.float32), f"{KEY}.lora_B.weight": np.ones((8, 2), np.float32)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(CheckpointError, match=message):
        lora.read(path, {"unet": {f"{KEY.removeprefix('unet.')}.weight": (8, 8)}}, fuzz.UNET)


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [(1e300, "float64", "float32"), (1e30, "float32", "float16"), (3.4e38, "float32", "bfloat16")],
)
def test_weights_that_overflow_are_named(fuzz, value, source, target):
    model = AutoencoderKL.described(AutoencoderKL.config_class.from_dict({**fuzz.VAE, "force_upcast": False}), target)
    tensors = [(name, np.ones(own, source)) for name, own in fuzz.shapes(model).items()]
    tensors[3][1].flat[-1] = value
    with pytest.raises(CheckpointError, match=f"too large: {tensors[3][0]} for {target}"):
        fill(model, tensors, source="a")
    assert casting.cast(np.array([value], source), np.dtype(source)) is not None


@pytest.mark.parametrize("text", [f"(goose:{'9' * 400})", "(goose:10000000)"])
def test_weights_of_words_are_bounded(text):
    with pytest.raises(ValueError, match=r"goose.*: its weight .* is more than 1e"):
        prompts.parse(text)
    assert prompts.parse("(goose:1000)") == [("goose", 1000.0)]


@pytest.mark.parametrize("value", [1e39, -1e39, 10**400, float("nan")])
def test_numbers_of_requests_are_bounded(value):
    with pytest.raises(ValueError, match="guidance_scale must be a finite number from"):
        kinds.NUMBER.check("guidance_scale", value)
    with pytest.raises(ValueError, match="sigmas"):
        sampling.from_config("euler").table(sigmas=[value, 0])
    with pytest.raises(ValueError, match="original_size"):
        kinds.PAIR.check("original_size", (10**400, 1))


@pytest.mark.parametrize("header", [b"", b"[1]", b"{}", b"[" * 100_000, b'{"digest": 1}', b"\xff"])
def test_compiled_programs_with_another_header(tmp_path, header):
    (tmp_path / "a.bin").write_bytes(ahead.MAGIC + header + b"\ncontent")
    with pytest.raises(ValueError, match=r"a\.bin: damaged"):
        ahead.load(tmp_path / "a.bin")
