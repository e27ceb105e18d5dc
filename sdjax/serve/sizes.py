"""How large what a request makes may be, for the model that makes it."""

import math

from sdjax import inputs
from sdjax.inputs.changing import TEXTS
from sdjax.request import Request
from sdjax.serve.limits import Limits
from sdjax.serve.models import Loaded
from sdjax.text import editing, prompts


def check(loaded: Loaded, request: Request, limits: Limits) -> None:
    """Raises ValueError that begins with the field where it is beyond the limits."""
    height, width = inputs.request_size(loaded.pipe, request)
    pixels = width * height * (request.hires_scale or 1) ** 2
    if pixels > limits.pixels:
        raise ValueError(f"width, height: {pixels:,.0f} pixels; {limits.pixels:,} at most")
    if request.padding_mask_crop is not None and request.image is not None:
        pixels = math.prod(request.whole_size)  # into which what is made is put back
        if pixels > limits.pixels:
            raise ValueError(f"padding_mask_crop: of a picture of {pixels:,} pixels; {limits.pixels:,} at most")
    _check_texts(loaded, request, limits.chunks)


def _check_texts(loaded: Loaded, request: Request, most: int) -> None:
    """Of prompts that change from row to row, and of those of several parts: the texts, times the chunks of the longest
    one."""
    tokenizers = [*loaded.pipe.tokenizers.values()]
    rows = loaded.engine.rows(request)
    given = [getattr(request, name) or "" for name in TEXTS]
    changed = [editing.by_row(text, rows, request.prompt_syntax, tokenizers[0].word_pattern) for text in given]
    texts = len(set(zip(*changed, strict=True))) * len(prompts.parts(request.prompt, request.prompt_syntax))
    chunks = texts * loaded.engine.chunks(request)
    if chunks > most:
        raise ValueError(f"prompt: its texts have {chunks:,} chunks of tokens; {most:,} at most")
