"""What every model shares: a config read from the checkpoint's JSON, loading and saving in the standard layout."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sdjax import fields
from sdjax.checkpoints import folder, hub, weights
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import variables
from sdjax.checkpoints.variables import get_value, set_value
from sdjax.models.layers import shape_only

BFLOAT16_FROM = 8.0  # compute capability: GPUs before it (T4, V100) multiply bfloat16 as slowly as float32


def default_dtype() -> DTypeLike:
    """bfloat16 on TPUs and GPUs, float16 on GPUs of NVIDIA before Ampere, float32 on CPUs."""
    if jax.default_backend() == "cpu":
        return jnp.float32
    capability = getattr(jax.devices()[0], "compute_capability", "")  # a version on NVIDIA's GPUs, "gfx…" on AMD's
    is_old = capability.replace(".", "", 1).isdigit() and float(capability) < BFLOAT16_FROM
    return jnp.float16 if is_old else jnp.bfloat16


OF_FILES_AND_TRAINING = frozenset(
    {
        *("torch_dtype", "dtype", "use_safetensors", "tensor_format", "transformers_version"),
        *("dropout", "gradient_checkpointing", "use_memory_efficient_attention", "split_head_dim"),
        *("decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup"),
    }
)
"""Keys that no result depends on: of storage, of training and its memory, of averaging weights."""


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a checkpoint's `config.json` that a model depends on. Lists become tuples.

    `neutral` holds the values that are implemented for a field that has others elsewhere; `unsupported` holds, for keys
    that are no field, the one value that leaves the result unchanged. None and False always do, and every value of the
    keys in OF_FILES_AND_TRAINING. `per_level` names the fields that, where they are tuples, have an entry for each
    level; CheckpointError if they do not.
    """

    neutral: ClassVar[Mapping[str, set]] = {}
    unsupported: ClassVar[Mapping[str, Any]] = {}
    per_level: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        lengths = {k: len(v) for k in self.per_level if isinstance(v := getattr(self, k), tuple)}
        if len(set(lengths.values())) > 1:
            raise CheckpointError(f"{type(self).__name__}: not one entry for each level: {lengths}")

    def check_divides(self, name: str, values: int | tuple[int, ...], widths: tuple[int, ...]) -> None:
        """Raises CheckpointError unless the value of the field (one, or one for each width) divides each width."""
        for i, width in enumerate(widths):
            if width % (value := values[i] if isinstance(values, tuple) else values):
                raise CheckpointError(f"{type(self).__name__}: {name}={value} does not divide {width} channels")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Raises CheckpointError for a value that is not of its field's kind (`sdjax.fields`), and one that lists every
        key whose value would change the result and is not implemented."""
        known = fields.kinds_of(cls)
        try:
            values = {k: fields.checked(k, v, known[k]) for k, v in config.items() if k in known}
        except ValueError as error:
            raise CheckpointError(f"{cls.__name__}: {error}") from None
        rest = {k: v for k, v in config.items() if k not in known and not str(k).startswith("_")}
        wrong = [f"{k}={fields.brief(v)}" for k, v in rest.items() if not cls._is_neutral(k, v)]
        for key, accepted in cls.neutral.items():
            given = values.get(key, ())
            wrong += [f"{key}={v!r}" for v in (given if isinstance(given, tuple) else (given,)) if v not in accepted]
        if wrong:
            raise CheckpointError(f"{cls.__name__}: not implemented: {', '.join(wrong)}")
        return cls(**values)

    def compute_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype that a model loaded in this one has: another where this one would spoil the result."""
        return dtype

    @classmethod
    def _is_neutral(cls, key: str, value: Any) -> bool:
        known = key in OF_FILES_AND_TRAINING or (key in cls.unsupported and value == cls.unsupported[key])
        return known or value is None or value is False

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` spells them."""
        return dataclasses.asdict(self)


class NoKeys:
    """Stands for nnx.Rngs where nothing is drawn."""

    def params(self) -> None:
        """No key."""


class Model(nnx.Module):
    """A network whose attribute names are its checkpoint's names.

    `renames` are (pattern, replacement) pairs from older spellings of a key to today's, `ignored` is a pattern of keys
    that hold no parameter, `weights_stem` names the weight file, `saved_as` the class in PyTorch, where it has another
    name.
    """

    config_class: ClassVar[type[ModelConfig]]
    renames: ClassVar[Iterable[tuple[str, str]]] = ()
    ignored: ClassVar[str | None] = None
    weights_stem: ClassVar[str] = "diffusion_pytorch_model"
    saved_as: ClassVar[str | None] = None

    @classmethod
    def takes(cls, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is of this class."""
        return str(config.get("_class_name")).removeprefix("Flax") == (cls.saved_as or cls.__name__)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kw: Any) -> Self:
        """A freshly initialised model from a `config.json` dict; keywords: rngs, dtype, param_dtype."""
        return cls(cls.config_class.from_dict(config), **{"rngs": nnx.Rngs(0), **kw})

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: DTypeLike | str | None = None,
        variant: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Self:
        """Loads `config.json` and the weights beside it (`sdjax.checkpoints.weights`) from a folder or from the Hub.

        dtype: see `from_tensors`. variant: "fp16" reads `model.fp16.safetensors`, and `model.safetensors` where there
        is none. config: keys that replace those of `config.json`. Raises CheckpointError for weights that are
        unreadable or do not fit, FileNotFoundError if there is no such folder.
        """
        path = hub.resolve(path_or_id, revision=revision, subfolder=subfolder, variant=variant)
        values = folder.read_json(path / "config.json") | dict(config or {})
        read = cls._config(values, str(path / "config.json"))
        tensors = cls._own(values, weights.read_tensors(path, cls.weights_stem, variant))
        return cls._filled(read, tensors, str(path), dtype)

    @classmethod
    def from_tensors(
        cls,
        config: Mapping[str, Any],
        tensors: Iterable[tuple[str, np.ndarray]],
        *,
        source: str,
        dtype: DTypeLike | str | None = None,
    ) -> Self:
        """A model of a `config.json` dict and of (PyTorch name, array in PyTorch's layout) pairs.

        dtype is that of the parameters and of the computation, if the config agrees (`ModelConfig.compute_dtype`).
        None: bfloat16 on TPUs and GPUs, float32 on CPUs; "auto": the same for the computation, while parameters keep
        the dtypes that they are given in.
        Raises one CheckpointError that begins with source and lists every unknown, misshapen, repeated, non-finite and
        missing tensor.
        """
        return cls._filled(cls._config(config, source), cls._own(config, tensors), source, dtype)

    @classmethod
    def described(cls, config: ModelConfig, dtype: DTypeLike) -> Self:
        """The model with shapes in place of its parameters, in this dtype if the config agrees."""
        graph, shapes = _structure(cls, config, config.compute_dtype(dtype))
        return nnx.merge(graph, jax.tree.map(lambda shape: shape, shapes))  # with variables of its own

    @classmethod
    def _config(cls, values: Mapping[str, Any], source: str) -> ModelConfig:
        known = cls.saved_as or cls.__name__
        class_name = values.get("_class_name", known)
        if class_name not in (known, f"Flax{known}"):
            raise CheckpointError(f"{source}: describes {str(class_name)[:60]}, not {known}")
        try:
            return cls.config_class.from_dict(values)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error

    @classmethod
    def _own(
        cls, config: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]]
    ) -> Iterable[tuple[str, np.ndarray]]:
        """Of a checkpoint's tensors those of this model: all, unless its `config.json` describes more than this one."""
        return tensors

    @classmethod
    def _filled(
        cls, config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], source: str, dtype: DTypeLike | str | None
    ) -> Self:
        keep = isinstance(dtype, str) and dtype == "auto"
        model = cls.described(config, default_dtype() if dtype is None or keep else dtype)
        folder.fill(model, tensors, source=source, renames=cls.renames, ignored=cls.ignored, keep_dtypes=keep)
        return model

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes `config.json` and safetensors as PyTorch diffusers and transformers read them."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        folder.write_tensors(path / f"{self.weights_stem}.safetensors", self)
        folder.write_json(path / "config.json", self.config_header() | self.config.to_dict())

    def config_header(self) -> dict[str, Any]:
        """What `config.json` has beside the fields of the config."""
        return {"_class_name": self.saved_as or type(self).__name__}


@functools.lru_cache(maxsize=32)
def _structure(cls: type[Model], config: ModelConfig, dtype: DTypeLike) -> tuple[nnx.GraphDef, nnx.State]:
    """What `described` merges: of SD 1's UNet in a twentieth of the time in which its modules are constructed."""
    model = cls(config, dtype=dtype, param_dtype=dtype, init=shape_only, rngs=NoKeys())
    for variable in variables(model).values():
        value = get_value(variable)
        set_value(variable, jax.ShapeDtypeStruct(value.shape, value.dtype))
    return nnx.split(model)
