"""The `sdjax` command: parses, calls, prints. What is slow to import is imported by the command that needs it."""

import itertools
import math
import os
import re
import sys
import tempfile
import warnings
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

MAX_PICTURES = 10_000
EMBEDDED_GUIDANCE = 3.0  # what suits Stable Diffusion burns the colours of the small model
STEM_LENGTH = 48  # characters of the prompt in a file name
MODEL_HELP = "A diffusers folder, a weight file or a Hub id [default: the embedded model]"
INTERRUPTED = 130  # 128 + SIGINT


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Noise(StrEnum):
    jax = "jax"
    torch = "torch"
    cuda = "cuda"


def main(args: list[str] | None = None) -> None:
    """Runs the command. What goes wrong is one line on stderr, with exit status 2; after Ctrl-C, 130."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            status = app(args, prog_name="sdjax", standalone_mode=False) or 0
    except typer.TyperException as error:
        status = _fail(error.format_message())
    except (ValueError, OSError) as error:
        status = _fail(str(error))
    if status == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    sys.exit(status)


def _fail(message: str) -> int:
    line = re.sub(r"\n\s*", "; ", re.sub(r":\n\s*", ": ", message.strip()))
    print(f"error: {line}", file=sys.stderr)
    return 2


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
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, such as 512x768 [default: the model's]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new .png file, or a folder [default: here, named after prompt and seed]")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="ROWSxCOLUMNS: all pictures in one file")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="[default: bfloat16 on TPU and GPU, float32 on CPU]")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the model's files, such as fp16", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Of the Hub repository", show_default=False)] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE: a folder, a weight file or a Hub id")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="PATH or PATH:WEIGHT, a file or a Hub id; repeatable")] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(help="A textual inversion, a file or a Hub id; its word is its name; repeatable")
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(min=0, help="Text encoder layers to leave out (the web UI counts one more)")
    ] = None,
    noise: Annotated[Noise, typer.Option(help="Whose noise a seed stands for")] = Noise.jax,
    safety_checker: Annotated[bool, typer.Option(help="Use the model's safety checker if it has one")] = True,
) -> None:
    """Turn a prompt into pictures; print where they are.

    Every PNG carries the settings that made it.
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
    loras = [parse_lora(text) for text in lora or []]
    check_out(out, pictures=1 if shape else len(chosen))
    if sampler is not None:
        from sdjax.samplers import from_config

        from_config(sampler)

    from sdjax.images import image_grid
    from sdjax.pipeline import StableDiffusionPipeline

    replaced = ({"vae": vae} if vae else {}) | ({} if safety_checker else {"safety_checker": None})
    pipe = StableDiffusionPipeline.from_pretrained(
        model, dtype=dtype, scheduler=sampler, variant=variant, revision=revision, **replaced
    )
    for path, weight in loras:
        pipe.load_lora(path, weight)
    words = [pipe.load_textual_inversion(path) for path in embedding or []]
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
    )
    pictures = made.images
    if flagged := sum(made.nsfw_content_detected or ()):
        warnings.warn(f"the safety checker made {flagged} of {len(pictures)} pictures black", stacklevel=1)
    settings = {
        "prompt": prompt,
        "negative_prompt": negative or "",
        "model": model or "embedded",
        "sampler": sampler or pipe.scheduler.config["_class_name"],
        "scheduler": dict(pipe.scheduler.config),
        "num_inference_steps": steps,
        "guidance_scale": pipe.guidance_scale if guidance is None else guidance,
        "width": pictures[0].width,
        "height": pictures[0].height,
        "dtype": str(pipe.unet.conv_in.kernel.dtype),
        "version": version("sdjax"),
    }
    more = {"vae": vae, "loras": dict(loras), "embeddings": words, "clip_skip": clip_skip, "noise": noise.value}
    settings |= {name: value for name, value in more.items() if value not in (None, {}, [], "jax")}
    if shape:
        name = f"{slug(prompt)}-{chosen[0]}-{chosen[-1]}-grid"
        settings |= {"seed": chosen[0], "seeds": chosen, "grid": shape}
        print(save(out, name, image_grid(pictures, *shape), settings))
    else:
        for seed, picture in zip(chosen, pictures, strict=True):
            print(save(out, f"{slug(prompt)}-{seed}", picture, settings | {"seed": seed}))


@app.command("samplers")
def list_samplers() -> None:
    """List the samplers: name, diffusers class, options."""
    from sdjax.samplers import NAMES

    for name, (class_name, options) in NAMES.items():
        print(f"{name:<24}{class_name:<33}{' '.join(f'{k}={v}' for k, v in options.items() if v)}".rstrip())


