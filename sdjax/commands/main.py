"""The `sdjax` command: parses, calls, prints. What is slow to import is imported by the command that needs it."""

import gc
import itertools
import math
import os
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdjax.commands.batch import batch
from sdjax.commands.compile import compile_model
from sdjax.commands.plan import plan
from sdjax.options import (
    EMBEDDED_GUIDANCE,
    MODEL_HELP,
    Dtype,
    Noise,
    Prediction,
    Revision,
    Spacing,
    Variant,
    check_new,
    check_out,
    check_writable,
    interval_text,
    parse_embeddings,
    parse_interval,
    parse_lora,
    parse_pair,
    parse_seeds,
    slug,
    unused,
)

if TYPE_CHECKING:
    from PIL.Image import Image

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

INTERRUPTED = 130  # 128 + SIGINT
PROBLEMS_SHOWN = 5  # of each kind, of the hundreds that a checkpoint may have
LINE_LENGTH = 2000  # characters of an error


def main(args: list[str] | None = None) -> None:
    """Runs the command. What goes wrong is one line on stderr, with exit status 2; after Ctrl-C, 130."""
    gc.disable()  # a seventh of the time of a short run; what runs long enables it
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            status = app(args, prog_name="sdjax", standalone_mode=False) or 0
    except typer.TyperException as error:
        status = _fail(error.format_message())
    except (ValueError, OSError) as error:
        status = _fail(str(error))
    finally:
        gc.enable()
    if status == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    sys.exit(status)


def _fail(message: str) -> int:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    return 2


def _one_line(message: str) -> str:
    """The message in one line that a person can read: of problems of one kind the first few, and how many more."""
    first, *rest = [line.strip() for line in message.strip().splitlines()] or [""]
    parts = []
    for kind, lines in itertools.groupby(rest, lambda line: line.partition(": ")[0] if ": " in line else ""):
        same = list(lines)
        parts += same[:PROBLEMS_SHOWN]
        if len(same) > PROBLEMS_SHOWN:
            parts.append(f"{kind}: … and {len(same) - PROBLEMS_SHOWN} more".removeprefix(": "))
    line = first + (" " if first.endswith(":") else "; ") + "; ".join(parts) if parts else first
    line = line if len(line) <= LINE_LENGTH else f"{line[:LINE_LENGTH]} …"
    # names in a file may hold signs that a terminal obeys
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda sign: repr(sign[0])[1:-1], line)


def _print_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("sdjax"))
        raise typer.Exit


