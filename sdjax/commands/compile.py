"""`sdjax compile`: the command's options. What it needs is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from sdjax.commands.options import MODEL_HELP, Dtype, Revision, Variant, check_new, check_writable, parse_pair
from sdjax.request.values import MAX_PICTURES


def compile_model(
    out: Annotated[Path, typer.Option(help="The new file", show_default=False)],
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_PICTURES, help="Pictures made at once")] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, such as 512x768 [default: the model's]")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the computation [default: bfloat16 on TPU and GPU, float32 on CPU]")
    ] = None,
    variant: Variant = None,
    revision: Revision = None,
) -> None:
    """Compile a model's programs into a file, with which `sdjax generate --compiled` starts sooner.

    It fits this version of sdjax and JAX, this kind of device, and pictures with guidance of this batch and size. No
    weights are in it. It holds machine code: use none that you would not run.
    """
    width, height = parse_pair("--size", size) or (None, None)
    check_new(out, f"--out {out}")
    check_writable(out.absolute().parent, f"--out {out}")

    from sdjax import inputs
    from sdjax.pipeline import StableDiffusionPipeline
    from sdjax.runtime import ahead

    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=dtype, variant=variant, revision=revision)
    if inputs.takes_pictures(pipe):
        raise ValueError(f"{model}: its programs take pictures; those of text to image alone can be compiled")
    pipe.set_progress_bar_config(disable=True)
    with ahead.recording() as executables:
        pipe("", height=height, width=width, num_inference_steps=1, num_images_per_prompt=batch)
    ahead.write(out, executables)
    print(out, flush=True)
