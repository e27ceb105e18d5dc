"""What the UNet is conditioned on, of requests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.inputs.batches import shared
from sdjax.inputs.given import Given
from sdjax.inputs.guidance import Branch, Guidance
from sdjax.inputs.layers import freed, perturbed_layers
from sdjax.inputs.noise_level import noise_labels
from sdjax.inputs.tasks import ENLARGE, task
from sdjax.models.unet_blocks import at
from sdjax.request import Request
from sdjax.runtime import bounds, programs
from sdjax.runtime.bounds import Load
from sdjax.runtime.lowering import LoweredProgram
from sdjax.sampling.guidance import over
from sdjax.text import conditioning, encoding, prompts
from sdjax.text.conditioning import Condition, Reading
from sdjax.text.encoding import Text

if TYPE_CHECKING:
    from sdjax.diffusion_pipeline import DiffusionPipeline

SECOND = ("prompt_2", "negative_prompt_2")


def reading(pipe: "DiffusionPipeline", clip_skip: int | None) -> Reading:
    """Which states of the text encoders the UNet reads. Raises ValueError for layers that are not there."""
    own = conditioning.READINGS[pipe.unet.config.addition_embed_type]
    layers = min((getattr(pipe, name).config.num_hidden_layers for name in pipe.text_tokenizers), default=0)
    most = layers + 1 + own.layer
    if clip_skip is not None and clip_skip > most:
        raise ValueError(f"clip_skip must be a whole number from 0 to {most}, not {clip_skip!r}")
    return own._replace(layer=own.layer - (clip_skip or 0))


def branches_of(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request],
    given: Given,
    load: Load,
    guidance: Guidance,
    least_chunks: int = 0,
) -> tuple[Condition, ...]:
    """What the UNet is conditioned on in each branch; everything is checked before the first text is encoded.

    least_chunks: how many chunks each text has at least.
    """
    read, count = reading(pipe, shared(requests, "clip_skip")), len(requests)
    readers = tuple(dict.fromkeys((branch.prefix, branch.part) for branch in guidance.branches))
    prefixes = tuple(dict.fromkeys(prefix for prefix, _ in readers))
    if ("negative_", None) in readers and "negative_" in given.embeddings:
        raise ValueError("perp_neg_scale: with a negative_prompt, not with negative_prompt_embeds")
    zeros = bool(pipe.config.get("force_zeros_for_empty_prompt")) and read.pooled
    absent = {
        reader: [zeros and (_has_none(r, reader[1]) or getattr(r, f"{reader[0]}prompt") is None) for r in requests]
        for reader in readers
    }
    requests = [_read(pipe, request) for request in requests]
    texts = {
        reader: {
            encoder: [_text(request, *reader, encoder) for request in requests] for encoder in pipe.text_tokenizers
        }
        for reader in readers
        if reader[0] not in given.embeddings and not all(absent[reader])
    }
    if texts and not pipe.text_tokenizers:
        raise ValueError("this pipeline has no text encoder: give prompt_embeds")
    tokens = encoding.tokenize(
        pipe.text_tokenizers,
        texts,
        shared(requests, "prompt_syntax"),
        lambda tokens: bounds.check(pipe.models, pipe.mesh, load._replace(tokens=tokens)),
        least_chunks,
    )
    _check_tokens(pipe, tokens)
    width = at(pipe.unet.config.cross_attention_dim, 0)
    ready = {
        (prefix, 0): own.condition(prefix, width, read.pooled, count)
        for prefix, own in given.embeddings.items()
        if prefix in prefixes
    }
    lengths = [own["encoder_hidden_states"].shape[1] for own in ready.values()]
    lengths += [own[0].ids[0].size for own in tokens.values()]
    if len(set(lengths)) > 1:
        raise ValueError(f"prompt and negative prompt have {' and '.join(map(str, lengths))} tokens")
    beside = conditioning.guidance_embedding(pipe.unet.config, guidance.scales) | freed(requests)
    beside |= noise_labels(pipe, requests)
    perturbed = perturbed_layers(pipe, requests)
    pooled = given.embeddings[""].pooled if "" in given.embeddings else None
    sizes = {prefix: time_ids(pipe, requests, (load.height, load.width), prefix, pooled) for prefix in prefixes}
    ready = {reader: jax.tree.map(pipe.padded, own) for reader, own in ready.items()}
    ready |= {reader: _encoded(pipe, own, read, load) for reader, own in tokens.items()}
    for reader in readers:
        if reader not in ready:
            ready[reader] = jax.tree.map(jnp.zeros_like, ready["", 0])
        elif any(absent[reader]) and reader in tokens:
            kept = pipe.padded(~np.array(absent[reader]))
            ready[reader] = jax.tree.map(lambda own, kept=kept: own * over(kept, own), ready[reader])

    def condition(branch: Branch) -> Condition:
        seen = None if branch.sees_picture is None else np.full(count, branch.sees_picture, np.float32)
        own = {} if seen is None else {"channel_share": seen}
        if pipe.controlnets:
            own["reads_prompt"] = np.full(count, branch.prefix == "", np.float32)
        if perturbed:
            own["perturbed"] = dict.fromkeys(perturbed, np.full(count, branch.is_perturbed, np.float32))
        return ready[branch.prefix, branch.part] | jax.tree.map(pipe.padded, sizes[branch.prefix] | beside | own)

    return tuple(map(condition, guidance.branches))


def _read(pipe: "DiffusionPipeline", request: Request) -> Request:
    """The request as its texts are read: of the x2 latent upscaler, as in PyTorch, none without any guidance."""
    return replace(request, prompt="") if task(pipe) == ENLARGE and request.guidance_scale == 0 else request


def _has_none(request: Request, part: int | None) -> bool:
    """Whether a branch of this part is one without a text, of this request."""
    return part is None and request.perp_neg_scale > 0


def _text(request: Request, prefix: str, part: int | None, encoder: str) -> str:
    """What a text encoder reads in a branch; a negative prompt that is left out is empty."""
    if _has_none(request, part):
        return ""
    second = getattr(request, f"{prefix}prompt_2") if encoder == "text_encoder_2" else None
    if second is not None:
        return second
    texts = prompts.texts_of(f"{prefix}prompt", getattr(request, f"{prefix}prompt") or "", request.prompt_syntax)
    return texts[part] if part is not None and part < len(texts) else texts[0]


def _check_tokens(pipe: "DiffusionPipeline", tokens: Mapping[str, Sequence[Text]]) -> None:
    for own in tokens.values():
        for name, read in zip(pipe.text_tokenizers, own, strict=True):
            config, length, highest = getattr(pipe, name).config, read.ids.shape[-1], read.ids.max()
            known = config.vocab_size + len(pipe.learned.get(name, ()))
            if length > config.max_position_embeddings or highest >= known:
                raise ValueError(
                    f"the tokenizer does not fit the {name}: it gives {length} tokens, ids up to {highest}, for "
                    f"{config.max_position_embeddings} positions and {known} ids"
                )


def check_sizes(pipe: "DiffusionPipeline", request: Request | None) -> None:
    """Raises ValueError for a field that only SDXL is conditioned on."""
    if pipe.unet.config.addition_embed_type != conditioning.TEXT_TIME:
        for name in (*conditioning.SIZE_FIELDS, *SECOND):
            if getattr(request, name, None) is not None:
                raise ValueError(f"{name}: only SDXL is conditioned on it")


def time_ids(
    pipe: "DiffusionPipeline",
    requests: Sequence[Request | None],
    size: tuple[int, int],
    prefix: str,
    pooled: Any = None,
) -> Condition:
    """{"time_ids": [B 6 or 5]} for SDXL; pooled: the prompt's pooled embeddings where there is no text encoder.

    Raises ValueError for a field that only SDXL is conditioned on.
    """
    config = pipe.unet.config
    for request in requests:
        check_sizes(pipe, request)
    if config.addition_embed_type != conditioning.TEXT_TIME:
        return {}
    encoders = [getattr(pipe, name) for name in pipe.text_tokenizers]
    width = encoders[-1].config.pooled_width if encoders else np.shape(pooled)[-1]
    return {"time_ids": np.stack([conditioning.time_ids(config, width, size, r, prefix) for r in requests])}


def _encoded(pipe: "DiffusionPipeline", texts: Sequence[Text], read: Reading, load: Load) -> Condition:
    graphs, params = zip(*(pipe.network(name) for name in pipe.text_tokenizers), strict=True)
    padded = [jax.tree.map(pipe.padded, own) for own in texts]
    added = [pipe.added_embeddings(name) for name in pipe.text_tokenizers]
    arguments = (pipe.mesh, graphs, list(params), read, padded, added, pipe.vocab_sizes)
    load = load._replace(tokens=texts[0].ids[0].size)
    if bounds.is_near(pipe.models, pipe.mesh, load):
        lowered = LoweredProgram("encode", programs.encode.lower(*arguments), params)
        bounds.check_compiled(pipe.models, pipe.mesh, load, [lowered])
    return programs.encode(*arguments)
