"""`sdjax convert`: a checkpoint of any format to a diffusers folder."""

from pathlib import Path
from typing import Annotated

import typer

from sdjax.commands.options import Dtype, Prediction, Revision, Variant, check_new, check_writable


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
    check_new(target, str(target))
    check_writable(target.absolute().parent, str(target))

    from sdjax.files import creating_folder
    from sdjax.pipeline import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        source, dtype=dtype or "auto", variant=variant, revision=revision, prediction_type=prediction_type
    )
    with creating_folder(target) as folder:
        pipe.save_pretrained(folder)
    print(target)
