"""The components of a pipeline: read from a folder, the Hub or one file, and written as a folder."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from jax.typing import DTypeLike

from sdjax import schedulers
from sdjax.checkpoints import content, folder, hub, outdated, pipelines, prediction, single_file
from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import Within, brief, checked
from sdjax.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    ControlNetModel,
    ControlNetUnionModel,
    LatentUpscaler,
    RRDBNet,
    StableDiffusionSafetyChecker,
    StableUnCLIPImageNormalizer,
    T2IAdapter,
    UNet2DConditionModel,
    fitting,
)
from sdjax.models.base import Model
from sdjax.models.clip import WITH_PROJECTION
from sdjax.request.elsewhere import hint
from sdjax.text.tokenizer import CLIPTokenizer

CONTROLNETS = ("controlnet", *(f"controlnet_{i}" for i in range(1, 8)))
ADAPTERS = ("adapter", *(f"adapter_{i}" for i in range(1, 8)))
"""The components of several ControlNets and of several T2I-Adapters, named as PyTorch diffusers names their folders"""
SEVERAL = (CONTROLNETS, ADAPTERS)
BESIDE = {"controlnet": "ControlNet", "adapter": "T2I-Adapter"}
"""What goes with a model, which a file may hold alone"""
MULTIPLE = {
    "MultiControlNetUnionModel": (CONTROLNETS, ControlNetUnionModel),
    "MultiControlNetModel": (CONTROLNETS, ControlNetModel),
    "MultiAdapter": (ADAPTERS, T2IAdapter),
}
"""What PyTorch makes of several, the components that they are here, and their class"""

MODELS: dict[str, tuple[type[Model], ...]] = {
    "text_encoder": (CLIPTextModel,),
    "text_encoder_2": (CLIPTextModel,),
    "unet": (UNet2DConditionModel, LatentUpscaler),
    "vae": (AutoencoderKL, AutoencoderTiny),
    **dict.fromkeys(CONTROLNETS, (ControlNetModel, ControlNetUnionModel)),
    **dict.fromkeys(ADAPTERS, (T2IAdapter,)),
    "image_encoder": (CLIPVisionModelWithProjection,),
    "image_normalizer": (StableUnCLIPImageNormalizer,),
    "safety_checker": (StableDiffusionSafetyChecker,),
    "upscaler": (RRDBNet,),
}
"""The classes that each component may have, the usual one first. The last one that takes its config.json has it."""

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
STANDS_FOR = {"preview_vae": "vae", **{name: names[0] for names in SEVERAL for name in names[1:]}}
IP_ADAPTERS = ("ip_adapter", *(f"ip_adapter_{i}" for i in range(1, 8)))
"""The networks of several IP-Adapters"""
UNSAVED = ("upscaler", *IP_ADAPTERS)
"""What PyTorch's pipelines do not have"""
VAES = ("vae", "preview_vae")
REQUIRED = ("unet", "vae")
OF_TRANSFORMERS = ("text_encoder", "text_encoder_2", "image_encoder", "safety_checker")
"""Components whose config.json is as transformers writes it"""
LIBRARIES = {
    **dict.fromkeys(OF_TRANSFORMERS, "transformers"),
    **dict.fromkeys(("safety_checker", "image_normalizer"), "stable_diffusion"),
}
PROJECTED = {"text_encoder_2": {"architectures": [WITH_PROJECTION]}}
OPTIONAL = {
    False: ("safety_checker", "feature_extractor", "image_encoder"),
    True: (*TOKENIZERS, *TOKENIZERS.values(), "feature_extractor", "image_encoder"),
}
"""Components that PyTorch's pipeline expects model_index.json to list as null where absent; True: those of SDXL."""

INDEX = {
    "guidance_scale": Annotated[float, Within(-1e6, 1e6)],
    "max_noise_level": Annotated[int, Within(0, 100_000)],
    **dict.fromkeys(
        ("requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score"), bool | None
    ),
}
"""Options in model_index.json, and their kinds"""