@app.command()
def info(model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None) -> None:
    """Show a model's components, parameters and bytes, and the devices."""
    import jax
    from flax import nnx

    from sdjax.pipeline import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model)
    for name, component in pipe.models.items():
        leaves = jax.tree.leaves(nnx.state(component, nnx.Param))
        parameters, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
        kind = type(component).__name__
        print(f"{name:<14}{kind:<24}{parameters:>13,} parameters {size:>14,} bytes  {leaves[0].dtype}")
    for name, tokenizer in pipe.tokenizers.items():
        print(f"{name:<14}{type(tokenizer).__name__:<24}{len(tokenizer.vocab):>13,} tokens")
    print(f"{'scheduler':<14}{pipe.scheduler.config['_class_name']}")
    for device in jax.devices():
        print(f"{'device':<14}{device.platform}:{device.id} {device.device_kind}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A diffusers folder, a weight file or a Hub id", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The new folder", show_default=False)],
    dtype: Annotated[Dtype | None, typer.Option(help="[default: the source's]")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the source's files, such as fp16", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Of the Hub repository", show_default=False)] = None,
) -> None:
    """Turn a checkpoint of any format into a diffusers folder, which appears whole or not at all."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: exists already; choose another name, or remove it")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.absolute().parent}")

    from sdjax.pipeline import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(source, dtype=dtype or "auto", variant=variant, revision=revision)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as folder:
        pipe.save_pretrained(Path(folder) / "whole")
        os.rename(Path(folder) / "whole", target)
    print(target)


def parse_lora(text: str) -> tuple[str, float]:
    """'style.safetensors:0.8' -> ('style.safetensors', 0.8); the weight is 1 by default."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+))", text, re.ASCII)
    return (match[1], float(match[2])) if match else (text, 1.0)


def parse_pair(option: str, text: str | None) -> tuple[int, int] | None:
    """'512x768' -> (512, 768); None -> None. Raises ValueError unless it is two positive whole numbers."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if not match:
        raise ValueError(f"{option} {text}: not two positive whole numbers, such as 512x768")
    return int(match[1]), int(match[2])


def parse_seeds(text: str) -> list[int]:
    """'1,5,8:11' -> [1, 5, 8, 9, 10].

    Raises ValueError for a seed outside 0 .. 2^64 - 1, an empty range, a seed named twice, too many pictures.
    """
    from sdjax.arguments import MAX_SEED

    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", part.strip(), re.ASCII)
        if not match:
            raise ValueError(f"--seeds {text}: {part!r} is neither a seed (7) nor a range (0:16)")
        start = int(match[1])
        stop = start + 1 if match[2] is None else int(match[2])
        if not start < stop <= MAX_SEED + 1:
            raise ValueError(f"--seeds {text}: {part!r} names no seeds from 0 to 2^64 - 1")
        if len(seeds) + stop - start > MAX_PICTURES:
            raise ValueError(f"--seeds {text}: more than {MAX_PICTURES} pictures in one run")
        seeds += range(start, stop)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: names a seed twice")
    return seeds


def check_out(out: Path | None, *, pictures: int) -> None:
    """Raises ValueError or OSError where `save` could not write that many pictures."""
    out = out or Path()
    folder = out if out.is_dir() else out.parent
    if out.is_dir():
        pass
    elif out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: neither a .png file nor a folder that exists")
    elif pictures > 1:
        raise ValueError(f"--out {out}: one file for {pictures} pictures; name a folder, or add --grid")
    elif os.path.lexists(out):
        raise FileExistsError(f"--out {out}: exists already; choose another name, or remove it")
    if not folder.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--out {out}: the folder {folder} cannot be written to")


def save(out: Path | None, stem: str, picture: "Image", settings: dict[str, Any]) -> Path:
    """Writes to the file `out`, or to the first free name of stem.png, stem-2.png, ... in the folder `out`."""
    from sdjax.images import save_png

    out = out or Path()
    if not out.is_dir():
        return save_png(out, picture, settings)
    for number in itertools.count(1):
        try:
            return save_png(out / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png"), picture, settings)
        except FileExistsError:
            continue


def slug(prompt: str) -> str:
    """'A goose, on blue!' -> 'a-goose-on-blue'; 'image' where nothing is left."""
    return re.sub(r"\W+", "-", prompt.lower())[:STEM_LENGTH].strip("-") or "image"
