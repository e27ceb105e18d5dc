"""`sdjax train`: a command for each of what can be trained, with the options of its runs. What it needs is imported
when it runs."""

import gc
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from sdjax.request import kinds
from sdjax.training.options import METHODS, TEXTS, Option, Options, of_method

HELP = {
    "lora": "Train a LoRA on pictures with captions: a small file of a style or a subject.",
    "dreambooth": "Train a subject from a few pictures, and keep what its class looks like: a LoRA or a model.",
    "textual-inversion": "Train the vectors of a new word on a few pictures.",
    "controlnet": "Train a ControlNet on pictures, their captions and what it is to be shown for each.",
    "full": "Train the whole UNet, and the text encoders with --train-text-encoder: a new model.",
}
"""By method"""
RESUMED = "Interrupted by anything, the same command goes on where its last checkpoint is."

app = typer.Typer(
    help="Train LoRAs, subjects, words, ControlNets and whole models on pictures.",
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},  # as diffusers' scripts spell it
)


def _command(method: str) -> Callable[..., None]:
    """The command of a method, with its options."""

    def command(*, quiet: bool, **texts: Any) -> None:
        given = _values(method, texts)
        gc.enable()
        _run(Options.of(method, **given), quiet=quiet)

    parameters = [_parameter(option) for option in of_method(method).values()]
    parameters.append(_keyword("quiet", Annotated[bool, typer.Option("--quiet", help="No progress")], False))
    command.__signature__ = Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = f"{HELP[method]} {RESUMED}"
    return command


def _parameter(option: Option) -> Parameter:
    if option.name == "data":
        return _keyword(option.name, Annotated[str, typer.Argument(help=option.help, show_default=False)], MISSING)
    names = list(option.options)
    help = option.help
    if option.kind is kinds.FLAG:
        names = [f"{names[0]}/--no-{names[0][2:]}"] if option.default else names
        kind: Any = bool | None
    else:
        kind = list[str] | None if option.kind is TEXTS else str | None
    if option.kind is not kinds.FLAG and option.default not in (None, MISSING, ()) and "[default" not in help:
        help = f"{help} [default: {_text(option.default)}]"
    return _keyword(option.name, Annotated[kind, typer.Option(*names, help=help, show_default=False)], None)


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _keyword(name: str, annotation: Any, default: Any) -> Parameter:
    default = Parameter.empty if default is MISSING else default
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _values(method: str, texts: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of the options that are there. Raises ValueError that begins with the option."""
    given = {}
    for name, option in of_method(method).items():
        value = texts[name]
        if value is None or value == []:
            if option.default is MISSING:
                raise ValueError(f"{option.options[0]}: is needed; {option.help[0].lower()}{option.help[1:]}")
            continue
        shown = option.options[0] if name != "data" else "the data"
        given[name] = option.check(option.kind.parse(value) if isinstance(value, str) else value, shown)
    return given


def _run(options: Options, *, quiet: bool) -> None:
    """Trains; prints where the result is. Exit status 1 for a run that failed, 128 + a signal that stopped it."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # what orbax and grain say of themselves
    from sdjax.runtime.progress import duration
    from sdjax.training import report
    from sdjax.training.checkpoints import NotWrittenError
    from sdjax.training.run import run
    from sdjax.training.steps import NotFiniteError
    from sdjax.training.stopping import Stopped

    try:
        with report.shown(quiet=quiet) as on_progress:
            done = run(options, on_progress)
    except Stopped as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(128 + error.signum) from None
    except (NotFiniteError, NotWrittenError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(done.out)
    if not quiet:
        loss = f", loss {done.loss:.4f} over the last tenth" if done.steps else ""
        print(f"{done.steps:,} steps in {duration(done.seconds)}{loss}; more in {done.folder}", file=sys.stderr)


for _method in METHODS:
    app.command(_method)(_command(_method))
