"""The models that there are, and the engines of those that are loaded."""

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sdjax import inputs
from sdjax.engine import ContinuousEngine
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime.lowering import is_out_of_memory
from sdjax.serve.catalog import Catalog, Unknown
from sdjax.serve.loading import CannotLoad, fits, loading
from sdjax.serve.networks import Networks


class UnknownModel(Unknown):
    """There is no model of this name."""


@dataclass(eq=False)
class Loaded:
    """A model that is loaded."""

    name: str
    pipe: StableDiffusionPipeline
    engine: ContinuousEngine
    settings: Mapping[str, Any]
    """of the model, that its pictures carry"""
    embeddings: Collection[str] = ()
    """the words of the folder that it has learned"""

    def __post_init__(self):
        self.networks = Networks(self.pipe)
        """that requests choose beside it"""

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of fields that a request leaves out."""
        height, width = inputs.picture_size(self.pipe)
        return {"width": width, "height": height, "guidance_scale": inputs.guidance_scale(self.pipe)}


class Models:
    """Loads models by name, keeps what is loaded while memory allows, and else frees what was used the longest ago.

    first: the name and the source of the model that is used at first, beside those of the catalog. load: from a source
    (a path, a Hub id, None: the embedded model) to a pipeline, the settings of a picture and the words that it has
    learned. engine: from a pipeline.
    """

    def __init__(
        self,
        first: tuple[str, str | None],
        catalog: Catalog,
        load: Callable[[str | None], tuple[StableDiffusionPipeline, Mapping[str, Any], Collection[str]]],
        engine: Callable[[StableDiffusionPipeline], ContinuousEngine],
    ):
        self.catalog, self._first, self.load_pipe, self._engine = catalog, first, load, engine
        self._loaded: dict[str, Loaded] = {}  # the last one was used last
        self._current, self._loading, self._changing = first[0], asyncio.Lock(), threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of all models, the first one first."""
        return list(dict.fromkeys([self._first[0], *self.catalog.paths]))

    @property
    def current(self) -> str:
        """The name of the model of requests that name none."""
        return self._current

    def has(self, loaded: Loaded) -> bool:
        """Whether it was not freed."""
        return self._loaded.get(loaded.name) is loaded

    @property
    def engines(self) -> list[ContinuousEngine]:
        return [loaded.engine for loaded in list(self._loaded.values())]

    def name(self, wanted: object) -> str:
        """The name of what is called so. Raises UnknownModel."""
        try:
            return wanted if wanted == self._first[0] else self.catalog.name(wanted)
        except Unknown as error:
            raise UnknownModel(f"model: {error}") from None

    async def get(self, wanted: str | None = None) -> Loaded:
        """The model of this name, None: the current one, loaded if it is not. Raises UnknownModel, CannotLoad."""
        name = self._current if wanted is None else self.name(wanted)
        while (found := self._used(name)) is None:
            async with self._loading:
                if name not in self._loaded:
                    await asyncio.to_thread(self.load, name)
        return found

    def _used(self, name: str) -> Loaded | None:
        """The model, which is then the last to be freed; None: it is not loaded."""
        with self._changing:
            if name in self._loaded:
                self._loaded[name] = self._loaded.pop(name)
            return self._loaded.get(name)

    async def use(self, wanted: str) -> Loaded:
        """Makes it the current one. Raises as `get`."""
        loaded = await self.get(wanted)
        self._current = loaded.name
        return loaded

    def load(self, name: str) -> None:
        """Waits; beside those that are loaded, or in place of those that were used the longest ago, whose requests are
        finished first."""
        source = self._first[1] if name == self._first[0] else str(self.catalog.path(name))
        while self._loaded and not fits(source):
            self._free_oldest()
        while True:
            try:
                with loading(name, source):
                    pipe, settings, words = self.load_pipe(source)
                break
            except Exception as error:
                if is_out_of_memory(error):
                    if not self._loaded:
                        raise CannotLoad(f"{name}: does not fit into the memory") from error
                    self._free_oldest()
                    continue
                raise
        with self._changing:
            self._loaded[name] = Loaded(name, pipe, self._engine(pipe), {**settings, "model": name}, words)

    def close(self, *, finish: bool) -> None:
        """Ends the engines: after their requests, or after the rows under way."""
        for engine in self.engines:
            engine.close(finish=finish)

    def _free_oldest(self) -> None:
        with self._changing:
            oldest = self._loaded.pop(next(iter(self._loaded)))
        oldest.engine.close()
