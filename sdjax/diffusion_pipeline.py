"""What a pipeline is made of: its components loaded, saved, replaced, and on the devices of a mesh."""

import collections
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from sdjax import components, sampling
from sdjax.checkpoints import casting, hub, lora, textual_inversion
from sdjax.checkpoints.errors import CheckpointError
from sdjax.components import ADAPTERS, CONTROLNETS, IP_ADAPTERS, MODELS, TOKENIZERS
from sdjax.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    ControlNetModel,
    IPAdapter,
    LatentUpscaler,
    RRDBNet,
    StableDiffusionSafetyChecker,
    StableUnCLIPImageNormalizer,
    T2IAdapter,
    UNet2DConditionModel,
)
from sdjax.request import spread
from sdjax.request.elsewhere import hint
from sdjax.runtime import compile_cache, compiler_memory, parallel
from sdjax.runtime.loras import Loras
from sdjax.runtime.network import Graph, Network
from sdjax.sampling import Scheduler
from sdjax.schedulers import NOISING
from sdjax.text.tokenizer import CLIPTokenizer

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "fluent-emoji"
"""The folder of the model that comes with the package"""

ADAPTED = ("unet", "text_encoder", "text_encoder_2")
FACE_LORAS = tuple(f"faceid_{i}" for i in range(len(IP_ADAPTERS)))
"""What the LoRA is called that an IP-Adapter of faces brings, as in PyTorch"""
WORDS = "added_embeddings"
"""In the parameters, the key of the vectors of loaded words: {text encoder: [N D]}"""
ADDED = 64  # rows of added embeddings come in multiples, so that few numbers of them are compiled


@functools.cache
def _prepare_compiler() -> None:
    """At the first pipeline; importing sdjax changes nothing in JAX."""
    compile_cache.enable()
    compiler_memory.enable()


