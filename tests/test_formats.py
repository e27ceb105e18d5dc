"""Every file format gives PyTorch's picture of the same weights, and one that cannot says why."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
import transformers
from checkpoints import test_single_file as layout
from diffusers.pipelines.stable_diffusion import safety_checker as diffusers_checker
from flax import nnx, serialization
from safetensors.torch import load_file, save_file

import sdjax
from sdjax import CheckpointError, parallel
from sdjax.clip_vocabulary import clip_vocabulary

FAMILIES = {
    "sd1": oracle.SD1,
    "sd2": oracle.SD2,
    "sdxl": oracle.SDXL,
    "refiner": oracle.REFINER,
    "lcm": oracle.LCM,
}
LATENTS = oracle.normal(1, 8, 8, 4)
TOLERANCE = 1e-4
TRAINING = ("betas", "alphas_cumprod", "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight", "logvar")
UNET_FILE, VAE_FILE = (f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae"))
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers


class Reference(NamedTuple):
    """A pipeline of PyTorch, how it is called, and its picture."""

    pipe: diffusers.DiffusionPipeline
    call: dict[str, Any]
    picture: np.ndarray


def arguments(kind: str, factor: int) -> dict[str, Any]:
    call = {"prompt": "a blue goose", "num_inference_steps": 2, "output_type": "np"}
    if kind == "refiner":
        return {**call, "num_inference_steps": 4, "denoising_start": 0.5, "image": LATENTS}
    sizes = {"height": 8 * factor, "width": 8 * factor, "latents": LATENTS}
    return (
        call
        | sizes
        | ({"num_inference_steps": 1, "guidance_scale": 8.5} if kind == "lcm" else {"negative_prompt": "goose"})
    )


def their_picture(pipe: diffusers.DiffusionPipeline, call: dict[str, Any]) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    tensors = {name: oracle.nchw(value) for name, value in call.items() if name in ("latents", "image")}
    return pipe(**{**call, **tensors}).images


def load(source: Any, **kw: Any) -> sdjax.StableDiffusionPipeline:
    return sdjax.StableDiffusionPipeline.from_pretrained(source, mesh=parallel.data_mesh(jax.devices()[:1]), **kw)


def load_file_of(path: Path, **kw: Any) -> sdjax.StableDiffusionPipeline:
    return sdjax.StableDiffusionPipeline.from_single_file(path, mesh=parallel.data_mesh(jax.devices()[:1]), **kw)


def assert_pictures(pipe: sdjax.StableDiffusionPipeline, reference: Reference, tolerance: float = TOLERANCE) -> None:
    oracle.assert_close(pipe(**reference.call).images, reference.picture, tolerance)
    assert np.std(reference.picture) > 0.05


def networks(pipe: diffusers.DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: value for name, value in pipe.components.items() if isinstance(value, torch.nn.Module)}


def refer(pipe: diffusers.DiffusionPipeline, kind: str) -> Reference:
    """Every weight becomes one that float16 and bfloat16 have, so that all formats hold the same."""
    for module in networks(pipe).values():
        module.bfloat16().half().float()
    call = arguments(kind, pipe.vae_scale_factor)
    return Reference(pipe, call, their_picture(pipe, call))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def reference(kind: str) -> Reference:
        if kind not in made:
            made[kind] = refer(oracle.pipeline(tmp_path_factory.mktemp(kind), FAMILIES[kind]), kind)
        return made[kind]

    return reference


@pytest.fixture(scope="module")
def folders(references, tmp_path_factory) -> Callable[[str], Path]:
    """The folder that PyTorch saves of a family. Read only."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("folder")
            references(kind).pipe.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def copied(folders, tmp_path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(folders(kind), tmp_path / "copied")


def save(pipe: diffusers.DiffusionPipeline, folder: Path, dtype: torch.dtype = torch.float32, **kw: Any) -> None:
    for module in networks(pipe).values():
        module.to(dtype)
    pipe.save_pretrained(folder, **kw)
    for module in networks(pipe).values():
        module.float()


def save_pickles(pipe: diffusers.DiffusionPipeline, folder: Path, **kw: Any) -> None:
    """As transformers 5 no longer does: the text encoders, too."""
    save(pipe, folder, safe_serialization=False, **kw)
    for path in folder.glob("text_encoder*/model*.safetensors"):
        torch.save(load_file(path), path.with_name(pickled(path.name)))
        path.unlink()
    for path in folder.glob("text_encoder*/*.index.json"):
        path.with_name(pickled(path.name)).write_text(pickled(path.read_text()))
        path.unlink()


def pickled(text: str) -> str:
    return re.sub(r"\bmodel([-\d\w]*)\.safetensors", r"pytorch_model\1.bin", text)


def save_mixed(pipe: diffusers.DiffusionPipeline, folder: Path) -> None:
    """A UNet in halves, other models without; a VAE that is pickled, a text encoder in shards."""
    save(pipe, folder, max_shard_size="40KB")
    for name, option in (("unet", {"variant": "fp16"}), ("vae", {"safe_serialization": False})):
        shutil.rmtree(folder / name)
        module = networks(pipe)[name]
        module.to(torch.float16 if "variant" in option else torch.float32).save_pretrained(folder / name, **option)
        module.float()


FLAX_UNET = (
    *("sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "mid_block_type"),
    *("only_cross_attention", "block_out_channels", "layers_per_block", "attention_head_dim", "num_attention_heads"),
    *("cross_attention_dim", "dropout", "use_linear_projection", "flip_sin_to_cos", "freq_shift", "norm_num_groups"),
    *("transformer_layers_per_block", "addition_embed_type", "addition_time_embed_dim"),
    *("addition_embed_type_num_heads", "projection_class_embeddings_input_dim"),
)
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def save_flax(pipe: diffusers.DiffusionPipeline, folder: Path, dtype: Any = np.float32) -> None:
    """As diffusers up to 0.35 saved the pipelines of Flax."""
    save(pipe, folder)
    for name, module in networks(pipe).items():
        [weights], is_ours = folder.glob(f"{name}/*.safetensors"), isinstance(module, diffusers.ModelMixin)
        file = "diffusion_flax_model.msgpack" if is_ours else "flax_model.msgpack"
        weights.with_name(file).write_bytes(serialization.msgpack_serialize(flax_tree(module, is_ours, dtype)))
        weights.unlink()
        if is_ours:
            config = json.loads((folder / name / "config.json").read_text())
            more = {"use_memory_efficient_attention": True, "split_head_dim": True}
            config = {k: config[k] for k in FLAX_UNET if k in config} | more if name == "unet" else config
            write_json(folder / name / "config.json", {**config, "_class_name": f"Flax{type(module).__name__}"})
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("scheduler", *networks(pipe)):
        index[name][1] = f"Flax{index[name][1]}"
    write_json(folder / "model_index.json", {**index, "_class_name": f"Flax{index['_class_name']}"})
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "_class_name": f"Flax{config['_class_name']}"})


