"""What a training run is: one frozen record, from whose fields the call and the command's options are made. No JAX.

Names are those of the example scripts of PyTorch diffusers, and of kohya's where those have none.
"""

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from sdjax.request import kinds
from sdjax.request.elsewhere import hint
from sdjax.request.kinds import Kind
from sdjax.request.values import words

LORA, DREAMBOOTH, INVERSION, CONTROLNET, FULL = METHODS = (
    "lora",
    "dreambooth",
    "textual-inversion",
    "controlnet",
    "full",
)
"""What can be trained: a LoRA, a subject beside its class, the vectors of a word, a ControlNet, the whole UNet"""

OPTIMIZERS = ("adamw", "adafactor", "lion", "prodigy", "muon")
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
LEARNING_RATES = {LORA: 1e-4, DREAMBOOTH: 5e-6, INVERSION: 5e-3, CONTROLNET: 1e-5, FULL: 1e-5}
LOW_RANK = 1e-4  # of a DreamBooth that is a LoRA
NOT_IN_LCM = (
    "masked_loss",
    "snr_gamma",
    "noise_offset",
    "input_perturbation",
    "rescale_betas_zero_snr",
    "timestep_bias_strategy",
)
LATEST = "latest"
FILE = ".safetensors"


def _checkpoint(name: str, value: Any) -> int | str:
    return value if value == LATEST else kinds.WHOLE.check(name, value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    return tuple(kinds.TEXT.check(name, one) for one in ([value] if isinstance(value, str) else value))


CHECKPOINT = Kind(_checkpoint)
WORDS = Kind(words, kinds.as_it_is, list)
TEXTS = Kind(_texts, kinds.as_it_is, list)


@dataclass(frozen=True)
class Option:
    """What the call and the command need to know of a field."""

    name: str
    default: Any
    kind: Kind
    help: str
    of: tuple[str, ...]
    """the methods that use it"""
    options: tuple[str, ...]
    """of the command"""

    def check(self, value: Any, name: str | None = None) -> Any:
        """A value as the record has it. Raises ValueError that begins with the name, by default the field's."""
        return None if value is None and self.default is None else self.kind.check(name or self.name, value)


def _field(kind: Kind, help: str, default: Any = MISSING, **said: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help, **said})


