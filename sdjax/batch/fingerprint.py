"""A hash that identifies a model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdjax.checkpoints.digests import Part, digest_of, json_part, model_parts, tokenizer_part

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline


def fingerprint(pipe: "StableDiffusionPipeline") -> str:
    """20 hexadecimal digits of all that a picture depends on beside its item.

    SHA-256 of the SHA-256 of every parameter, with the LoRAs that are set, and of its name, shape and dtype, of the
    configs, tokenizers, learned words and noise schedule: 0.6 s of a core for each GB where the processor has
    instructions for SHA-256, 2.2 s elsewhere, on all cores. Cheapest before the first picture, while the parameters are
    on the host.
    """
    return digest_of(_parts(pipe))


def _parts(pipe: "StableDiffusionPipeline") -> Iterator[Part]:
    yield json_part({"pipeline": pipe.config} | {name: dict(own.config) for name, own in pipe.schedulers.items()})
    for name, model in pipe.models.items():
        yield from model_parts(name, model)
    for name, tokenizer in pipe.tokenizers.items():
        yield tokenizer_part(name, tokenizer)
    for name, vectors in pipe.learned.items():
        yield json_part([name, vectors.shape, str(vectors.dtype)])
        yield vectors