def flax_tree(module: torch.nn.Module, is_ours: bool, dtype: Any) -> dict[str, Any]:
    """Flax's names and layouts; numbers are part of a name in diffusers, names of their own in transformers."""
    tree: dict[str, Any] = {}
    for name, tensor in layout.state(module).items():
        owner, _, leaf = name.rpartition(".")
        known = name if name in module.state_dict() else name.removeprefix("text_model.")
        kind = module.get_submodule(known.rpartition(".")[0])
        array = tensor.float().numpy().astype(dtype)
        if leaf == "weight" and isinstance(kind, torch.nn.Conv2d | torch.nn.Linear):
            leaf, array = "kernel", array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        elif leaf == "weight":
            leaf = "embedding" if isinstance(kind, torch.nn.Embedding) else "scale"
        if is_ours:
            if isinstance(module, diffusers.AutoencoderKL):
                for new, old in OLD_ATTENTION.items():
                    owner = owner.replace(new, old)
            owner = re.sub(r"\.(\d+)", r"_\1", owner)
        branch = tree
        for key in filter(None, owner.split(".")):
            branch = branch.setdefault(key, {})
        branch[leaf] = np.ascontiguousarray(array)
    return tree


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


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


class Single(NamedTuple):
    """A pipeline of PyTorch as one state dict in the original layout."""

    reference: Reference
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, torch.Tensor]


CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
SMALL = {"layers_per_block": 1, "use_linear_projection": True, "addition_time_embed_dim": 16}
SINGLE_CONFIGS = {
    "sd1": layout.TINY["sd1"],
    "sd2": {
        "unet": {**layout.TINY["sd2"]["unet"], "layers_per_block": 1, "cross_attention_dim": 64},
        "text_encoder": layout.text_config(64, 2, "gelu", 64),
    },
    "sdxl": {
        "unet": layout.unet_config(
            (32, 64),
            (False, True),
            attention_head_dim=(1, 1),
            cross_attention_dim=64 + 64,
            transformer_layers_per_block=(1, 2),
            **SMALL,
            **layout.xl(96 + 6 * 16),
        ),
        "text_encoder": layout.text_config(64, 2, "quick_gelu", 64),
        "text_encoder_2": layout.text_config(64, 3, "gelu", 96),
    },
    "refiner": {
        "unet": layout.unet_config(
            (32, 64, 64),
            (False, True, False),
            attention_head_dim=(1, 1, 1),
            cross_attention_dim=64,
            transformer_layers_per_block=2,
            **SMALL,
            **layout.xl(64 + 5 * 16),
        ),
        "text_encoder_2": layout.text_config(64, 3, "gelu", 64),
    },
}
SINGLE = {
    "sd1": ("sd1", oracle.SD1, {}),
    "sd2": ("sd2", replace(oracle.SD2, prediction_type="epsilon"), {"prediction_type": "epsilon"}),
    "sd2-v": ("sd2", oracle.SD2, {"prediction_type": "v_prediction"}),
    "sdxl": ("sdxl", oracle.SDXL, {}),
    "refiner": ("refiner", oracle.REFINER, {}),
}
"""name -> (configs, family, options of loading)"""


def single_configs(kind: str) -> dict[str, dict[str, Any]]:
    """Of the widths that a single file can have, and with CLIP's own vocabulary."""
    name, family, _ = SINGLE[kind]
    vae = {**layout.TINY["sd1"]["vae"], "scaling_factor": family.vae["scaling_factor"]}
    configs = {part: {**config, **(CLIP if "text" in part else {})} for part, config in SINGLE_CONFIGS[name].items()}
    return {**configs, "vae": vae}


def clip_tokenizer(pad_token: str) -> transformers.CLIPTokenizer:
    vocab, merges = clip_vocabulary()
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def original_pipeline(folder: Path, kind: str) -> Single:
    (name, family, _), configs = SINGLE[kind], single_configs(kind)
    models = {
        part: oracle.randomised(layout.model(part, config), i) for i, (part, config) in enumerate(configs.items())
    }
    tokenizers = {"text_encoder": ("tokenizer", family.pad_token), "text_encoder_2": ("tokenizer_2", "!")}
    tokenizers = {own: clip_tokenizer(pad) for part, (own, pad) in tokenizers.items() if part in models}
    reference = refer(oracle.pipeline(folder, family, **models, **tokenizers), name)
    states = {part: layout.state(model) for part, model in models.items()}
    return Single(reference, configs, layout.original(name, states, configs))


