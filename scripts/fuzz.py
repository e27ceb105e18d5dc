"""Fuzzes what reads what comes in, with hypothesis: configs, every byte and structure of each weight format, jobs in
JSON lines, CSV and YAML, and the arguments of `generate` and `batch`.

    python scripts/fuzz.py --minutes 5 --kinds job arguments

Whatever a file holds or an argument says, the answer is values or one error (ValueError, OSError) within 5 seconds; no
model runs. Prints the cases by
kind, each other exception once, the slowest case and the peak memory; exit status 1 where there was one.
tests/formats/test_hostile.py runs a few of the same.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from sdjax import sampling
from sdjax.batch import job
from sdjax.checkpoints import casting, folder, hub, ldm, lora, single_file, textual_inversion
from sdjax.commands.main import main as main_of_sdjax
from sdjax.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
)
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import FIELDS, kinds
from sdjax.text.tokenizer import CLIPTokenizer

LIMIT = 5.0
KINDS = ("config", "weights", "header", "job", "arguments")
UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "transformer_layers_per_block": [1, 1],
}
VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.2,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
TINY = {name: [1, 1] for name in ("num_encoder_blocks", "num_decoder_blocks")} | {
    name: [8, 8] for name in ("encoder_block_out_channels", "decoder_block_out_channels")
}
TEXT = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unet": (UNet2DConditionModel, UNET),
    "vae": (AutoencoderKL, VAE),
    "tiny": (AutoencoderTiny, TINY),
    "text": (CLIPTextModel, TEXT),
    "safety_checker": (StableDiffusionSafetyChecker, {"vision_config": VISION, "projection_dim": 8}),
}
TOKENS = {
    token: i for i, token in enumerate(["a", "b", "a</w>", "b</w>", "ab</w>", "!", "<|startoftext|>", "<|endoftext|>"])
}
TOKENIZER = {
    "vocab.json": TOKENS,
    "tokenizer_config.json": {
        "model_max_length": 77,
        "pad_token": "!",
        "added_tokens_decoder": {"8": {"content": "<x>"}},
    },
}
SCHEDULER = {
    name: dict(sampling.from_config(name).config) for name in ("pndm", "euler_karras", "dpmpp_2m", "unipc", "lcm")
}

NUMBERS = (0, -1, 1, 2, 3, 7, 33, 10**6, 10**9, 10**12, 2**31, 2**63, 10**30, 10**400, 0.5, -0.5, 1e-300, 1e30, 1e300)
ODD = st.recursive(
    st.sampled_from([*NUMBERS, float("nan"), float("inf"), -float("inf"), None, True, False, "", "x", "a" * 5000])
    | st.integers()
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    for key, own in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(own)


@st.composite
def altered(draw: Callable, value: Any) -> Any:
    """A JSON value with one to three of its values replaced, left out, or put where they were not."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(list(places(value)) or [(value, "x")]))
        if draw(st.integers(0, 5)):
            container[key] = draw(ODD)
        else:
            del container[key]
        if not list(places(value)):
            break
    return value


@st.composite
def damaged(draw: Callable, content: bytes) -> bytes:
    """Bytes of which one to four places are overwritten, left out, doubled or cut off after."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)) | st.integers(0, min(300, max(len(data) - 1, 0))))
        length = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 40]))
        kind = draw(st.sampled_from(["bits", "bytes", "out", "double", "cut", "same"]))
        if kind == "bits" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "out":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "same":
            data[at : at + length] = bytes([draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))]) * length
        elif not draw(st.integers(0, 3)):
            del data[at:]
    return bytes(data)


def shape(value: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in value) + b"t"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def program(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The pickle that PyTorch writes of tensors, each with a storage of its own."""
    parts = [b"\x80\x02}q\x00("]
    for i, (name, array) in enumerate(tensors.items()):
        storage = (
            text("storage")
            + b"ctorch\nFloatStorage\n"
            + text(str(i))
            + text("cpu")
            + b"J"
            + struct.pack("<i", array.size)
        )
        strides = tuple(step // array.itemsize for step in array.strides)
        arguments = (
            b"(" + storage + b"tQK\x00" + shape(array.shape) + shape(strides) + b"\x89ccollections\nOrderedDict\n)R"
        )
        parts.append(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR")
    return b"".join([*parts, b"u."])


def as_zip(tensors: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program(tensors))
        for i, array in enumerate(tensors.values()):
            archive.writestr(f"a/data/{i}", array.tobytes())
    return file.getvalue()


def as_stream(tensors: Mapping[str, np.ndarray]) -> bytes:
    head = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}" + text("little_endian") + b"\x88s."
    keys = b"\x80\x02](" + b"".join(text(str(i)) for i in range(len(tensors))) + b"e."
    storages = [struct.pack("<q", array.size) + array.tobytes() for array in tensors.values()]
    return b"".join([head, program(tensors), keys, *storages])


def as_msgpack(tensors: Mapping[str, np.ndarray]) -> bytes:
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        array = folder.flax_layout(name, array)
        content = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        node[leaf] = msgpack.ExtType(1, content)
    return msgpack.packb(tree)


FORMATS = {"safetensors": save, "zip": as_zip, "stream": as_stream, "msgpack": as_msgpack}


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: folder.torch_shape(name, own.shape) for name, own in folder.variables(model).items()}