@app.callback()
def _sdjax(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Stable Diffusion in JAX: text in, pictures out."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows", show_default=False)],
    negative: Annotated[str | None, typer.Option(help="What the picture should not show", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="7, or 1,5,9, or 0:16 (0 to 15): a picture each [default: 0, or 0:N for a grid of N]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps")] = 50,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="How closely to follow the prompt; 1: no guidance [default: 7.5; SDXL: 5; embedded model: 3]"
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="See `sdjax samplers` [default: the model's]")] = None,
    spacing: Annotated[
        Spacing | None, typer.Option(help="Of the timesteps; turbo models want trailing [default: the model's]")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, such as 512x768 [default: the model's]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new .png file, or a folder [default: here, named after prompt and seed]")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="ROWSxCOLUMNS: all pictures in one file")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the computation [default: bfloat16 on TPU and GPU, float32 on CPU]")
    ] = None,
    variant: Variant = None,
    revision: Revision = None,
    prediction_type: Prediction = None,
    vae: Annotated[
        str | None,
        typer.Option(help="In place of the model's VAE: a folder, a weight file or a Hub id", show_default=False),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<path[:weight]>", help="A LoRA: a file or a Hub id, such as style.safetensors:0.8; repeatable"
        ),
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<path[:word]>",
            help="A textual inversion: a file or a Hub id, and what prompts call it [default: the word in it, else its "
            "name]; repeatable",
        ),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            min=0, help='Text encoder layers to leave out: 1 is the web UI\'s "Clip skip: 2"', show_default=False
        ),
    ] = None,
    noise: Annotated[
        Noise, typer.Option(help="Start from the noise that a seed has here, in PyTorch on a CPU, or on an NVIDIA GPU")
    ] = Noise.jax,
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="<low:high>",
            help="Guidance at these noise levels alone, such as 0.3:5 or 0.3:inf: steps without take half the time",
            show_default=False,
        ),
    ] = None,
    cache_interval: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compute the UNet in full at every so many steps, its outermost layers alone at the others",
            show_default=False,
        ),
    ] = None,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode in overlapping tiles what is too large for the memory")
    ] = False,
    compiled: Annotated[
        Path | None,
        typer.Option(help="A file that `sdjax compile` made: starts sooner, draws the same", show_default=False),
    ] = None,
    safety_checker: Annotated[
        bool, typer.Option(help="Whether the model's safety checker, if it has one, makes what it flags black")
    ] = True,
) -> None:
    """Turn a prompt into pictures; print where they are.

    Every PNG carries the settings that made it. A picture that is not finite is not written (in a grid it is black),
    and the exit status is 1.
    """
    shape = parse_pair("--grid", grid)
    width, height = parse_pair("--size", size) or (None, None)
    chosen = parse_seeds(f"0:{math.prod(shape or (1,))}" if seeds is None else seeds)
    if shape and math.prod(shape) != len(chosen):
        raise ValueError(f"--grid {grid} takes {math.prod(shape)} pictures; --seeds {seeds} makes {len(chosen)}")
    if guidance is None and model is None:
        guidance = EMBEDDED_GUIDANCE
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"--guidance {guidance}: not a finite number")
    interval = parse_interval("--guidance-interval", guidance_interval)
    loras = dict(parse_lora(text) for text in lora or [])
    if len(loras) < len(lora or []):
        raise ValueError("--lora: names a LoRA twice")
    embeddings = parse_embeddings(embedding or [])
    check_out(out, pictures=1 if shape else len(chosen))
    respaced = {} if spacing is None else {"timestep_spacing": spacing.value}

    from sdjax.sampling import from_config

    if sampler is not None:
        from_config(sampler, **respaced)

    from sdjax import components
    from sdjax.checkpoints import hub, textual_inversion
    from sdjax.checkpoints import lora as lora_files
    from sdjax.pictures import finite
    from sdjax.pictures.images import image_grid
    from sdjax.pictures.settings import picture_settings
    from sdjax.pipeline import StableDiffusionPipeline
    from sdjax.text import prompts, tokenizer

    for path in loras:
        hub.resolve_file(path, lora_files.FILE_NAMES)
    words = {}
    for path, word in embeddings.items():
        found = textual_inversion.read(hub.resolve_file(path, textual_inversion.FILE_NAMES))
        words[path] = word or found.token or components.stem(path)
    for text in (prompt, negative or ""):
        prompts.parse(text, "|".join(map(tokenizer.word_pattern, words.values())) or tokenizer.NOTHING)
    if compiled is not None:
        from sdjax.runtime import ahead

        ahead.load(compiled)
    replaced = ({"vae": vae} if vae else {}) | ({} if safety_checker else {"safety_checker": None})
    loading = {"variant": variant, "revision": revision, "prediction_type": prediction_type and prediction_type.value}
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=dtype, scheduler=sampler, **loading, **replaced)
    if respaced:
        pipe.scheduler = from_config(pipe.scheduler.config, **respaced)
    for path, weight in loras.items():
        pipe.load_lora(path, weight, name=path)
    for path, word in words.items():
        pipe.load_textual_inversion(path, word)
    for warning in unused(words, (prompt, negative or "")):
        _print_warning(warning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", finite.NotFiniteWarning)  # the last line says it
        made = pipe(
            prompt,
            negative_prompt=negative,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=len(chosen),
            seed=chosen,
            clip_skip=clip_skip,
            noise=noise.value,
            guidance_interval=interval,
            cache_interval=cache_interval,
            vae_tiling=vae_tiling,
        )
    pictures = made.images
    if flagged := sum(made.nsfw_content_detected or ()):
        _print_warning(f"the safety checker made {flagged} of {len(pictures)} pictures black")
    said = {
        "prompt": prompt,
        "negative_prompt": negative,  # without one SDXL draws another picture than with an empty one
        "model": model or "embedded",
        "scheduler": sampler,
        "timestep_spacing": spacing and spacing.value,
        "num_inference_steps": steps,
        "guidance_scale": pipe.guidance_scale if guidance is None else guidance,
        "width": pictures[0].width,
        "height": pictures[0].height,
        "dtype": str(pipe.unet.conv_in.kernel.dtype),
        "version": version("sdjax"),
        **loading,
        "loras": loras,
        "embeddings": words,
        "clip_skip": clip_skip,
        "noise": noise.value,
        "guidance_interval": interval_text(interval),
        "cache_interval": cache_interval,
        "vae_tiling": vae_tiling,
        **replaced,
    }
    settings = picture_settings(said, pipe.scheduler.config)
    if shape and not all(made.not_finite):
        name = f"{slug(prompt)}-{chosen[0]}-{chosen[-1]}-grid"
        settings |= {"seed": chosen[0], "seeds": chosen, "grid": shape}
        print(save(out, name, image_grid(pictures, *shape), settings))
    elif not shape:
        for seed, picture, is_wrong in zip(chosen, pictures, made.not_finite, strict=True):
            if not is_wrong:
                print(save(out, f"{slug(prompt)}-{seed}", picture, settings | {"seed": seed}))
    if any(made.not_finite):
        print(f"error: {finite.message(made.not_finite, chosen)}", file=sys.stderr)
        raise typer.Exit(1)


@app.command("samplers")
def list_samplers() -> None:
    """List the samplers: name, diffusers class, options."""
    from sdjax.sampling import NAMES

    for name, (class_name, options) in NAMES.items():
        print(f"{name:<24}{class_name:<33}{' '.join(f'{k}={v}' for k, v in options.items() if v)}".rstrip())


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    variant: Variant = None,
    revision: Revision = None,
    prediction_type: Prediction = None,
) -> None:
    """Show a model's components, their parameters and bytes as the files have them, and the devices."""
    import jax
    from flax import nnx

    from sdjax.pipeline import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        model, dtype="auto", variant=variant, revision=revision, prediction_type=prediction_type
    )
    for name, component in pipe.models.items():
        leaves = jax.tree.leaves(nnx.state(component, nnx.Param))
        parameters, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
        dtypes = " ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        kind = type(component).__name__
        print(f"{name:<16}{kind:<29}{parameters:>13,} parameters {size:>14,} bytes  {dtypes}")
    for name, tokenizer in pipe.tokenizers.items():
        print(f"{name:<16}{type(tokenizer).__name__:<29}{len(tokenizer.vocab):>13,} tokens")
    scheduler = pipe.scheduler.config
    print(f"{'scheduler':<16}{scheduler['_class_name']:<29}{scheduler['prediction_type']:>13}")
    for device in jax.devices():
        print(f"{'device':<16}{device.platform}:{device.id} {device.device_kind}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A diffusers folder, a weight file or a Hub id", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The new folder", show_default=False)],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new files [default: the source's]")] = None,
    variant: Variant = None,
    revision: Revision = None,
    prediction_type: Prediction = None,
) -> None:
    """Turn a checkpoint of any format into a diffusers folder of safetensors.

    The new folder appears whole or not at all.
    """
    folder = target.absolute().parent
    check_new(target, str(target))
    check_writable(folder, str(target))

    from sdjax.pipeline import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        source, dtype=dtype or "auto", variant=variant, revision=revision, prediction_type=prediction_type
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".sdjax-", suffix=".tmp") as unfinished:
        pipe.save_pretrained(Path(unfinished) / "whole")
        os.rename(Path(unfinished) / "whole", target)
    print(target)


app.command("compile")(compile_model)
app.command()(batch)
app.command()(plan)


def save(out: Path | None, stem: str, picture: "Image", settings: dict[str, Any]) -> Path:
    """Writes to the file `out`, or to the first free name of stem.png, stem-2.png, ... in the folder `out`."""
    from sdjax.pictures.images import save_png

    out = out or Path()
    if not out.is_dir():
        return save_png(out, picture, settings)
    for number in itertools.count(1):
        try:
            return save_png(out / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png"), picture, settings)
        except FileExistsError:
            continue
