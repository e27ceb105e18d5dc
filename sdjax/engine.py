"""Requests in, pictures out, over all devices of a pipeline; knows no files.

A batch is on its way while the last is fetched. What a unit's pictures are depends on its requests and their places
alone, never on the device that samples it or on what is sampled beside it.
"""

import itertools
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import inputs
from sdjax.request import Request, TableKey
from sdjax.runtime.lowering import DoesNotFit, is_out_of_memory
from sdjax.runtime.usage import Dispatch, Usage
from sdjax.text import editing, prompts
from sdjax.text.tokenizer import NOTHING

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline, StableDiffusionPipelineOutput
    from sdjax.text.tokenizer import CLIPTokenizer

AHEAD = 1  # calls that wait on the devices while one is computed
TEXTS_REMEMBERED = 65536


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


def prompt_chunk_counter(tokenizers: Sequence["CLIPTokenizer"]) -> Callable[[Request], int]:
    """How many chunks (`sdjax.text.prompts.chunks`) the longest text of a request has for any of these tokenizers."""

    words = next((tokenizer.word_pattern for tokenizer in tokenizers), NOTHING)

    @lru_cache(TEXTS_REMEMBERED)
    def count(text: str, syntax: str) -> int:
        return max((len(prompts.chunks(tokenizer, text, syntax)[0]) for tokenizer in tokenizers), default=1)

    def changed(text: str, request: Request) -> list[str]:
        return editing.by_row(text, request.num_inference_steps, request.prompt_syntax, words)

    def count_request(request: Request) -> int:
        given = [*prompts.texts_of("prompt", request.prompt, request.prompt_syntax), request.prompt_2]
        given += [request.negative_prompt, request.negative_prompt_2] if request.is_guided else []
        texts = {text for own in given for text in changed(own or "", request)}
        return max(count(text, request.prompt_syntax) for text in texts)

    return count_request


def row_counter(pipe: "StableDiffusionPipeline") -> Callable[[Request], int]:
    """How many rows the table of a request has: evaluations of the model."""

    @cache
    def count(key: TableKey) -> int:
        return len(inputs.table_of(pipe, key))

    return lambda request: count(request.table_key)


class Sampled(NamedTuple):
    """A picture that the devices have computed."""

    tag: Any
    pixels: np.ndarray | None
    """uint8 [H W 3]; None: not finite"""
    nsfw: bool | None
    """whether the safety checker flagged it; None if there is no safety checker"""
    seconds: float
    """its share of the time of the devices"""
    mended: bool
    """whether a float16 VAE overflowed, so that it was decoded again in float32"""


@dataclass
class _Call:
    """Units of one group and batch, at most one for each device."""

    units: list[Unit]
    fetched: Future | None = None

    @property
    def is_lost(self) -> bool:
        """Waits until it is fetched; whether it failed, or was not dispatched."""
        return self.fetched is None or self.fetched.exception() is not None


