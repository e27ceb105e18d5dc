"""Which model makes the pictures, and what is in place of its parts: options of the commands, settings of a picture."""

import functools
import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any

import typer

from sdjax.commands.options import MODEL_HELP, Dtype, Prediction, Revision, Variant, parse_embeddings

SOURCE = "a folder, a weight file or a Hub id"

OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "model": (Annotated[str | None, typer.Option(help=MODEL_HELP)], None),
    "dtype": (
        Annotated[
            Dtype | None, typer.Option(help="Of the computation [default: bfloat16 on TPU and GPU, float32 on CPU]")
        ],
        None,
    ),
    "variant": (Variant, None),
    "revision": (Revision, None),
    "prediction_type": (Prediction, None),
    "vae": (
        Annotated[str | None, typer.Option(help=f"In place of the model's VAE: {SOURCE}", show_default=False)],
        None,
    ),
    "controlnet": (
        Annotated[list[str] | None, typer.Option(help=f"A ControlNet: {SOURCE}; repeatable", show_default=False)],
        None,
    ),
    "adapter": (
        Annotated[list[str] | None, typer.Option(help=f"A T2I-Adapter: {SOURCE}; repeatable", show_default=False)],
        None,
    ),
    "upscaler": (
        Annotated[
            str | None, typer.Option(help="For --hires-upscaler model: a weight file of an ESRGAN", show_default=False)
        ],
        None,
    ),
    "ip_adapter": (
        Annotated[
            list[str] | None,
            typer.Option(help="An IP-Adapter: a weight file, here or on the Hub; repeatable", show_default=False),
        ],
        None,
    ),
    "image_encoder_folder": (
        Annotated[
            str | None,
            typer.Option(help="Where its image encoder is [default: image_encoder, beside it]", show_default=False),
        ],
        None,
    ),
    "embedding": (
        Annotated[
            list[str] | None,
            typer.Option(
                metavar="<path[:word]>",
                help="A textual inversion: a file or a Hub id, and what prompts call it [default: the word in it, else "
                "its name]; repeatable",
            ),
        ],
        None,
    ),
    "safety_checker": (
        Annotated[
            bool, typer.Option(help="Whether the model's safety checker, if it has one, makes what it flags black")
        ],
        True,
    ),
}
"""(annotation, default) of each option"""

SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys(("model", "dtype", "variant", "revision", "prediction_type", "vae"), str | None),
    **dict.fromkeys(("upscaler", "safety_checker", "image_encoder_folder"), str | None),
    **dict.fromkeys(("controlnet", "adapter", "ip_adapters"), tuple[str, ...] | None),
    "embeddings": dict[str, str | None],
}
"""Settings of a picture that are of the model, and not of the request, and the kinds of their values"""


def model_options(command: Callable) -> Callable:
    """A command with these options, whose parameter `of_model` has the SETTINGS that they state."""
    parameters = [p for p in inspect.signature(command).parameters.values() if p.name != "of_model"]
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in OPTIONS.items()
    ]

    @functools.wraps(command)
    def wrapped(*given: Any, **options: Any) -> Any:
        stated = _settings({name: options.pop(name) for name in OPTIONS})
        return command(*given, of_model=stated, **options)

    given = [p for p in parameters if p.name == "given"]
    every = [*given, *own, *(p.replace(kind=p.KEYWORD_ONLY) for p in parameters[len(given) :])]
    wrapped.__signature__ = inspect.Signature(every)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return wrapped


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is stated; the safety checker alone is None where it is to be left out."""
    values = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}
    has_checker, words = values.pop("safety_checker"), parse_embeddings(values.pop("embedding") or ())
    values |= {"embeddings": words, "ip_adapters": values.pop("ip_adapter")}
    values |= {name: tuple(values[name] or ()) for name in ("controlnet", "adapter", "ip_adapters")}
    return {name: value for name, value in values.items() if value} | ({} if has_checker else {"safety_checker": None})