def contents() -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a UNet in the original layout, of a LoRA and its kin, and of a word."""
    config = UNet2DConditionModel.config_class.from_dict(UNET)
    names = shapes(UNet2DConditionModel.described(config, jnp.float32))
    unet = {
        f"model.diffusion_model.{ldm.unet_name(name, UNET)}": np.ones(own, np.float32) for name, own in names.items()
    }
    up, down, key = (
        np.ones((8, 2), np.float32),
        np.ones((2, 8), np.float32),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to",
    )
    word = {"<x>": np.ones((2, 8), np.float32)}
    adapters = {
        f"{key}_q.lora_up.weight": up,
        f"{key}_q.lora_down.weight": down,
        f"{key}_q.alpha": np.ones((), np.float32),
    }
    adapters |= {
        f"{key}_k.hada_{part}": own for part, own in (("w1_a", up), ("w1_b", down), ("w2_a", up), ("w2_b", down))
    }
    adapters |= {f"{key}_v.lokr_w1": np.ones((2, 2), np.float32), f"{key}_v.lokr_w2": np.ones((4, 4), np.float32)}
    return {"unet": unet, "lora": adapters, "word": word}


def read_weights(kind: str, path: Path, names: Mapping[str, tuple[int, ...]]) -> None:
    """What loading such a file does, up to the arrays."""
    if kind == "word":
        textual_inversion.read(path)
    elif kind == "lora":
        for changes in lora.read(path, {"unet": names}, UNET).values():
            for name, change in changes.items():
                with np.errstate(all="ignore"):
                    casting.cast(change(np.ones(names[name], np.float32)), np.dtype(np.float32))
    else:
        for part in single_file.read(path).components.values():
            for _, array in part.tensors():
                casting.cast(array, np.dtype(np.float16))


def read_config(kind: str, value: Any, path: Path) -> None:
    """Reads a config as it lies in a folder. Of a model's that is accepted, the program of it is traced."""
    if kind in MODELS:
        cls = MODELS[kind][0]
        path = path.with_name("config.json")
        path.write_text(json.dumps(value))
        config = cls.config_class.from_dict(folder.read_json(path))
        model = cls.described(config, jnp.float32)
        try:
            traced(kind, model, config)
        except Exception as error:
            raise AssertionError(f"{kind}: accepted, and not to be computed: {error}") from error
    elif kind in TOKENIZER:
        for name, own in TOKENIZER.items():
            (path.parent / name).write_text(json.dumps(value if name == kind else own))
        (path.parent / "merges.txt").write_text("#version: 0.2\na b</w>\n")
        CLIPTokenizer.from_pretrained(path.parent)("a <x> b")
    else:
        path.write_text(json.dumps(value))
        sampling.from_config(folder.read_json(path)).table(3)