class Engine:
    """Samples requests with a pipeline, over all devices of its mesh.

    on_halved: called with the batch that a device is given from then on, after one ran out of memory.
    """

    def __init__(self, pipe: "StableDiffusionPipeline", on_halved: Callable[[int], None] = lambda batch: None):
        self.pipe, self.usage, self._on_halved = pipe, Usage(), on_halved
        self._set = {} if pipe.loras is None else {k: v for k, v in pipe.loras.weights.items() if v}
        self._most: int | None = None  # pictures of a device at once, after it ran out of memory
        self._compiled: set[tuple] = set()

    def run(
        self, units: Iterable[Unit], deliver: Callable[[list[Sampled]], Any], stop: threading.Event | None = None
    ) -> None:
        """Samples all units; after `stop` is set, those that are on the devices already.

        units: asked for when a device can take some; those in turn that have one group and batch share calls. deliver:
        is given the pictures of each call in a thread of its own, so that it waits for no further unit.
        Where a device runs out of memory, the batch is halved for all that is not delivered; the LoRAs are set as each
        group has them, and afterwards as they were. Raises ValueError where one picture does not fit.
        """
        stop, shown = stop or threading.Event(), self.pipe.shows_progress
        self.pipe.set_progress_bar_config(disable=True)
        fetcher = ThreadPoolExecutor(1, "sdjax fetch")
        try:
            wanted = itertools.takewhile(lambda _: not stop.is_set(), units)
            self._run(self._calls(wanted), deliver, stop, fetcher)
        finally:
            fetcher.shutdown(wait=False, cancel_futures=True)
            self.pipe.set_progress_bar_config(disable=not shown)
            if self.pipe.loras is not None:
                self.pipe.set_loras(self._set)

    def _run(
        self,
        calls: Iterator[list[Unit]],
        deliver: Callable[[list[Sampled]], Any],
        stop: threading.Event,
        fetcher: ThreadPoolExecutor,
    ) -> None:
        ready: deque[_Call] = deque()
        dispatched: deque[_Call] = deque()
        while True:
            if not ready and not stop.is_set():
                ready.extend(self._fitting(next(calls, [])))
            call = ready.popleft() if ready and not stop.is_set() else None
            try:
                if call is not None:
                    dispatched.append(call)
                    call.fetched = fetcher.submit(self._fetch, call.units, *self._dispatch(call.units), deliver)
                while len(dispatched) > (AHEAD if call else 0):
                    dispatched[0].fetched.result()
                    dispatched.popleft()
            except (jax.errors.JaxRuntimeError, DoesNotFit) as error:
                if not is_out_of_memory(error):
                    raise
                lost = [unit for call in dispatched if call.is_lost for unit in call.units]
                dispatched.clear()
                self._halve(lost[0], error)
                ready.extendleft(reversed(self._fitting(lost)))
            else:
                if call is None:
                    return

    def _halve(self, unit: Unit, error: Exception) -> None:
        if unit.batch == 1:
            if isinstance(error, DoesNotFit):
                raise error
            size = f"{unit.group.width}x{unit.group.height}"
            raise DoesNotFit(f"a picture of {size} does not fit into the memory of a device, even by itself") from error
        self._most = unit.batch // 2
        self._on_halved(self._most)

    def _calls(self, units: Iterable[Unit]) -> Iterator[list[Unit]]:
        """A unit for each device, or fewer at the end of a group."""
        for _, same in itertools.groupby(units, lambda unit: (unit.group, unit.batch)):
            while call := list(itertools.islice(same, self.pipe.mesh.size)):
                yield call

    def _fitting(self, units: Sequence[Unit]) -> list[_Call]:
        """The units in calls, none of more pictures for a device than fit."""
        halves = (half for unit in units for half in unit.halves(self._most))
        return [_Call(call) for call in self._calls(halves)]

    def _dispatch(self, units: Sequence[Unit]) -> tuple["StableDiffusionPipelineOutput", Dispatch]:
        """Being computed; pictures are uint8 [devices * batch H W 3]."""
        begun, before = time.perf_counter(), time.thread_time()
        padded = [*units, *units[-1:] * (self.pipe.mesh.size - len(units))]
        self._set_loras(units[0].group)
        made = _in_uint8(self.pipe.sample([item for unit in padded for item in unit.requests], output_type="jax"))
        key = (units[0].batch, *units[0].group.shape)
        compiles = key not in self._compiled
        self._compiled.add(key)
        return made, Dispatch(begun, time.perf_counter(), time.thread_time() - before, compiles)

    def _set_loras(self, group: Group) -> None:
        if not group.loras and self.pipe.loras is None:
            return
        weights = {**self._set, **dict(group.loras)}
        known = {} if self.pipe.loras is None else self.pipe.loras.weights
        for path in weights.keys() - known.keys():
            self.pipe.load_lora(path, 0.0, name=path)
        if weights != {name: weight for name, weight in self.pipe.loras.weights.items() if weight}:
            self.pipe.set_loras(weights)

    def _fetch(
        self,
        units: Sequence[Unit],
        made: "StableDiffusionPipelineOutput",
        call: Dispatch,
        deliver: Callable[[list[Sampled]], Any],
    ) -> None:
        """Waits for the devices, then delivers the pictures."""
        made.images.block_until_ready()
        seconds = self.usage.add(call) / sum(map(len, units))
        lost = not_finite = np.asarray(made.not_finite)
        if lost.any():
            made = _in_uint8(made.mended())
            not_finite = np.asarray(made.not_finite)
        pixels, flags = np.asarray(made.images), made.nsfw_content_detected
        flags = None if flags is None else np.asarray(flags)
        wanted = [
            (number * unit.batch + offset, tag)
            for number, unit in enumerate(units)
            for offset, tag in enumerate(unit.tags)
        ]
        deliver(
            [
                Sampled(
                    tag,
                    pixels=None if not_finite[place] else pixels[place],
                    nsfw=None if flags is None else bool(flags[place]),
                    seconds=seconds,
                    mended=bool(lost[place] and not not_finite[place]),
                )
                for place, tag in wanted
            ]
        )


def _in_uint8(made: "StableDiffusionPipelineOutput") -> "StableDiffusionPipelineOutput":
    return replace(made, images=_to_uint8(made.images))


@jax.jit
def _to_uint8(pictures: jax.Array) -> jax.Array:
    """uint8 from float32 in 0..1, rounded to the nearest."""
    return jnp.round(pictures * 255).astype(jnp.uint8)