WITH_TEXTS = (LORA, DREAMBOOTH, CONTROLNET, FULL)
ADAPTERS = (LORA, DREAMBOOTH)
TEXT_TRAINED = (LORA, DREAMBOOTH, FULL)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A training run. Made by `Options.of`, which checks; what is None is the model's or the method's own."""

    method: str
    data: str = _field(kinds.TEXT, "Pictures: a folder, .tar shards of the WebDataset, or a URL of either")
    out: str = _field(kinds.TEXT, "Where the result goes: a .safetensors file, or of a model a new folder")
    model: str | None = _field(kinds.TEXT, "A diffusers folder, a weight file or a Hub id [default: embedded]", None)
    # pictures
    resolution: int | None = _field(
        kinds.SIDE, "Pixels: pictures have at most its square of them [default: the model's]", None
    )
    enable_bucket: bool = _field(
        kinds.FLAG, "Whether pictures keep about their shape; otherwise all are cut to squares", True
    )
    center_crop: bool = _field(kinds.FLAG, "What does not fit is cut away on both sides alike, not at random", False)
    random_flip: bool = _field(kinds.FLAG, "Half of the times a picture is seen as in a mirror", False)
    masked_loss: bool = _field(
        kinds.FLAG,
        "Only what is not transparent is learnt, or what is white in the picture that metadata.jsonl names as `mask`",
        False,
    )
    cache_latents: bool = _field(
        kinds.FLAG,
        "Whether pictures are encoded once, on the disk, each with one crop; otherwise in every step",
        True,
    )
    cache_dir: str | None = _field(
        kinds.TEXT, "The folder for what is encoded once, of all runs [default: in the user's cache]", None
    )
    # captions
    instance_prompt: str | None = _field(
        kinds.TEXT, "The caption of pictures that have none", None, of=(LORA, DREAMBOOTH, CONTROLNET, FULL)
    )
    shuffle_caption: bool = _field(
        kinds.FLAG, "Captions are tags between commas, in another order each time", False, of=WITH_TEXTS
    )
    keep_tokens: int = _field(kinds.WHOLE, "With it: so many first tags stay where they are", 0, of=WITH_TEXTS)
    proportion_empty_prompts: float = _field(
        kinds.SHARE, "The part of the times that a picture is seen without its caption", 0.0, of=WITH_TEXTS
    )
    # DreamBooth
    class_prompt: str | None = _field(
        kinds.TEXT, "What the subject is one of: its pictures keep the model as it was", None, of=(DREAMBOOTH,)
    )
    class_data_dir: str | None = _field(
        kinds.TEXT,
        "The folder of these pictures; those that lack are made [default: beside the result]",
        None,
        of=(DREAMBOOTH,),
    )
    num_class_images: int = _field(kinds.COUNT, "How many of them there are", 100, of=(DREAMBOOTH,))
    prior_loss_weight: float = _field(kinds.FACTOR, "How much they count", 1.0, of=(DREAMBOOTH,))
    # textual inversion
    placeholder_token: str | None = _field(
        kinds.TEXT,
        'The word that is learnt, such as "<dog>"',
        None,
        of=(INVERSION,),
        options=("--token", "--placeholder-token"),
    )
    initializer_token: str | None = _field(
        kinds.TEXT,
        "A word of about its meaning, to begin with",
        None,
        of=(INVERSION,),
        options=("--initializer", "--initializer-token"),
    )
    num_vectors: int = _field(kinds.COUNT, "How many vectors it has", 1, of=(INVERSION,))
    learnable_property: str = _field(
        kinds.choice(("object", "style")), "What of the pictures it means: object or style", "object", of=(INVERSION,)
    )
    # what is trained
    rank: int = _field(kinds.COUNT, "Of the LoRA", 4, of=ADAPTERS)
    lora_alpha: float | None = _field(
        kinds.NUMBER, "The LoRA is scaled by this / rank [default: the rank]", None, of=ADAPTERS
    )
    target_modules: tuple[str, ...] = _field(
        WORDS,
        "Ends of the names of the layers that the LoRA changes",
        ("to_q", "to_k", "to_v", "to_out.0"),
        of=ADAPTERS,
    )
    conv_rank: int | None = _field(
        kinds.COUNT, "The rank for the convolutions of the residual blocks (LoCon) [default: none]", None, of=ADAPTERS
    )
    use_dora: bool = _field(kinds.FLAG, "Whether magnitudes are trained apart (DoRA)", False, of=ADAPTERS)
    format: str = _field(
        kinds.choice(("kohya", "diffusers", "peft")),
        "The layout of the LoRA's file: kohya, diffusers or peft",
        "kohya",
        of=ADAPTERS,
    )
    lcm: bool = _field(
        kinds.FLAG, "Train for few steps without guidance, on what the model itself makes (LCM-LoRA)", False, of=(LORA,)
    )
    w_min: float = _field(kinds.FACTOR, "With it: the least guidance of the model", 5.0, of=(LORA,))
    w_max: float = _field(kinds.FACTOR, "The most", 15.0, of=(LORA,))
    num_ddim_timesteps: int = _field(kinds.COUNT, "Steps of its sampling", 50, of=(LORA,))
    huber_c: float = _field(kinds.FACTOR, "Below this a difference costs its square", 0.001, of=(LORA,))
    train_text_encoder: bool = _field(
        kinds.FLAG, "Whether the text encoders are trained as well", False, of=TEXT_TRAINED
    )
    # objective
    prediction_type: str | None = _field(
        kinds.choice(("epsilon", "v_prediction", "sample")), "What the model predicts [default: the checkpoint's]", None
    )
    snr_gamma: float | None = _field(
        kinds.FACTOR, "Weights of min-SNR (arXiv:2303.09556), such as 5 [default: none]", None
    )
    noise_offset: float = _field(kinds.FACTOR, "Noise that a whole channel has in common, such as 0.1", 0.0)
    input_perturbation: float = _field(
        kinds.FACTOR, "Noise on the noise that the model sees (arXiv:2301.11706), such as 0.1", 0.0
    )
    rescale_betas_zero_snr: bool = _field(
        kinds.FLAG, "The last timestep is made noise alone (arXiv:2305.08891), for v_prediction", False
    )
    timestep_bias_strategy: str = _field(
        kinds.choice(("none", "earlier", "later", "range")),
        "Timesteps drawn more often: none, earlier, later, range",
        "none",
    )
    timestep_bias_multiplier: float = _field(kinds.FACTOR, "How many times as often", 1.0)
    timestep_bias_portion: float = _field(kinds.SHARE, "Which part of them is earlier, or later", 0.25)
    timestep_bias_begin: int = _field(kinds.WHOLE, "The first of the range", 0)
    timestep_bias_end: int = _field(kinds.WHOLE, "The one after its last", 1000)
    # optimisation
    max_train_steps: int = _field(kinds.COUNT, "Steps of the optimiser", 1000)
    train_batch_size: int = _field(kinds.COUNT, "Pictures that each device has in a batch", 4)
    gradient_accumulation_steps: int = _field(kinds.COUNT, "Batches in each step", 1)
    gradient_checkpointing: bool = _field(
        kinds.FLAG, "Blocks are computed again on the way back: less memory, more time", False
    )
    mixed_precision: str | None = _field(
        kinds.choice(("no", "bf16")), "no: all in float32; bf16 [default: bf16 on TPU and GPU]", None
    )
    optimizer: str = _field(kinds.choice(OPTIMIZERS), f"One of {', '.join(OPTIMIZERS)}", "adamw")
    learning_rate: float | None = _field(
        kinds.FACTOR, "[default: LoRA 1e-4, DreamBooth 5e-6, textual inversion 5e-3, others 1e-5]", None
    )
    lr_scheduler: str = _field(kinds.choice(SCHEDULES), f"One of {', '.join(SCHEDULES)}", "constant")
    lr_warmup_steps: int = _field(kinds.WHOLE, "Steps over which the learning rate rises from 0", 0)
    lr_num_cycles: int | None = _field(kinds.COUNT, "Of cosine_with_restarts [default: 1]", None)
    lr_power: float = _field(kinds.FACTOR, "Of polynomial", 1.0)
    adam_beta1: float = _field(kinds.SHARE, "Of AdamW and its kin", 0.9)
    adam_beta2: float = _field(kinds.SHARE, "Of AdamW and its kin", 0.999)
    adam_epsilon: float = _field(kinds.FACTOR, "Of AdamW and its kin", 1e-8)
    adam_weight_decay: float = _field(kinds.FACTOR, "Of all trained weights", 1e-2)
    max_grad_norm: float = _field(kinds.FACTOR, "Longer gradients are made so long", 1.0)
    use_ema: bool = _field(kinds.FLAG, "The result is the moving average of the weights", False)
    fsdp: int = _field(kinds.COUNT, "Over how many devices weights and optimiser are split", 1)
    seed: int = _field(kinds.SEED, "Of all chance: the same run again is the same bit for bit on one device", 0)
    # the run
    validation_prompt: tuple[str, ...] = _field(
        TEXTS,
        "Pictures of it are made now and then; repeatable",
        (),
    )
    validation_image: tuple[str, ...] = _field(
        TEXTS,
        "What the ControlNet is shown for each of these prompts; repeatable",
        (),
        of=(CONTROLNET,),
    )
    validation_steps: int = _field(kinds.COUNT, "Steps between such pictures", 250)
    num_validation_images: int = _field(kinds.COUNT, "How many there are of each", 4)
    checkpointing_steps: int = _field(kinds.COUNT, "Steps between checkpoints", 250)
    checkpoints_total_limit: int = _field(kinds.COUNT, "How many checkpoints are kept, the last ones", 2)
    resume_from_checkpoint: int | str = _field(
        CHECKPOINT, "The step of a checkpoint to go on from; 0: begin again", LATEST
    )
    report_to: str | None = _field(kinds.choice(("tensorboard",)), "Also log to tensorboard", None)

    @classmethod
    def of(cls, method: str, **given: Any) -> "Options":
        """The checked options of a method. Raises ValueError that begins with the name of the argument.

        Names have underscores; what is None is left to its default.
        """
        kinds.choice(METHODS).check("method", method)
        known = of_method(method)
        for name in given:
            if name not in known:
                others = ", ".join(FIELDS[name].of) if name in FIELDS else ""
                raise ValueError(f"{name}: " + (f"only with {others}" if others else f"unknown{hint(name, known)}"))
        missing = [name for name, option in known.items() if option.default is MISSING and given.get(name) is None]
        if missing:
            raise ValueError(f"{missing[0]}: is needed")
        given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
        checked = {name: known[name].check(value) for name, value in given.items() if value is not None}
        options = cls(method=method, **checked)
        options._check_together()
        return options

    def _check_together(self) -> None:
        """Raises ValueError for what does not go together."""
        if self.method == INVERSION and not (self.placeholder_token and self.initializer_token):
            raise ValueError(
                "placeholder_token, initializer_token: give the word that is learnt, and one to begin with"
            )
        if self.class_data_dir is not None and self.class_prompt is None:
            raise ValueError("class_data_dir: only with class_prompt, the caption of these pictures")
        if self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(f"lr_warmup_steps: {self.lr_warmup_steps} of {self.max_train_steps} steps in all")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("lr_warmup_steps: constant has none; take lr_scheduler constant_with_warmup")
        if self.keep_tokens and not self.shuffle_caption:
            raise ValueError("keep_tokens: only with shuffle_caption")
        if self.validation_image and len(self.validation_image) != len(self.validation_prompt):
            raise ValueError("validation_image: one for each validation_prompt")
        if self.method == CONTROLNET and self.validation_prompt and not self.validation_image:
            raise ValueError("validation_prompt: a ControlNet also needs validation_image, one for each")
        for name in NOT_IN_LCM if self.lcm else ():
            if getattr(self, name) != FIELDS[name].default:
                raise ValueError(f"{name}: not with lcm, whose loss has none")
        if self.makes_file != self.out.lower().endswith(FILE):
            wanted = f"a {FILE} file" if self.makes_file else "a new folder"
            raise ValueError(f"out: {wanted} is what {self.method} makes, not {self.out}")

    @property
    def is_low_rank(self) -> bool:
        """Whether a LoRA is trained: a DreamBooth is one where its result is a file, or in the layout of PEFT."""
        is_own = self.out.lower().endswith(FILE) or self.format == "peft"
        return self.method == LORA or (self.method == DREAMBOOTH and is_own)

    @property
    def makes_file(self) -> bool:
        """Whether the result is a file, not a folder."""
        return (self.is_low_rank and self.format != "peft") or self.method == INVERSION

    @property
    def rate(self) -> float:
        """The learning rate."""
        own = LOW_RANK if self.is_low_rank else LEARNING_RATES[self.method]
        return own if self.learning_rate is None else self.learning_rate

    @property
    def trains_text(self) -> bool:
        """Whether text encoders, or vectors of words, are trained: their states cannot be computed beforehand."""
        return self.train_text_encoder or self.method == INVERSION

    @property
    def caches_texts(self) -> bool:
        """Whether batches have text states in place of tokens."""
        return not (self.trains_text or self.shuffle_caption)

    def record(self) -> dict[str, Any]:
        """All options as JSON."""
        values = ((option, getattr(self, name)) for name, option in of_method(self.method).items())
        own = {option.name: None if value is None else option.kind.json(value) for option, value in values}
        return {"method": self.method, **own}


def _option(own: Any) -> Option:
    said = own.metadata
    options = said.get("options", (f"--{own.name.replace('_', '-')}",))
    return Option(own.name, own.default, said["kind"], said["help"], said.get("of", METHODS), options)


FIELDS: Mapping[str, Option] = {own.name: _option(own) for own in fields(Options) if own.name != "method"}
"""All options, by name"""


def of_method(method: str) -> dict[str, Option]:
    """The options that a method uses, by name."""
    return {name: option for name, option in FIELDS.items() if method in option.of}