class DiffusionPipeline:
    """The components of Stable Diffusion 1, 2 or XL, over all devices of a process.

    Every component is an attribute that can be replaced; `scheduler` also takes a sampler's name. Components that a
    model does without are None: the second text encoder but for SDXL, the first in its refiner, the safety checker.
    `preview_vae` decodes the previews of a callback; None: the VAE does. `upscaler` makes pictures larger between the
    passes of `hires_scale`. `low_res_scheduler` is that of the noise on what the x4 upscaler makes larger,
    `image_noising_scheduler` of that on the embeddings of pictures that unCLIP varies. There may be several ControlNets
    and T2I-Adapters, see `controls`. `config` is what model_index.json has beside the components.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel | None,
        unet: UNet2DConditionModel | LatentUpscaler,
        vae: AutoencoderKL | AutoencoderTiny,
        tokenizer: CLIPTokenizer | None,
        scheduler: Scheduler | Mapping[str, Any] | str,
        mesh: Mesh | None = None,
        *,
        text_encoder_2: CLIPTextModel | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        preview_vae: AutoencoderKL | AutoencoderTiny | None = None,
        upscaler: RRDBNet | None = None,
        controlnet: ControlNetModel | Sequence[ControlNetModel] | None = None,
        adapter: T2IAdapter | Sequence[T2IAdapter] | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        image_normalizer: StableUnCLIPImageNormalizer | None = None,
        low_res_scheduler: Scheduler | None = None,
        image_noising_scheduler: Scheduler | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        _prepare_compiler()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.unet, self.vae, self.preview_vae, self.safety_checker = unet, vae, preview_vae, safety_checker
        self.upscaler = upscaler
        controls = components.one_by_one({"controlnet": controlnet, "adapter": adapter})
        for name in (*CONTROLNETS, *ADAPTERS):
            setattr(self, name, controls.get(name))
        self.image_encoder, self.image_normalizer = image_encoder, image_normalizer
        self.low_res_scheduler, self.image_noising_scheduler = low_res_scheduler, image_noising_scheduler
        self._scheduler = scheduler if isinstance(scheduler, Scheduler) else sampling.from_config(scheduler)
        self.config = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **(config or {})}
        self.mesh = mesh or parallel.data_mesh()
        self._networks: dict[str, Network] = {}
        self.loras: Loras | None = None
        """the LoRAs that are loaded; None if there are none"""
        self._set_ip_adapters(())
        self.learned: dict[str, np.ndarray] = {}
        """[N D] by text encoder: the vectors of loaded words"""
        self.shows_progress = True

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}{hint(name, dir(type(self)), every=False)}"
        )

    def __repr__(self) -> str:
        """Components with their classes, sizes and dtypes, the scheduler, and the devices."""
        lines = []
        for name, model in self.models.items():
            leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
            count, dtypes = sum(leaf.size for leaf in leaves), " ".join(sorted({str(leaf.dtype) for leaf in leaves}))
            lines.append(f"{name}: {type(model).__name__}, {count:,} parameters, {dtypes}")
        for name, tokenizer in self.tokenizers.items():
            lines.append(f"{name}: {type(tokenizer).__name__}, {len(tokenizer):,} tokens")
        config = self.scheduler.config
        lines.append(f"scheduler: {sampling.name_of(config) or config['_class_name']}, {config['prediction_type']}")
        kinds = collections.Counter(device.device_kind for device in self.mesh.devices.flat)
        lines.append(f"devices: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike | None = None,
        dtype: DTypeLike | None = None,
        scheduler: Scheduler | Mapping[str, Any] | str | None = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        prediction_type: str | None = None,
        mesh: Mesh | None = None,
        **replaced: Any,
    ) -> Self:
        """Loads a diffusers folder, a Hub repository, a weight file (`from_single_file`) or (None) the embedded model.

        dtype: of weights and computation; None: bfloat16 on TPUs and GPUs, float32 on CPUs; "auto": the files'. With
        float16 a VAE whose config has `force_upcast` stays float32.
        scheduler: a sampler's name, used with the checkpoint's noise schedule, a scheduler or its config; None: the
        checkpoint's.
        revision: a branch, tag or commit of the Hub repository. variant: such as "fp16", of files like
        `model.fp16.safetensors`.
        prediction_type: "epsilon", "v_prediction" or "sample", where the checkpoint is wrong about it; None: the
        checkpoint's.
        mesh: devices to map over (`sdjax.runtime.parallel.data_mesh`); None: all of this process.
        replaced: components in place of the checkpoint's, which are then not loaded: unet, vae, text_encoder,
        text_encoder_2, safety_checker, preview_vae, image_encoder, controlnet and adapter (or lists of these), each a
        model, a folder, a Hub id or (no adapter) a weight file; None: without. upscaler: the weight file of an ESRGAN.
        Raises FileNotFoundError for no such folder, CheckpointError for one that is no Stable Diffusion checkpoint.
        """
        path = EMBEDDED_MODEL if path_or_hub_id is None else path_or_hub_id
        replaced = components.one_by_one(replaced)
        if components.is_file(path):
            if variant is not None:
                raise ValueError(f"{path}: one file, which has no variant {variant!r}")
            options = {"revision": revision, "prediction_type": prediction_type, "mesh": mesh}
            return cls.from_single_file(path, dtype, scheduler, **options, **replaced)
        options = {"revision": revision, "variant": variant, "prediction_type": prediction_type}
        found = components.read_folder(path, dtype=dtype, **options, replaced=replaced)
        return cls._assemble(found, scheduler, mesh)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike,
        dtype: DTypeLike | None = None,
        scheduler: Scheduler | Mapping[str, Any] | str | None = None,
        *,
        revision: str | None = None,
        prediction_type: str | None = None,
        mesh: Mesh | None = None,
        **replaced: Any,
    ) -> Self:
        """Loads a `.safetensors` or `.ckpt` in the original layout of Stable Diffusion 1, 2 or XL.

        path: a file, `owner/repository/file`, or its web address on the Hub. What it is, is inferred from its keys and
        shapes, its header and the `.yaml` beside it; prediction_type as of `from_pretrained`, like the rest.
        """
        options = {"dtype": dtype, "revision": revision, "prediction_type": prediction_type}
        found = components.read_file(path, **options, replaced=components.one_by_one(replaced))
        return cls._assemble(found, scheduler, mesh)

    @classmethod
    def _assemble(cls, found: dict[str, Any], scheduler: Any, mesh: Mesh | None) -> Self:
        for names in components.SEVERAL:
            found[names[0]] = [model for name in names if (model := found.pop(name, None)) is not None]
        pipe = cls(**{"text_encoder": None, "tokenizer": None, **found}, mesh=mesh)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes the standard folder layout, which PyTorch diffusers loads.

        The LoRAs that are set are merged; loaded words are in the tokenizers and the text encoders, as in PyTorch.
        IP-Adapters are left out: load them again.
        """
        config = {**self.config}
        if self.safety_checker is None:
            config["requires_safety_checker"] = False
        models = self.models
        for name, vectors in self.learned.items():
            models[name] = models[name].with_embeddings(vectors)
        configs = {name: scheduler.config for name, scheduler in self.schedulers.items()}
        components.write_folder(Path(path), models, self.tokenizers, configs, config)

    @property
    def models(self) -> dict[str, Any]:
        """The networks that this pipeline has, by component."""
        return {name: model for name in (*MODELS, *IP_ADAPTERS) if (model := getattr(self, name)) is not None}

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """By component: the sampler, and those whose noise is on what the UNet is shown."""
        every = ((name, getattr(self, name)) for name in ("scheduler", *NOISING))
        return {name: scheduler for name, scheduler in every if scheduler is not None}

    @property
    def controlnets(self) -> tuple[str, ...]:
        """The components that are ControlNets, in the order of their pictures."""
        return tuple(name for name in CONTROLNETS if getattr(self, name) is not None)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The components that are T2I-Adapters, in the order of their pictures."""
        return tuple(name for name in ADAPTERS if getattr(self, name) is not None)

    @property
    def controls(self) -> tuple[str, ...]:
        """The components that have a picture each in `control_image`, in their order: ControlNets, T2I-Adapters."""
        return (*self.controlnets, *self.adapters)

    @property
    def ip_adapters(self) -> tuple[str, ...]:
        """The networks that are IP-Adapters, in the order of their pictures."""
        return tuple(name for name in IP_ADAPTERS if getattr(self, name) is not None)

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """The tokenizers that this pipeline has, by component."""
        return {name: tokenizer for name in TOKENIZERS.values() if (tokenizer := getattr(self, name)) is not None}

    def set_progress_bar_config(self, *, disable: bool) -> None:
        """Switches the progress bar off, or on again for terminals and notebooks."""
        self.shows_progress = not disable

    @property
    def scheduler(self) -> Scheduler:
        """The sampler. Set to a name, it keeps this one's noise schedule."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: Scheduler | Mapping[str, Any] | str) -> None:
        self._scheduler = self.as_scheduler(value)

    def as_scheduler(self, value: Scheduler | Mapping[str, Any] | str) -> Scheduler:
        """The sampler of a name, on this pipeline's noise schedule, or of a config."""
        if isinstance(value, str):
            return sampling.from_config(self._scheduler.config, sampler=value)
        return value if isinstance(value, Scheduler) else sampling.from_config(value)

    @property
    def params(self) -> dict[str, Any]:
        """By component, its parameters by name; and the vectors of loaded words if any. On every device of the mesh."""
        params: dict[str, Any] = {name: self.network(name)[1] for name in self.models}
        if self.learned:
            rows = {name: self.added_embeddings(name) for name in self.learned}
            params[WORDS] = jax.device_put(rows, NamedSharding(self.mesh, parallel.REPLICATED))
        return params

    @property
    def text_tokenizers(self) -> dict[str, CLIPTokenizer]:
        """The tokenizer of each text encoder that is there."""
        return {name: getattr(self, own) for name, own in TOKENIZERS.items() if getattr(self, name) is not None}

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """For each text encoder the id from which on ids are learned words."""
        return tuple(tokenizer.vocab_size for tokenizer in self.text_tokenizers.values())

    def added_embeddings(self, name: str) -> np.ndarray | None:
        """[N D] the vectors of loaded words, filled up; None: there are none for this text encoder."""
        rows = self.learned.get(name)
        return None if rows is None else parallel.pad(rows, -(-len(rows) // ADDED) * ADDED)

    def padded(self, array: np.ndarray | jax.Array) -> jax.Array:
        """[images ...] filled up to a whole batch on every device, by the last image, and split over the devices."""
        return parallel.split(parallel.pad(array, parallel.padded_size(len(array), self.mesh.size)), self.mesh)

    def network(self, name: str) -> tuple[Graph, dict[str, jax.Array]]:
        """The static graph of a component and its parameters by name, on every device of the mesh."""
        module = getattr(self, name)
        if name not in self._networks or self._networks[name].module is not module:
            self._networks[name] = Network(module, self.mesh)
        return self._networks[name].graph, self._networks[name].params()

    def load_lora(
        self,
        path_or_hub_id: str | os.PathLike,
        weight: float = 1.0,
        name: str | None = None,
        *,
        revision: str | None = None,
    ) -> str:
        """Adds a LoRA (arXiv:2106.09685) to those that are set, with this weight, and returns its name.

        path_or_hub_id: a file, a folder or a Hub repository that holds one, of kohya's, PEFT's or diffusers' spelling.
        name: what `set_loras` calls it; None: that of the file, or of the repository.
        Raises CheckpointError, before anything is changed, for one that does not fit these models, ValueError for a
        name that is taken.
        """
        path = hub.resolve_file(path_or_hub_id, lora.FILE_NAMES, revision=revision)
        if path.name in lora.PEFT_FILE_NAMES and hub.is_id(path_or_hub_id):  # which is half of it
            hub.resolve_file(path_or_hub_id, (lora.ADAPTER_CONFIG,), revision=revision)
        name = name or components.stem(path_or_hub_id)
        loras = self._adapted()
        loras.add(name, lora.read(path, loras.shapes, self.unet.config.to_dict()), weight)
        return name

    def set_loras(self, weights: Mapping[str, float]) -> None:
        """Gives loaded LoRAs these weights and all others none. Compiles nothing.

        Raises ValueError for one that is not loaded.
        """
        self._adapted().set(weights)

    def unload_loras(self) -> None:
        """Forgets all LoRAs; the weights are what they were, bit for bit."""
        if self.loras is not None:
            self.loras.clear()
            self.loras = None

    def _adapted(self) -> Loras:
        """The LoRAs of the models that this pipeline has now."""
        models = {name: getattr(self, name) for name in ADAPTED if getattr(self, name) is not None}
        if self.loras is None:
            self.loras = Loras(models)
        elif replaced := [name for name in models if self.loras.models.get(name) is not models[name]]:
            raise ValueError(
                f"{', '.join(replaced)}: replaced after LoRAs were loaded; call unload_loras, load them again"
            )
        return self.loras

    def load_ip_adapter(
        self,
        path_or_hub_id: str | os.PathLike | Sequence[str | os.PathLike],
        subfolder: str | Sequence[str] = "",
        weight_name: str | Sequence[str] = "",
        image_encoder_folder: str | None = "image_encoder",
        *,
        revision: str | None = None,
    ) -> None:
        """Loads an IP-Adapter (arXiv:2308.06721), or one for each value of lists, in place of those that are loaded.

        path_or_hub_id: a file, or a folder or Hub repository that has subfolder/weight_name. image_encoder_folder:
        where CLIP's image encoder is, beside the first file, or, with a slash in it, below the folder or repository;
        None: nowhere. It is loaded unless the pipeline has one; without it a call takes ip_adapter_image_embeds alone.
        One of faces (FaceID) needs none, and has a LoRA, which is set as "faceid_0".
        Raises CheckpointError, before anything is changed, for what does not fit the UNet or the image encoder.
        """
        given = {"path_or_hub_id": path_or_hub_id, "subfolder": subfolder, "weight_name": weight_name}
        places = _for_each(given)
        adapters, loras = [], {}
        for i, (path, folder, name) in enumerate(places):
            inside = [PurePosixPath(folder, name).as_posix()] if name else []
            file = hub.resolve_file(path, inside, revision=revision)
            adapter, loras[FACE_LORAS[i]] = IPAdapter.of_file(file, self.unet)
            adapters.append(adapter)
        encoder, kinds = self.image_encoder, {adapter.config.kind for adapter in adapters}
        if encoder is None and image_encoder_folder is not None and kinds != {"face"}:
            path, folder = hub.folder_of(*places[0][:2])
            near = PurePosixPath("" if "/" in image_encoder_folder else folder, image_encoder_folder).as_posix()
            options = {"revision": revision, "dtype": self.unet.conv_in.dtype}
            encoder = CLIPVisionModelWithProjection.from_pretrained(path, near, **options)
        for adapter in adapters if encoder is not None else ():
            adapter.check_encoder(encoder)
        self.image_encoder = encoder
        self._set_ip_adapters(adapters)
        for name, layers in loras.items():
            if layers:
                self._adapted().add(name, layers, 1.0)

    def unload_ip_adapter(self) -> None:
        """Forgets all IP-Adapters, the LoRAs in them and, unless the UNet needs it, the image encoder."""
        self._set_ip_adapters(())
        if self.image_normalizer is None:
            self.image_encoder = None

    def _set_ip_adapters(self, adapters: Sequence[IPAdapter]) -> None:
        for i, name in enumerate(IP_ADAPTERS):
            setattr(self, name, adapters[i] if i < len(adapters) else None)
            if self.loras is not None:
                self.loras.remove(FACE_LORAS[i])
        if self.loras is not None and not self.loras.layers:
            self.unload_loras()

    def load_textual_inversion(
        self, path_or_hub_id: str | os.PathLike, token: str | None = None, *, revision: str | None = None
    ) -> str:
        """Teaches the text encoders a word (arXiv:2208.01618), for prompts and negative prompts, and returns it.

        path_or_hub_id: a file, a folder or a Hub repository that holds one. token: the word; None: the file's own,
        else its name. Raises CheckpointError where it does not fit the text encoders, ValueError for a word that is
        known already.
        """
        path = hub.resolve_file(path_or_hub_id, textual_inversion.FILE_NAMES, revision=revision)
        embedding = textual_inversion.read(path)
        token = token or embedding.token or components.stem(path_or_hub_id)
        fitting = self._fitting(embedding.vectors, path)
        for name, vectors in fitting.items():
            known, added = len(self.text_tokenizers[name]), len(self.learned.get(name, ()))
            rows = getattr(self, name).config.vocab_size + added
            if known != rows:
                raise ValueError(f"{name} has {rows} rows for the {known} tokens of its tokenizer: none can be added")
            self.text_tokenizers[name].check_new(token, len(vectors))
        for name, vectors in fitting.items():
            self.text_tokenizers[name].add_token(token, len(vectors))
            added = [self.learned[name]] if name in self.learned else []
            self.learned[name] = np.concatenate([*added, vectors])
        return token

    def _fitting(self, vectors: Mapping[str | None, np.ndarray], path: Path) -> dict[str, np.ndarray]:
        """The vectors by text encoder: that which the file names, or that of their width."""
        widths = {name: getattr(self, name).config.hidden_size for name in self.text_tokenizers}
        fitting = {
            name: rows
            for component, rows in vectors.items()
            for name, width in widths.items()
            if component in (None, name) and width == rows.shape[1]
        }
        if len(fitting) != len(vectors):
            found = ", ".join(f"{rows.shape[1]} for {name or 'a text encoder'}" for name, rows in vectors.items())
            known = ", ".join(f"{width} ({name})" for name, width in widths.items())
            raise CheckpointError(f"{path}: vectors of another width than this model's: {found}; here: {known}")
        for name, rows in fitting.items():
            dtype = getattr(self, name).text_model.embeddings.token_embedding.embedding.dtype
            if casting.cast(rows, dtype) is None:
                raise CheckpointError(f"{path}: its vectors for the {name} are too large for {dtype}")
        return fitting


def _for_each(given: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The values of each IP-Adapter: of a list, or one for all. Raises ValueError that begins with what is wrong."""
    listed = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    count = max(map(len, listed.values()))
    if count > len(IP_ADAPTERS):
        raise ValueError(f"{count} IP-Adapters; {len(IP_ADAPTERS)} at most")
    return list(zip(*(spread(name, own, [count], "IP-Adapters") for name, own in listed.items()), strict=True))
