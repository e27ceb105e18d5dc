"""`sdjax generate`: a prompt to pictures. What it needs is imported when it runs."""

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdjax.commands.model_options import SETTINGS, model_options
from sdjax.commands.options import Dtype, PredictionType, check_out, parse_pair, print_warning
from sdjax.commands.request_options import request_options
from sdjax.fields import Within, checked
from sdjax.request import FIELDS, Request, kinds
from sdjax.request.values import one_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdjax.pipeline import StableDiffusionPipeline

MAX_PICTURES = 10_000
LOADED_AFTER = ("embeddings", "ip_adapters", "image_encoder_folder")
Side = Annotated[int, Within(1, MAX_PICTURES)]


@request_options(sweeps=False)
@model_options
def generate(
    given: Mapping[str, Sequence[Any]],
    of_model: Mapping[str, Any],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A picture that was made here, or with the web UI: its settings, but for options"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new .png file, or a folder [default: here, named after prompt and seed]")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="ROWSxCOLUMNS: all pictures in one file")] = None,
    compiled: Annotated[
        Path | None,
        typer.Option(help="A file that `sdjax compile` made: starts sooner, draws the same", show_default=False),
    ] = None,
) -> None:
    """Turn a prompt into pictures; print where they are.

    Every PNG carries the settings that made it. A picture that is not finite is not written (in a grid it is black),
    and the exit status is 1.
    """
    known = _settings(source, of_model.get("model")) if source else {}
    given = {**_fields(known), **given}
    of_model = {name: known[name] for name in SETTINGS if name in known} | of_model
    if "prompt" not in given:
        raise ValueError("give a prompt, or --from a picture")
    shape = parse_pair("--grid", grid) or known.get("grid")
    seeds = given.pop("seed", range(math.prod(shape or (1,))))
    if len(seeds) > MAX_PICTURES:
        raise ValueError(f"--seeds: more than {MAX_PICTURES} pictures in one run")
    if len(set(seeds)) < len(seeds):
        raise ValueError("--seeds: names a seed twice")
    if shape and math.prod(shape) != len(seeds):
        raise ValueError(f"--grid: {shape[0]}x{shape[1]} takes {math.prod(shape)} pictures; --seeds makes {len(seeds)}")
    check_out(out, pictures=1 if shape else len(seeds))
    base = Request(**{name: value for name, (value, *_) in given.items()})
    requests = [replace(base, seed=seed) for seed in seeds]
    if isinstance(base.scheduler, str) and base.timestep_spacing is not None:
        from sdjax.sampling import from_config

        from_config(base.scheduler, timestep_spacing=base.timestep_spacing)

    words = _words(of_model.get("embeddings", {}))
    _check_texts(base, words)
    if compiled is not None:
        from sdjax.runtime import ahead

        ahead.load(compiled)
    pipe = loaded(of_model | {"embeddings": words}, base.scheduler)
    for path, weight in base.loras:
        pipe.load_lora(path, weight, name=path)
    made = _made(pipe, requests)
    if flagged := sum(made.nsfw_content_detected or ()):
        print_warning(f"the safety checker made {flagged} of {len(seeds)} pictures black")
    _write(out, shape, requests, made, pipe, of_model | {"embeddings": words})


def _settings(source: Path, model: str | None) -> dict[str, Any]:
    """The settings that a picture carries: sdjax's own, else those of the web UI's text.

    Raises ValueError for a picture without any, and for one of the web UI where no model is named.
    """
    from sdjax.pictures import metadata, web_ui

    try:
        settings = metadata.read_settings(source)
    except metadata.NoSettings:
        settings, others = web_ui.read(metadata.read_parameters(source))
        if model is None:
            name = others.get("Model", "an unknown one")
            raise ValueError(f"--from {source}: its model is {name}; give its place by --model") from None
        if left := [name for name in others if name != "Model"]:
            print_warning(f"--from {source}: not made again: {', '.join(left)}")
    for name, kind in {**SETTINGS, "grid": tuple[Side, Side]}.items():
        if name in settings:
            settings[name] = checked(f"--from {source}: {name}", settings[name], kind)
    for name, choices in (("dtype", Dtype), ("prediction_type", PredictionType)):
        if settings.get(name) is not None:
            one_of(f"--from {source}: {name}", settings[name], [choice.value for choice in choices])
    if settings.get("model") == "embedded":
        del settings["model"]
    return settings


