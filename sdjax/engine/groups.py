"""Requests by what they can be computed together with, and in units of a fixed composition."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sdjax import inputs
from sdjax.request import Request, TableKey
from sdjax.text import editing, prompts
from sdjax.text.tokenizer import NOTHING

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline
    from sdjax.text.tokenizer import CLIPTokenizer

TEXTS_REMEMBERED, TABLES_REMEMBERED = 8192, 8192


class Group(NamedTuple):
    """What requests in one call of the pipeline have in common: what selects its programs, and the LoRAs.

    Prompts, seeds, guidance, samplers and numbers of steps may differ, but where the table selects programs: with a
    guidance_interval that of each row, with PyTorch's noise whether there are draws.
    """

    width: int | None
    height: int | None
    loras: tuple[tuple[str, float], ...]
    clip_skip: int | None
    noise: str
    prompt_syntax: str
    cache_interval: int | None
    vae_tiling: bool
    is_guided: bool
    has_negative: bool
    """whether there is guidance, and a negative prompt, if an empty one: SDXL takes none for something else"""
    from_picture: bool
    has_mask: bool
    """whether they start from pictures, and only a part of these is made anew"""
    whole_size: tuple[int, int] | None
    """of the pictures of which they are regions that are worked on alone"""
    hires: tuple[float, str] | None
    """how many times as large they are made again, and by what before"""
    perturbed: tuple[str, ...]
    is_freed: bool
    is_perpendicular: bool
    mimics: bool
    """the layers of PAG, and whether there is FreeU, Perp-Neg and Dynamic Thresholding"""
    shown: tuple[int, tuple[int, ...], bool]
    """how many pictures ControlNets and each IP-Adapter are shown, and whether the latter have masks"""
    prompt_chunks: int
    prompt_parts: int
    table: TableKey | None
    """None: any"""
    networks: tuple[int, ...] = ()
    """what is in place of the pipeline's own ControlNets, T2I-Adapters and upscaler, by `id`"""

    @classmethod
    def of(cls, request: Request, prompt_chunks: int) -> "Group":
        has_both = request.is_guided and request.guidance_interval is not None  # rows with guidance, and rows without
        return cls(
            *request.size,
            request.loras,
            request.clip_skip,
            request.noise,
            request.prompt_syntax,
            request.cache_interval,
            request.vae_tiling,
            request.is_guided,
            request.is_guided and request.negative_prompt is not None,
            request.image is not None,
            request.has_mask,
            None if request.padding_mask_crop is None else request.whole_size,
            None if request.hires_scale is None else (request.hires_scale, request.hires_upscaler),
            request.pag_applied_layers if request.pag_scale else (),
            request.freeu is not None,
            request.perp_neg_scale > 0,
            request.mimic_scale > 0,
            (
                len(request.control_image or ()),
                tuple(map(len, request.ip_adapter_image or ())),
                request.ip_adapter_mask is not None,
            ),
            prompt_chunks,
            len(prompts.texts_of("prompt", request.prompt, request.prompt_syntax)),
            request.table_key if has_both or request.noise != "jax" else None,
        )

    @property
    def shape(self) -> tuple:
        """What programs are compiled for; samplers, steps, LoRAs and the numbers of the intervals are data."""
        has_both = self.is_guided and self.table is not None and self.table.guidance_interval is not None
        forms = (has_both, self.from_picture, self.has_mask, self.whole_size, self.hires, self.shown)
        forms += (self.perturbed, self.is_freed, self.is_perpendicular, self.mimics)
        forms += (self.noise != "jax", self.vae_tiling, self.cache_interval is not None, self.clip_skip)
        return self.width, self.height, self.is_guided, self.prompt_chunks, self.prompt_parts, *forms


@dataclass(frozen=True, slots=True)
class Unit:
    """What one device computes in a call: as many requests as it takes at once, at fixed places."""

    group: Group
    requests: tuple[Request, ...]
    """the last one repeated where there are fewer"""
    tags: tuple[Any, ...]
    """whatever the caller knows each of those by that are no repeats"""

    def __len__(self) -> int:
        """The pictures that are wanted, which come first."""
        return len(self.tags)

    @property
    def batch(self) -> int:
        return len(self.requests)

    def halves(self, batch: int | None) -> "list[Unit]":
        """The same in units of this batch, if that is smaller."""
        if batch is None or batch >= self.batch:
            return [self]
        return cut(self.group, self.requests[: len(self)], self.tags, batch)


def grouped(
    requests: Iterable[Request], prompt_chunks: Callable[[Request], int], rows: Callable[[Request], int]
) -> dict[Group, np.ndarray]:
    """The places of requests, int64, by group: groups come as their first requests do.

    In a group places are sorted by rows, and those of equally many in order: a call runs the rows of its longest table
    for all its pictures, so that neighbours should have equally many.
    prompt_chunks, rows: of a request, see `prompt_chunk_counter` and `row_counter`.
    """
    groups: dict[Group, dict[int, array]] = {}
    for place, request in enumerate(requests):
        by_rows = groups.setdefault(Group.of(request, prompt_chunks(request)), {})
        by_rows.setdefault(rows(request), array("q")).append(place)
    return {
        group: np.concatenate([np.asarray(by_rows[count]) for count in sorted(by_rows)])
        for group, by_rows in groups.items()
    }


def cut(group: Group, requests: Sequence[Request], tags: Sequence[Any], batch: int) -> list[Unit]:
    """Units of the requests of a group, in their order."""
    units = []
    for start in range(0, len(requests), batch):
        own = tuple(requests[start : start + batch])
        units.append(Unit(group, own + own[-1:] * (batch - len(own)), tuple(tags[start : start + batch])))
    return units


def prompt_chunk_counter(
    tokenizers: Sequence["CLIPTokenizer"], rows: Callable[[Request], int]
) -> Callable[[Request], int]:
    """How many chunks (`sdjax.text.prompts.chunks`) the longest text of a request has for any of these tokenizers.

    rows: of a request's table, in which prompts may change, see `row_counter`.
    """
    words = next((tokenizer.word_pattern for tokenizer in tokenizers), NOTHING)

    @lru_cache(TEXTS_REMEMBERED)
    def count(text: str, syntax: str) -> int:
        return max((len(prompts.chunks(tokenizer, text, syntax)[0]) for tokenizer in tokenizers), default=1)

    def changed(text: str, request: Request) -> list[str]:
        return editing.by_row(text, rows(request), request.prompt_syntax, words) if "[" in text else [text]

    def count_request(request: Request) -> int:
        given = [*prompts.texts_of("prompt", request.prompt, request.prompt_syntax), request.prompt_2]
        given += [request.negative_prompt, request.negative_prompt_2] if request.is_guided else []
        texts = {text for own in given for text in changed(own or "", request)}
        return max(count(text, request.prompt_syntax) for text in texts)

    return count_request


def row_counter(pipe: "StableDiffusionPipeline") -> Callable[[Request], int]:
    """How many rows the table of a request has: evaluations of the model."""

    @lru_cache(TABLES_REMEMBERED)
    def count(key: TableKey) -> int:
        return len(inputs.table_of(pipe, key))

    return lambda request: count(request.table_key)
