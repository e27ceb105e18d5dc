"""`sdjax info`: what a model is made of, and the devices."""

from typing import Annotated

import typer

from sdjax.commands.options import MODEL_HELP, Prediction, Revision, Variant


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
        print(f"{name:<16}{type(tokenizer).__name__:<29}{len(tokenizer):>13,} tokens")
    scheduler = pipe.scheduler.config
    print(f"{'scheduler':<16}{scheduler['_class_name']:<29}{scheduler['prediction_type']:>13}")
    for device in jax.devices():
        print(f"{'device':<16}{device.platform}:{device.id} {device.device_kind}")