def traced(kind: str, model: Any, config: Any) -> None:
    """The shapes of what a model gives."""

    def picture(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.float32)

    if kind == "unet" and config.addition_embed_type is None and config.time_cond_proj_dim is None:
        width = config.cross_attention_dim
        width = width[0] if isinstance(width, tuple) else width
        jax.eval_shape(
            lambda m, *a: m(*a), model, picture(1, 8, 8, config.in_channels), picture(1), picture(1, 7, width)
        )
    elif kind in ("vae", "tiny"):
        jax.eval_shape(lambda m, z: m.decode(z), model, picture(1, 8, 8, config.latent_channels))
    elif kind == "text":
        ids = jax.ShapeDtypeStruct((1, min(7, config.max_position_embeddings)), jnp.int32)
        jax.eval_shape(lambda m, ids: m.encode(ids), model, ids)


ROWS = [
    {"prompt": "a goose", "seed": "0:4", "guidance_scale": [3, 5], "loras": {"style.safetensors": 0.8}},
    {
        "prompt": ["a", "b"],
        "negative_prompt": None,
        "scheduler": "euler",
        "timesteps": [999, 499.5],
        "seed": [1, "3:5"],
    },
    {"prompt": "a (goose:1.3)", "guidance_interval": "0.3:5", "original_size": [8, 9], "vae_tiling": True, "width": 64},
]
OPTIONS = {
    **{spec.option: "7" for spec in FIELDS.values() if spec.option and spec.kind is not kinds.FLAG},
    "--seeds": "0:4,9",
    "--sampler": "euler",
    "--size": "64x64",
    "--guidance-interval": "0.3:5",
    "--timesteps": "999,499",
    "--original-size": "8x9",
    "--lora": "style.safetensors:0.8",
    "--embedding": "cat.pt:<cat>",
    "--out": "out",
    "--model": "nowhere",
    "--dtype": "float16",
}
OWN_OPTIONS = {
    "generate": {"--grid": "2x2", "--from": "a.png", "--compiled": "a.bin"},
    "batch": {
        "--prompts": "a.txt",
        "--batch": "4",
        "--chunk-size": "8",
        "--format": "files",
        "--image-format": "webp",
        "--share": "1/2",
        "--status": "out",
    },
}
SAID = ["", "-", "--", "9" * 401, "1e999", "nan", "\ud800", "a\0b", "\n", "x" * 5000, "[" * 5000, "0:99999999", "a::b"]
SAID += ["-1:", "file://localhost/x", "data:x", "/dev/full", "(a:1e9)", "[a|b]", "a AND b", "{}", "null", "1:2:3", "@"]
TEXTS = st.text(max_size=8) | st.sampled_from(SAID)


def as_yaml(rows: list[Any]) -> str:
    """JSON is YAML; with anchors and aliases where a value is there again."""
    return (
        "\n".join(f"- &row{i} {json.dumps(row)}" for i, row in enumerate(rows))
        + f"\n- {{<<: *row0, seed: {len(rows)}}}"
    )


def as_csv(rows: list[Any]) -> str:
    file = io.StringIO()
    fitting = [row if isinstance(row, dict) else {"prompt": row} for row in rows] or [{}]
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in fitting for key in row)))
    writer.writeheader()
    writer.writerows([{key: json.dumps(value) for key, value in row.items()} for row in fitting])
    return file.getvalue()


JOBS = {"jsonl": lambda rows: "\n".join(map(json.dumps, rows)), "yaml": as_yaml, "csv": as_csv}


@st.composite
def arguments(draw: Callable, command: str) -> list[str]:
    """Options of a command, some with other values, and a job or a prompt."""
    known = OPTIONS | OWN_OPTIONS[command]
    chosen = draw(st.lists(st.sampled_from(list(known)), max_size=5))
    texts = [known[option] if draw(st.integers(0, 2)) == 0 else draw(TEXTS) for option in chosen]
    given = [part for pair in zip(chosen, texts, strict=True) for part in pair]
    return [command, *given, *draw(st.lists(TEXTS | st.sampled_from(["a goose", "job.jsonl", "--quiet"]), max_size=2))]


def absent(repo_id: str, names: Sequence[str], revision: str | None, given: str) -> Path:
    """The Hub, which the script leaves alone."""
    raise FileNotFoundError(f"{given}: no such file")


class Started(Exception):
    """A command has read all of its arguments, and would load a model."""


