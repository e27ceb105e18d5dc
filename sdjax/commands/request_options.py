"""The fields of a request as options of the command."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from sdjax.commands.options import parse_pair
from sdjax.request import FIELDS, Spec, kinds
from sdjax.request.values import parse_lora

SIZE_HELP = "WIDTHxHEIGHT, such as 512x768 [default: the model's]"
REPEATED = ("loras", "control_image", "ip_adapter_image", "ip_adapter_mask")
"""Fields of several values, an option for each"""
SWEEP = "; repeat it for a sweep"


def request_options(*, sweeps: bool) -> Callable[[Callable], Callable]:
    """A command with an option for each field of `Request`, whose first parameter `given` has their values.

    given: {field: its checked values}, of the options that are there. sweeps: whether options are repeated for several
    values, the prompt one of them; otherwise the prompt is the command's argument.
    """

    def decorate(command: Callable) -> Callable:
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(inspect.signature(command).parameters.values())[1:]]
        parameters = {spec.name: _parameter(spec, sweeps) for spec in FIELDS.values() if spec.option}
        parameters["size"] = _parameter_of("size", "--size", SIZE_HELP, str | None)

        @functools.wraps(command)
        def wrapped(**options: Any) -> Any:
            texts = {name: options.pop(name) for name in parameters}
            return command(values_of(texts, sweeps=sweeps), **options)

        every = [*parameters.values(), *own]
        wrapped.__signature__ = inspect.Signature(every)
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return wrapped

    return decorate


def values_of(texts: Mapping[str, Any], *, sweeps: bool) -> dict[str, Sequence[Any]]:
    """{field: its checked values} of the options that are there. Raises ValueError that begins with the option."""
    given = {}
    for name, value in texts.items():
        if value is None or value == []:
            continue
        if name == "size":
            width, height = parse_pair("--size", value)
            given |= {"width": (width,), "height": (height,)}
        elif name == "loras":
            given[name] = (_loras(value),)
        elif name in REPEATED and not sweeps:
            given[name] = (FIELDS[name].check(value, FIELDS[name].option),)
        else:
            given[name] = _values(FIELDS[name], value)
    return given


def _values(spec: Spec, value: Any) -> Sequence[Any]:
    option = spec.option if spec.option != "--prompt" else "the prompt"
    listed = value if isinstance(value, list) else [value]
    return spec.values([spec.kind.parse(text) if isinstance(text, str) else text for text in listed], option)


def _loras(texts: Sequence[str]) -> Any:
    pairs = dict(parse_lora(text) for text in texts)
    if len(pairs) < len(texts):
        raise ValueError("--lora: names a LoRA twice")
    return FIELDS["loras"].check(pairs, "--lora")


def _parameter(spec: Spec, sweeps: bool) -> inspect.Parameter:
    repeated = spec.name in REPEATED or (sweeps and spec.name != "seed")
    if spec.kind is kinds.FLAG:
        option = spec.option if not spec.default else f"{spec.option}/--no-{spec.option[2:]}"
        return _parameter_of(spec.name, option, spec.help, bool | None)
    help = spec.help + (SWEEP if sweeps and repeated and spec.name != "loras" else "")
    if spec.name == "prompt" and not sweeps:
        argument = typer.Argument(help=help, show_default=False)
        return _keyword("prompt", Annotated[str | None, argument])
    return _parameter_of(spec.name, spec.option, help, list[str] | None if repeated else str | None)


def _parameter_of(name: str, option: str, help: str, annotation: Any) -> inspect.Parameter:
    return _keyword(name, Annotated[annotation, typer.Option(option, help=help, show_default=False)])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)