@pytest.fixture(scope="module")
def singles(tmp_path_factory) -> Callable[[str], Single]:
    made: dict[str, Single] = {}

    def single(kind: str) -> Single:
        if kind not in made:
            made[kind] = original_pipeline(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return single


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


def test_a_single_file_becomes_a_folder_for_pytorch(singles, tmp_path):
    reference, _, tensors = singles("sdxl")
    load_file_of(layout.written(tmp_path, tensors)).save_pretrained(tmp_path / "folder")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    oracle.assert_close(their_picture(again, reference.call), reference.picture, TOLERANCE)
    assert_pictures(load(tmp_path / "folder"), reference)


OTHER = {
    "vae": lambda: oracle.vae(oracle.SD1.vae, 12),
    "unet": lambda: oracle.unet(oracle.SD1.unet, 11),
    "text_encoder": lambda: oracle.text_encoder(oracle.SD1.text, 13),
}


def with_component(reference: Reference, **components: Any) -> Reference:
    pipe = type(reference.pipe)(**{**reference.pipe.components, **components}, **requirements(reference.pipe))
    return reference._replace(pipe=pipe, picture=their_picture(pipe, reference.call))


def requirements(pipe: diffusers.DiffusionPipeline) -> dict[str, Any]:
    return {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("given", ["folder", "pipeline", "model"])
def test_another_component(references, folders, tmp_path, name, given):
    module = OTHER[name]()
    expected = with_component(references("sd1"), **{name: module})
    assert np.abs(expected.picture - references("sd1").picture).max() > 0.01
    source = tmp_path / name if given == "folder" else tmp_path
    module.save_pretrained(tmp_path / name)
    if given == "model":
        source = getattr(load(folders("sd1"), **{name: tmp_path}), name)
    assert_pictures(load(folders("sd1"), **{name: source}), expected)


@pytest.mark.parametrize("name", ["vae", "unet", "text_encoder"])
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_another_component_in_one_file(singles, tmp_path, name, spelling):
    """Of a file that holds this model alone; in the original spelling with its prefix."""
    reference, configs, tensors = singles("sd1")
    module = oracle.randomised(layout.model(name, configs[name]), 20)
    states = {part: layout.state(model) for part, model in networks(reference.pipe).items()}
    part = states[name] = layout.state(module)
    if spelling == "original":
        prefix = {"vae": layout.VAE, "unet": layout.UNET}.get(name, "cond_stage_model.")
        part = {k: x for k, x in layout.original("sd1", states, configs).items() if k.startswith(prefix)}
    file = layout.written(tmp_path / "part", part)
    path = layout.written(tmp_path, tensors)
    assert_pictures(load(path, **{name: file}), with_component(reference, **{name: module}))


def test_a_vae_file_has_the_scaling_factor_of_its_pipeline(references, singles, copied, tmp_path):
    """SD's and SDXL's are of one shape."""
    module = oracle.randomised(layout.model("vae", layout.TINY["sd1"]["vae"]), 30)
    module.register_to_config(scaling_factor=0.13025)
    file = layout.written(tmp_path / "vae", layout.state(module))
    expected = with_component(references("sdxl"), vae=module)
    folder = copied("sdxl")
    (folder / VAE_FILE).unlink()  # not needed
    pipe = load(folder, vae=file)
    assert pipe.vae.config.scaling_factor == 0.13025
    assert_pictures(pipe, expected)
    reference, _, tensors = singles("sdxl")
    without = {name: x for name, x in tensors.items() if not name.startswith(layout.VAE)}
    path = layout.written(tmp_path / "single", without)
    with pytest.raises(CheckpointError, match="holds no vae; give vae="):
        load(path)
    pipe = load(path, vae=file)
    assert pipe.vae.config.scaling_factor == 0.13025
    assert_pictures(pipe, with_component(reference, vae=module))


TAESD = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}


@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_tiny_autoencoder(references, folders, tmp_path, given):
    module = oracle.randomised(diffusers.AutoencoderTiny(**TAESD), 40)
    module.save_pretrained(tmp_path)
    source = tmp_path if given == "folder" else tmp_path / Path(VAE_FILE).name
    assert_pictures(load(folders("sd1"), vae=source), with_component(references("sd1"), vae=module))


def test_previews_of_the_tiny_autoencoder(references, folders, tmp_path):
    reference = references("sd1")
    module = oracle.randomised(diffusers.AutoencoderTiny(**TAESD), 40)
    module.save_pretrained(tmp_path)
    previews = []
    pipe = load(folders("sd1"), preview_vae=tmp_path, scheduler="euler")
    call = reference.call | {"callback": lambda step, total, preview: previews.append(preview())}
    latents = pipe(**call | {"output_type": "latent"}).images
    with torch.no_grad():
        shown = oracle.nhwc(module.decode(oracle.nchw(latents)).sample)
    [last] = previews[-1]
    np.testing.assert_allclose(np.asarray(last) / 255, (shown[0] / 2 + 0.5).clip(0, 1), atol=1 / 255)
    np.testing.assert_array_equal(
        pipe(**reference.call).images, load(folders("sd1"), scheduler="euler")(**reference.call).images
    )


CHECKER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def checked(references, tmp_path_factory) -> tuple[Path, dict[str, Any], diffusers.StableDiffusionPipeline]:
    """A folder with a safety checker that flags half of the pictures of a call, the call, PyTorch's pipeline."""
    reference = references("sd1")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(projection_dim=12, vision_config=CHECKER, text_config=text)
    checker = oracle.randomised(diffusers_checker.StableDiffusionSafetyChecker(config))
    seen = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    call = reference.call | {"latents": oracle.normal(4, 8, 8, 4), "num_images_per_prompt": 4}
    pixels = torch.tensor(np.stack(seen(images_of(their_picture(reference.pipe, call))).pixel_values))
    embeds = checker.visual_projection(checker.vision_model(pixels).pooler_output)
    nearest = diffusers_checker.cosine_distance(embeds, checker.concept_embeds).max(1).values.sort().values
    checker.special_care_embeds_weights.fill_(2.0)  # never
    checker.concept_embeds_weights.fill_(float(nearest[1] + nearest[2]) / 2)
    pipe = diffusers.StableDiffusionPipeline(
        **{**reference.pipe.components, "safety_checker": checker, "feature_extractor": seen}
    )
    folder = tmp_path_factory.mktemp("checked")
    pipe.save_pretrained(folder)
    return folder, call, pipe


def images_of(pictures: np.ndarray) -> list[Any]:
    return diffusers.image_processor.VaeImageProcessor.numpy_to_pil(pictures)


def test_the_safety_checker(checked):
    folder, call, theirs = checked
    tensors = call | {"latents": oracle.nchw(call["latents"])}
    expected = theirs(**tensors)
    output = load(folder)(**call)
    assert output.nsfw_content_detected == expected.nsfw_content_detected
    assert sorted(output.nsfw_content_detected) == [False, False, True, True]
    oracle.assert_close(output.images, expected.images, TOLERANCE)
    assert [not picture.any() for picture in output.images] == output.nsfw_content_detected
    for off in (load(folder, safety_checker=None), load(folder)):
        off.safety_checker = None
        output = off(**call)
        assert output.nsfw_content_detected is None
        assert all(picture.any() for picture in output.images)


def test_a_safety_checker_for_a_checkpoint_without(checked, folders):
    folder, call, _ = checked
    pipe = load(folders("sd1"), safety_checker=folder)
    assert pipe(**call).nsfw_content_detected == load(folder)(**call).nsfw_content_detected


def test_a_safety_checker_is_saved(checked, tmp_path):
    folder, call, theirs = checked
    load(folder).save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    tensors = call | {"latents": oracle.nchw(call["latents"])}
    expected, output = theirs(**tensors), again(**tensors)
    assert output.nsfw_content_detected == expected.nsfw_content_detected
    oracle.assert_close(output.images, expected.images, TOLERANCE)


def test_a_safety_checker_that_is_listed_but_not_there(checked, tmp_path):
    folder = shutil.copytree(checked[0], tmp_path / "copied")
    shutil.rmtree(folder / "safety_checker")
    pipe = load(folder)
    assert pipe.safety_checker is None
    pipe.save_pretrained(tmp_path / "saved")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert again.safety_checker is None
    assert again.config.requires_safety_checker is False


def test_the_safety_checker_of_flax(checked, tmp_path):
    folder, call, theirs = checked
    save_flax(theirs, tmp_path)
    assert load(tmp_path)(**call).nsfw_content_detected == load(folder)(**call).nsfw_content_detected


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


def cache(root: Path, repository: str, folder: Path, commit: str, branch: str) -> None:
    """What the Hub's client leaves behind of a download: snapshots of links to blobs."""
    top = root / f"models--{repository.replace('/', '--')}"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        link = top / "snapshots" / commit / path.relative_to(folder)
        blob = top / "blobs" / f"{abs(hash(str(link))):x}"
        for directory in (link.parent, blob.parent):
            directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (top / "refs").mkdir(exist_ok=True)
    (top / "refs" / branch).write_text(commit)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path) -> Path:
    """conftest.py says HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_offline_from_the_cache_of_the_hub(references, folders, singles, hub_cache, tmp_path):
    reference, (single, _, tensors) = references("sd1"), singles("sd1")
    save_flax(reference.pipe, tmp_path / "flax", ml_dtypes.bfloat16)
    other = oracle.vae(oracle.SD1.vae, 12)
    other.save_pretrained(tmp_path / "vae")
    cache(hub_cache, "goose/model", folders("sd1"), "1" * 40, "main")
    cache(hub_cache, "goose/model", tmp_path / "flax", "2" * 40, "bf16")
    cache(hub_cache, "goose/vae", tmp_path / "vae", "3" * 40, "main")
    cache(hub_cache, "goose/file", layout.written(tmp_path / "file", tensors).parent, "4" * 40, "main")
    assert_pictures(load("goose/model"), reference)
    for revision in ("bf16", "2" * 40):
        assert_pictures(load("goose/model", revision=revision), reference)
    assert_pictures(load("goose/model", vae="goose/vae"), with_component(reference, vae=other))
    for file in ("goose/file/model.safetensors", "https://huggingface.co/goose/file/blob/main/model.safetensors"):
        assert_pictures(load_file_of(file), single)
    assert_pictures(load("goose/file/model.safetensors"), single)
    for absent in ({"path_or_hub_id": "goose/nothing"}, {"path_or_hub_id": "goose/model", "revision": "v9"}):
        with pytest.raises(FileNotFoundError, match=absent["path_or_hub_id"]):
            load(absent["path_or_hub_id"], revision=absent.get("revision"))


def test_a_hub_repository_tells_the_scaling_factor_of_a_vae_that_is_not_fetched(folders, monkeypatch, tmp_path):
    """A Hub of one repository, of which a download takes the files that it is asked for."""
    source, here = folders("sdxl"), tmp_path / "here"
    files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]

    def fetch(name: str) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, here / name)

    def snapshot_download(repo_id, *, revision, allow_patterns):
        for name in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            fetch(name)
        return str(here)

    def hf_hub_download(repo_id, name, *, revision):
        fetch(name)
        return str(here / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **kw: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    module = oracle.randomised(layout.model("vae", layout.TINY["sd1"]["vae"]), 30)
    pipe = load("goose/xl", vae=layout.written(tmp_path / "vae", layout.state(module)))
    assert pipe.vae.config.scaling_factor == 0.13025
    assert (here / UNET_FILE).is_file()
    assert not (here / VAE_FILE).exists()


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
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}: refused: it asks for posix\.system"):
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


def test_components_that_cannot_be(folders, singles, tmp_path):
    folder = folders("sd1")
    with pytest.raises(ValueError, match="vae: a pipeline cannot be without"):
        load(folder, vae=None)
    with pytest.raises(ValueError, match="unknown: tokeniser; components are text_encoder, "):
        load(folder, tokeniser=folder)
    with pytest.raises(ValueError, match="vae: must be AutoencoderKL or AutoencoderTiny, not UNet2DConditionModel"):
        load(folder, vae=load(folder).unet)
    file = layout.written(tmp_path, singles("sd1").tensors)
    with pytest.raises(ValueError, match="unet: a pipeline cannot be without"):
        load_file_of(file, unet=None)
    alone = {k: x for k, x in singles("sd1").tensors.items() if k.startswith(layout.VAE)}
    alone = layout.written(tmp_path / "vae", alone)
    with pytest.raises(CheckpointError, match=f"{alone}: holds no unet, only vae"):
        load(folder, unet=alone)
    with pytest.raises(CheckpointError, match=f"{alone}: holds no unet; give unet="):
        load(alone)
    with pytest.raises(FileNotFoundError, match=r"nest\.safetensors: no such file"):
        load(tmp_path / "nest.safetensors")


def test_without_a_text_encoder(references, folders):
    reference = references("sd1")
    pipe = load(folders("sd1"), text_encoder=None)
    with pytest.raises(ValueError, match="no text encoder: give prompt_embeds"):
        pipe("goose", height=32, width=32)
    states, negative = reference.pipe.encode_prompt("a blue goose", "cpu", 1, True, "goose")
    call = {k: v for k, v in reference.call.items() if "prompt" not in k}
    pictures = pipe(**call, prompt_embeds=states.numpy(), negative_prompt_embeds=negative.numpy()).images
    oracle.assert_close(pictures, reference.picture, TOLERANCE)
