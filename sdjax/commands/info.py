"""`sdjax info`: what a model is made of, the devices, and the versions of what runs it."""

import math
from typing import Annotated

import typer

from sdjax.commands import installed
from sdjax.commands.options import MODEL_HELP, Prediction, Revision, Variant, print_warning


def info(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    variant: Variant = None,
    revision: Revision = None,
    prediction_type: Prediction = None,
) -> None:
    """Show a model's components, their parameters and bytes as the files have them, devices and versions.

    A TPU or GPU that JAX does not use is a warning.
    """
    import jax
    from flax import nnx

    from sdjax.pipeline import StableDiffusionPipeline
    from sdjax.runtime import host

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
        memory = (device.memory_stats() or {}).get("bytes_limit", 0)
        shown = f"{memory:>13,} bytes" * bool(memory)
        print(f"{'device':<16}{f'{device.platform}:{device.id} {device.device_kind}':<29}{shown}".rstrip())
    memory, free = host.total(), host.available()
    if math.isfinite(memory):
        print(f"{'host':<16}{f'{free:,.0f} free':<29}{memory:>13,.0f} bytes")
    found = installed.versions()
    print(f"{'versions':<16}{', '.join(f'{name} {own}' for name, own in found.items())}")
    for warning in installed.unused(found, {device.platform for device in jax.devices()}):
        print_warning(warning)