def _fields(settings: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """{field: its checked values} of the settings of a picture, or of a grid of several."""
    own = {name: (FIELDS[name].check(settings[name], f"--from: {name}"),) for name in FIELDS if name in settings}
    seeds = {"seed": FIELDS["seed"].values(settings["seeds"], "--from: seed")} if "seeds" in settings else {}
    return own | seeds


def _words(embeddings: Mapping[str, str | None]) -> dict[str, str]:
    """{path: word} of textual inversions, the word of the file where none is given."""
    if not embeddings:
        return {}
    from sdjax.checkpoints import textual_inversion

    return {path: textual_inversion.word(path, word) for path, word in embeddings.items()}


def _check_texts(request: Request, words: Mapping[str, str]) -> None:
    from sdjax.text import editing, prompts, tokenizer

    pattern = tokenizer.words_pattern(words.values())
    own = {name: text for name, spec in FIELDS.items() if spec.kind is kinds.TEXT and (text := getattr(request, name))}
    syntax, steps = request.prompt_syntax, request.num_inference_steps
    parts = [part for name, text in own.items() for part in prompts.texts_of(name, text, syntax)]
    texts = list(dict.fromkeys(text for part in parts for text in editing.by_row(part, steps, syntax, pattern)))
    for text in texts:
        prompts.parse(text, pattern, request.prompt_syntax)
    for warning in prompts.unused_words(words, texts):
        print_warning(warning)


def loaded(of_model: Mapping[str, Any], scheduler: Any = None) -> "StableDiffusionPipeline":
    """The pipeline of these SETTINGS, with the words and IP-Adapters that they name."""
    from sdjax.pipeline import StableDiffusionPipeline

    options = {name: value for name, value in of_model.items() if name not in ("model", *LOADED_AFTER)}
    pipe = StableDiffusionPipeline.from_pretrained(of_model.get("model"), scheduler=scheduler, **options)
    for path, word in of_model.get("embeddings", {}).items():
        pipe.load_textual_inversion(path, word)
    if adapters := of_model.get("ip_adapters"):
        pipe.load_ip_adapter(adapters, image_encoder_folder=of_model.get("image_encoder_folder", "image_encoder"))
    return pipe


def _made(pipe: "StableDiffusionPipeline", requests: Sequence[Request]) -> Any:
    from sdjax.pictures import finite

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", finite.NotFiniteWarning)  # the last line reports it
        return pipe.sample(requests)


def _write(
    out: Path | None,
    shape: Sequence[int] | None,
    requests: Sequence[Request],
    made: Any,
    pipe: "StableDiffusionPipeline",
    of_model: Mapping[str, Any],
) -> None:
    """Writes the pictures, or one of all, and prints where; exit status 1 where some are not finite."""
    from sdjax import inputs
    from sdjax.pictures import finite
    from sdjax.pictures.grids import image_grid
    from sdjax.pictures.metadata import picture_settings, slug

    known = {**of_model, "model": of_model.get("model") or "embedded", "dtype": str(pipe.unet.conv_in.kernel.dtype)}
    model = {name: known[name] for name in SETTINGS if name in known} | {"version": version("sdjax")}
    seeds, stem = [request.seed for request in requests], slug(requests[0].prompt)
    height, width = inputs.request_size(pipe, requests[0])
    scale = inputs.guidance_scale(pipe, cfg_plus_plus=requests[0].cfg_plus_plus)
    filled = {"width": width, "height": height, "guidance_scale": scale}
    config = inputs.scheduler_of(pipe, None, requests[0].timestep_spacing).config

    def settings(request: Request) -> dict[str, Any]:
        own = picture_settings(request, model, config)
        return own | {name: value for name, value in filled.items() if own[name] is None}

    if shape and not all(made.not_finite):
        own = settings(requests[0]) | {"seeds": seeds, "grid": list(shape)}
        print(save(out, f"{stem}-{seeds[0]}-{seeds[-1]}-grid", image_grid(made.images, *shape), own), flush=True)
    elif not shape:
        for request, picture, is_wrong in zip(requests, made.images, made.not_finite, strict=True):
            if not is_wrong:
                print(save(out, f"{stem}-{request.seed}", picture, settings(request)), flush=True)
    if any(made.not_finite):
        print(f"error: {finite.message(made.not_finite, seeds)}", file=sys.stderr)
        raise typer.Exit(1)


def save(out: Path | None, stem: str, picture: "Image", settings: dict[str, Any]) -> Path:
    """Writes to the file `out`, or to the first free name of stem.png, stem-2.png, ... in the folder `out`."""
    from sdjax.pictures.metadata import save_new, save_png

    out = out or Path()
    return save_new(out, stem, picture, settings) if out.is_dir() else save_png(out, picture, settings)