FEATURE_EXTRACTOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
}
"""What PyTorch's pipeline needs beside a safety checker or an image encoder, but for its size; here it is code."""


def is_file(path_or_id: str | os.PathLike) -> bool:
    """Whether this names one file of weights: any file here, or by its ending at a web address or in a repository."""
    path = Path(path_or_id)
    return path.is_file() or (content.is_weight_name(str(path_or_id)) and not path.is_dir())


def stem(path_or_id: str | os.PathLike) -> str:
    """The last part of a path or of a Hub id, without the ending of a weight file."""
    return content.without_ending(Path(path_or_id).name)


def load_model(
    name: str,
    source: Any,
    *,
    dtype: DTypeLike | str | None,
    variant: str | None = None,
    scaling_factor: float | None = None,
    config: Mapping[str, Any] | None = None,
    unet: UNet2DConditionModel | None = None,
) -> Model | None:
    """A component from a model (as it is), a weight file, a Hub id, or a folder: its own, or a whole pipeline's.

    scaling_factor: of the latents, where a VAE's file has none. config: keys that replace those of a folder's
    config.json. unet: what a Control-LoRA changes. Raises ValueError for a model of another class, CheckpointError for
    a file without this component, and as `Model.from_pretrained`.
    """
    if source is None:
        return None
    is_preview, name = name == "preview_vae", STANDS_FOR.get(name, name)
    if isinstance(source, Model):
        if not isinstance(source, MODELS[name]):
            known = " or ".join(cls.__name__ for cls in MODELS[name])
            raise ValueError(f"{name}: must be {known}, not {type(source).__name__}")
        return source
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(f"{name}: must be a path, a Hub id or a model, not {brief(source)}")
    if is_file(source):
        file = single_file.read(hub.resolve_file(source, ()))
        if name not in file.components:
            raise CheckpointError(f"{source}: holds no {name}, only {', '.join(file.components)}")
        if file.components[name].config.get("num_encoder_blocks") == [] and not is_preview:
            raise CheckpointError(
                f"{source}: a decoder alone, enough for preview_vae; for {name} put TAESD's encoder beside it, "
                "called the same with encoder in place of decoder"
            )
        return _from_component(name, file, dtype, scaling_factor, unet)
    path = _located(name, source, variant)
    config = {**PROJECTED.get(name, {}), **(config or {})}
    return _class_of(path, name, config).from_pretrained(path, dtype=dtype, variant=variant, config=config)


def _located(name: str, source: str | os.PathLike, variant: str | None) -> Path:
    """The folder of a component."""
    return hub.resolve(source, variant=variant, subfolder=name if _is_pipeline(source, name) else None)


def _is_pipeline(path_or_id: str | os.PathLike, name: str) -> bool:
    """Whether a folder or a Hub repository has this component in a folder of its own."""
    try:
        return hub.resolve_file(path_or_id, (f"{name}/config.json",)).is_file()
    except FileNotFoundError:
        return False