def read_arguments(args: list[str]) -> None:
    """What a command does with its arguments before it loads a model; its one line as ValueError."""

    def start(*_: Any, **__: Any) -> None:
        raise Started

    said = io.StringIO()
    with (
        mock.patch.object(StableDiffusionPipeline, "from_pretrained", start),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        try:
            main_of_sdjax(args)
        except Started:
            return
        except SystemExit as end:
            lines = [line for line in said.getvalue().splitlines() if not line.startswith("warning: ")]
            assert end.code in (0, 2) and len(lines) == (end.code == 2), f"{args}: {end.code}, {said.getvalue()}"


class Fuzz:
    """Cases, what they raised, how long they took. `check` does one, and raises what is no error of a reader."""

    def __init__(self, place: Path, kinds: Sequence[str] = KINDS):
        self.place, self.kinds = place, kinds
        self.cases: Counter = Counter()
        self.slowest = (0.0, "")
        self.files = {
            f"{kind} {name}": write(own) for kind, own in contents().items() for name, write in FORMATS.items()
        }
        self.names = shapes(
            UNet2DConditionModel.described(UNet2DConditionModel.config_class.from_dict(UNET), jnp.float32)
        )
        self.configs = {name: config for name, (_, config) in MODELS.items()} | TOKENIZER | SCHEDULER

    def one(self, draw: Callable) -> tuple[str, Callable[[], None]]:
        """The name of a drawn case, and what reads it."""
        kind = draw(st.sampled_from(self.kinds))
        path = self.place / "file.bin"
        if kind == "arguments":
            command = draw(st.sampled_from(list(OWN_OPTIONS)))
            args = draw(arguments(command))
            return f"arguments {command}", lambda: read_arguments(args)
        if kind == "job":
            form = draw(st.sampled_from(list(JOBS)))
            content = JOBS[form](draw(altered(ROWS))).encode()
            path = path.with_suffix(f".{form}")
            path.write_bytes(content if draw(st.booleans()) else draw(damaged(content)))
            return f"job {form}", lambda: job.read(path)
        if kind == "config":
            name = draw(st.sampled_from(list(self.configs)))
            value = draw(altered(self.configs[name]))
            return f"config {name}", lambda: read_config(name, value, path)
        name = draw(st.sampled_from(list(self.files)))
        content = self.files[name]
        if kind == "header" and name.endswith("safetensors"):
            [length] = struct.unpack("<Q", content[:8])
            header = json.dumps(draw(altered(json.loads(content[8 : 8 + length])))).encode()
            content = struct.pack("<Q", len(header)) + header + content[8 + length :]
        else:
            content = draw(damaged(content))
        path.write_bytes(content)
        return name, lambda: read_weights(name.split()[0], path, self.names)

    def check(self, draw: Callable) -> None:
        name, read, path = *self.one(draw), self.place / "file.bin"
        self.cases[name] += 1
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), mock.patch.object(hub, "_download_file", absent):
                warnings.simplefilter("ignore")
                read()
        except (ValueError, OSError) as error:
            assert name not in self.files or str(path) in str(error), f"names no file: {error}"
        finally:
            self.slowest = max(self.slowest, (time.perf_counter() - start, name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    end, run, found = time.monotonic() + 60 * options.minutes, 0, {}
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        fuzz = Fuzz(Path(place), options.kinds)
        while time.monotonic() < end:

            @seed(run)
            @settings(
                max_examples=100,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            @given(st.data())
            def some(data: st.DataObject) -> None:
                try:
                    fuzz.check(data.draw)
                except BaseException as error:
                    if type(error).__module__.startswith("hypothesis") or isinstance(error, KeyboardInterrupt):
                        raise
                    found.setdefault(f"{type(error).__name__}: {error}"[:100], traceback.format_exc())

            some()
            run += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for trace in found.values():
        print(trace)
    for name, count in sorted(fuzz.cases.items()):
        print(f"{name:<24}{count:>8,}")
    total, (slowest, name) = sum(fuzz.cases.values()), fuzz.slowest
    print(f"{total:,} cases, {len(found)} kinds of exceptions, slowest {slowest:.2f} s ({name}), peak {peak:.2f} GiB")
    return bool(found) or slowest > LIMIT


if __name__ == "__main__":
    sys.exit(main())
