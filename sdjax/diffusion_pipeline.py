"""What a pipeline is made of: its components loaded, saved, replaced, and on the devices of a mesh."""

import collections
import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from sdjax import components, sampling
from sdjax.adapters import Adapters
from sdjax.checkpoints.folder import variables
from sdjax.checkpoints.variables import get_value, set_value
from sdjax.components import ADAPTERS, CONTROLNETS, IP_ADAPTERS, MODELS, TOKENIZERS
from sdjax.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    ControlNetModel,
    LatentUpscaler,
    RRDBNet,
    StableDiffusionSafetyChecker,
    StableUnCLIPImageNormalizer,
    T2IAdapter,
    UNet2DConditionModel,
)
from sdjax.notebooks import tables
from sdjax.request.elsewhere import hint
from sdjax.runtime import compile_cache, compiler_memory, parallel
from sdjax.runtime.network import Graph, Network
from sdjax.sampling import Scheduler
from sdjax.schedulers import NOISING
from sdjax.text.tokenizer import CLIPTokenizer

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "fluent-emoji"
"""The folder of the model that comes with the package"""

WORDS = "added_embeddings"
"""In the parameters, the key of the vectors of loaded words: {text encoder: [N D]}"""
ADDED = 64  # rows of added embeddings come in multiples, so that few numbers of them are compiled


@functools.cache
def _prepare_compiler() -> None:
    """At the first pipeline; importing sdjax changes nothing in JAX."""
    compile_cache.enable()
    compiler_memory.enable()


class DiffusionPipeline(Adapters):
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
        super().__init__()
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
        self.shows_progress = True

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}{hint(name, dir(type(self)), every=False)}"
        )

    def __repr__(self) -> str:
        """Components with their classes, sizes and dtypes, the scheduler, and the devices."""
        lines = [f"{name}: {', '.join(filter(None, texts))}" for name, *texts in self._described()]
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"

    def _repr_html_(self) -> str:
        """The same, as notebooks show it."""
        return tables.html(type(self).__name__, self._described())

    def _described(self) -> Iterator[tuple[str, str, str, str]]:
        """Name, class, size and dtype of what there is."""
        for name, model in self.models.items():
            leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
            count, dtypes = sum(leaf.size for leaf in leaves), " ".join(sorted({str(leaf.dtype) for leaf in leaves}))
            yield name, type(model).__name__, f"{count:,} parameters", dtypes
        for name, tokenizer in self.tokenizers.items():
            yield name, type(tokenizer).__name__, f"{len(tokenizer):,} tokens", ""
        config = self.scheduler.config
        yield "scheduler", sampling.name_of(config) or config["_class_name"], config["prediction_type"], ""
        yield "devices", self.device_kinds, "", ""

    @property
    def device_kinds(self) -> str:
        """What it runs on, such as "8 TPU v5 lite"."""
        kinds = collections.Counter(device.device_kind for device in self.mesh.devices.flat)
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items())

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

    def with_networks(self, **networks: Any) -> Self:
        """A view: this pipeline with these networks in place of its own, while all others are shared.

        networks: by component; None: without. What is not given stays, but controlnet and adapter, a model or a list,
        are all of their kind. LoRAs that are set in this one are set in the view. Raises CheckpointError for networks
        that do not fit the UNet.
        """
        view = copy.copy(self)
        view._networks = collections.ChainMap({}, self._networks)
        found = components.one_by_one(networks)
        for name, model in found.items():
            setattr(view, name, model)
        components.check_fit("controlnet", view.models)
        return view

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

    def leave_devices(self) -> None:
        """Takes the parameters of all components to the host; what is used next is brought back."""
        self._networks.clear()
        for model in self.models.values():
            for variable in variables(model).values():
                if isinstance(value := get_value(variable), jax.Array):
                    set_value(variable, np.asarray(value))