def one_by_one(replaced: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with a component of its own for each of a list of ControlNets or T2I-Adapters. Raises ValueError for
    too many."""
    replaced = dict(replaced)
    for names in SEVERAL:
        if names[0] not in replaced:
            continue
        several = replaced[names[0]]
        several = several if isinstance(several, list | tuple) else [several]
        if len(several) > len(names):
            raise ValueError(f"{names[0]}: {len(several)} of them; {len(names)} at most")
        given = {name: replaced[name] for name in names[1:] if name in replaced}
        replaced |= dict.fromkeys(names) | given | dict(zip(names, several, strict=False))
    return replaced


def check_replacements(replaced: Mapping[str, Any]) -> None:
    """Raises ValueError for names that are no component, and for leaving out what no pipeline does without."""
    known = (*MODELS, "preview_vae")
    if unknown := replaced.keys() - set(known):
        name = min(unknown)
        raise ValueError(f"unknown: {name!r}{hint(name, known)}")
    if absent := [name for name in REQUIRED if name in replaced and replaced[name] is None]:
        raise ValueError(f"{absent[0]}: a pipeline cannot be without")


def read_folder(
    path_or_id: str | os.PathLike,
    *,
    dtype: DTypeLike | str | None,
    revision: str | None,
    variant: str | None,
    prediction_type: str | None,
    replaced: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of a pipeline, from a diffusers folder or a Hub repository, `replaced` in place of its own.

    prediction_type: in place of the scheduler's, if it is given.
    """
    check_replacements(replaced)
    prediction.check(prediction_type)
    if hub.is_id(path_or_id):  # of a family that is not supported nothing large is downloaded
        pipelines.kinds_of(hub.resolve_file(path_or_id, ("model_index.json",), revision=revision).parent)
    path = hub.resolve(path_or_id, revision=revision, variant=variant, ignored=tuple(replaced))
    given, kind = pipelines.kinds_of(path)
    index = _with_each(path, folder.read_json(path / "model_index.json"))
    dropped = ("_diffusers_version", *pipelines.OPTIONS)
    config = {k: v for k, v in index.items() if (k in INDEX or not isinstance(v, list)) and k not in dropped}
    config = {k: _checked(path / "model_index.json", k, v, INDEX.get(k, Any)) for k, v in config.items()}
    own = _own(path, index, replaced)
    options: dict[str, Any] = {"dtype": dtype, "variant": variant}
    if any(isinstance(source := replaced.get(name), str | os.PathLike) and is_file(source) for name in VAES):
        options["scaling_factor"] = _scaling_factor(path_or_id, path, revision)
    configs = {name: _class_in_config(path, index, name) for name in own if name in MODELS}
    sources = {**replaced, **{name: path / name for name in configs}}  # what may be wrong first
    stated = {} if prediction_type is None else {"prediction_type": prediction_type}
    scheduler, changes = schedulers.read(path, given, index, stated)
    noising = schedulers.read_noising(path, given, index)
    if "vae" in configs:
        corrections, more = _corrections(outdated.vae, given, path / "vae")
        configs["vae"], changes = configs["vae"] | corrections, changes + more
    if isinstance(unet := sources["unet"], str | os.PathLike) and not is_file(unet):
        sources["unet"] = _located("unet", unet, variant)
        corrections, more = _corrections(outdated.unet, given, sources["unet"])
        configs["unet"], changes = configs.get("unet", {}) | corrections, changes + more
    if changes:
        warnings.warn(f"{path}: outdated configs, read as PyTorch does: {', '.join(changes)}", stacklevel=3)
    found: dict[str, Any] = {
        name: CLIPTokenizer.from_pretrained(path, subfolder=name) for name in own if name in TOKENIZERS.values()
    }
    for name, source in _in_order(sources):
        found[name] = load_model(name, source, config=configs.get(name), unet=found.get("unet"), **options)
        _check_words(path, found)
    check_fit(path, found)
    return found | noising | {"scheduler": scheduler, "config": config | {"_class_name": kind}}


def _checked(source: Path, name: str, value: Any, kind: Any) -> Any:
    """As `fields.checked`. Raises CheckpointError that names the file."""
    try:
        return checked(name, value, kind)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _check_words(source: str | os.PathLike, found: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless each text encoder has one embedding for each of its tokenizer's tokens."""
    for name, own in TOKENIZERS.items():
        encoder, tokenizer = found.get(name), found.get(own)
        if encoder is None or tokenizer is None or encoder.config.vocab_size == len(tokenizer):
            continue
        raise CheckpointError(
            f"{source}: the {name} has embeddings of {encoder.config.vocab_size} tokens, its {own} has "
            f"{len(tokenizer)} (learned words: {', '.join(tokenizer.added_tokens) or 'none'}): not of one checkpoint"
        )


def check_fit(source: str | os.PathLike, found: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the networks fit together, which each alone may not show."""
    groups = (TOKENIZERS, CONTROLNETS, ADAPTERS)
    configs = [{name: found[name].config for name in names if found.get(name) is not None} for names in groups]
    seen = (model and model.config for model in map(found.get, ("image_normalizer", "image_encoder")))
    fitting.check(source, found["unet"].config, found["vae"].config, *configs, *seen)


def _with_each(path: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The index with an entry for each of several ControlNets or T2I-Adapters, which PyTorch has one entry for."""
    for kind, ((first, *more), _) in MULTIPLE.items():
        if folder.indexed(path, index, first) == kind:
            there = [first, *(name for name in more if (path / name).is_dir())]
            index = index | {name: ["diffusers", _class_of(path / name, name).__name__] for name in there}
    return index


def _class_in_config(path: Path, index: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config.json of the class that model_index.json names. Raises CheckpointError for another class."""
    known = [cls.saved_as or cls.__name__ for cls in MODELS[name]] + [WITH_PROJECTION] * (name in TOKENIZERS)
    class_name = folder.indexed(path, index, name)
    if class_name not in known:
        raise CheckpointError(f"{path}: {name}: a {class_name} is not supported, only {' or '.join(known)}")
    return {"architectures": [class_name]} if name in OF_TRANSFORMERS else {"_class_name": class_name}


def _corrections(find: Callable, kind: str, path: Path) -> tuple[dict[str, Any], list[str]]:
    config = folder.read_json(path / "config.json")
    corrections = find(kind, config)
    return corrections, outdated.changes(config, corrections)


def _own(path: Path, index: Mapping[str, Any], replaced: Mapping[str, Any]) -> list[str]:
    """The models and tokenizers of a folder that are to be loaded from it. A safety checker need not be there."""
    names = [name for name in (*MODELS, *TOKENIZERS.values()) if name not in replaced]
    listed = [name for name in names if folder.indexed(path, index, name)]
    there = [name for name in listed if (path / name).is_dir()]
    needed = [name for name in listed if name != "safety_checker"] + [name for name in REQUIRED if name in names]
    if absent := [name for name in dict.fromkeys(needed) if name not in there]:
        raise CheckpointError(f"{path}: has no {' and no '.join(absent)}")
    return there


def _scaling_factor(path_or_id: str | os.PathLike, path: Path, revision: str | None) -> float | None:
    """The config of a pipeline's own VAE, fetched from the Hub where another VAE replaces that one."""
    config = path / "vae" / "config.json"
    if not config.is_file() and not Path(path_or_id).is_dir():
        config = hub.resolve_file(f"{path_or_id}/vae/config.json", (), revision=revision)
    return folder.read_json(config).get("scaling_factor")


def read_file(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike | str | None,
    revision: str | None,
    prediction_type: str | None,
    replaced: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of a pipeline, from one file in the original layout, `replaced` in place of its own models."""
    from sdjax.text.vocabulary import clip_vocabulary

    check_replacements(replaced)
    file = single_file.read(hub.resolve_file(path, (), revision=revision), prediction_type)
    if (name := "".join(file.components)) in BESIDE:
        raise CheckpointError(f"{path}: a {BESIDE[name]}, no model: load a model, with {name}= this file")
    if absent := [name for name in file.missing if name not in replaced]:
        raise CheckpointError(f"{path}: holds no {' and no '.join(absent)}; give {', '.join(f'{n}=…' for n in absent)}")
    vocabulary = clip_vocabulary()
    found: dict[str, Any] = {
        name: CLIPTokenizer(*vocabulary, special_tokens={"pad_token": pad_token})
        for name, pad_token in file.tokenizers.items()
    }
    found |= {name: _from_component(name, file, dtype, None) for name in file.components if name not in replaced}
    for name, source in _in_order(replaced):
        options = {"scaling_factor": file.scaling_factor, "unet": found.get("unet")}
        found[name] = load_model(name, source, dtype=dtype, **options)
    _check_words(path, found)
    check_fit(path, found)
    config = {k: v for k, v in file.model_index.items() if not isinstance(v, list)}
    return found | {"scheduler": file.scheduler, "config": config}


def _in_order(sources: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The same, Control-LoRAs after the UNet that they change."""

    def is_last(name: str, source: Any) -> bool:
        is_path = name in CONTROLNETS and isinstance(source, str | os.PathLike) and os.fspath(source)
        return bool(is_path) and is_file(source) and single_file.is_control_lora(hub.resolve_file(source, ()))

    return sorted(sources.items(), key=lambda pair: is_last(*pair))


def _from_component(
    name: str,
    file: single_file.SingleFile,
    dtype: DTypeLike | str | None,
    scaling_factor: float | None,
    unet: UNet2DConditionModel | None = None,
) -> Model:
    config, tensors = file.components[name].config, file.components[name].tensors
    if file.components[name].is_change:
        if unet is None:
            raise CheckpointError(f"{file.path}: a Control-LoRA, which changes a UNet: give it with a whole pipeline")
        given = {key: value for key, value in config.items() if key != "_class_name"}
        return ControlNetModel.from_control_lora(unet, given, dict(tensors()), source=str(file.path))
    model = model_class(name, config)
    if model is AutoencoderKL and scaling_factor is not None:
        config = {"scaling_factor": scaling_factor, **config}
    return model.from_tensors(config, tensors(), source=f"{file.path}: {name}", dtype=dtype)


def _class_of(path: Path, name: str, config: Mapping[str, Any] = MappingProxyType({})) -> type[Model]:
    """Of the component in a folder, with these keys in place of those of its config.json."""
    return model_class(name, {**folder.read_json(path / "config.json"), **config})


def model_class(name: str, config: Mapping[str, Any]) -> type[Model]:
    """Of a component with this config.json."""
    return next((cls for cls in reversed(MODELS[name]) if cls.takes(config)), MODELS[name][0])


def _class_with(kind: str, models: Mapping[str, Model]) -> str:
    """The class of a pipeline that has these models."""
    if (network := models.get(CONTROLNETS[0])) is not None:
        is_union = isinstance(network, ControlNetUnionModel)
        return pipelines.class_with(kind, pipelines.WITH_UNION if is_union else pipelines.WITH_CONTROLNET)
    return pipelines.class_with(kind, pipelines.WITH_ADAPTER if ADAPTERS[0] in models else {})


def write_folder(
    path: Path,
    models: Mapping[str, Model],
    tokenizers: Mapping[str, CLIPTokenizer],
    configs: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
) -> None:
    """Writes the standard folder layout, with these configs of schedulers, and model_index.json last: without it a
    folder is no checkpoint."""
    absent = {key: [None, None] for key in OPTIONAL["StableDiffusionXL" in config["_class_name"]]}
    config = {**config, "_class_name": _class_with(config["_class_name"], models)}
    unexpected = pipelines.UNEXPECTED.get(config["_class_name"], ())
    index = {name: value for name, value in {**config, **absent}.items() if name not in unexpected}
    index |= schedulers.write(path, configs)
    for name, model in models.items():
        if name in UNSAVED:
            continue
        model.save_pretrained(path / name)
        header = model.config_header()
        kind = header["_class_name"] if "_class_name" in header else header["architectures"][0]
        index[STANDS_FOR.get(name, name)] = [LIBRARIES.get(name, "diffusers"), kind]
    for kind, ((first, second, *_), cls) in MULTIPLE.items():
        if second in models and type(models[first]) is cls:
            index[first] = ["diffusers", kind]
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(path / name)
        index[name] = ["transformers", "CLIPTokenizer"]
    if seeing := [models[name].config for name in ("safety_checker", "image_encoder") if name in models]:
        (path / "feature_extractor").mkdir(exist_ok=True)
        size = getattr(seeing[0], "vision_config", seeing[0]).image_size
        sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        folder.write_json(path / "feature_extractor" / "preprocessor_config.json", FEATURE_EXTRACTOR | sizes)
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    folder.write_json(path / "model_index.json", index)
