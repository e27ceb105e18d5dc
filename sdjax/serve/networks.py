"""ControlNets and upscalers that requests choose by name, beside a model that is loaded."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from sdjax import components
from sdjax.components import CONTROLNETS
from sdjax.models.base import Model
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import Request
from sdjax.serve.catalog import Catalog
from sdjax.serve.loading import fits, fitting, loading

KEPT = 4  # that stay loaded beside a model
VIEWS = 16  # of a model that are remembered


class Choice(NamedTuple):
    """The networks that a request asks for, by name; None: those of the model."""

    controlnets: tuple[str, ...] | None = None
    upscaler: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """As fields of a request."""
        own = {} if self.controlnets is None else {"controlnet": list(self.controlnets)}
        return own | ({} if self.upscaler is None else {"upscaler": self.upscaler})


class Networks:
    """The networks that were used last beside a pipeline, and views of the pipeline that have them."""

    def __init__(self, pipe: StableDiffusionPipeline):
        self._pipe, self._lock = pipe, threading.Lock()
        self._loaded: OrderedDict[tuple[str, str], Model] = OrderedDict()  # by component and name
        self._views: OrderedDict[tuple, StableDiffusionPipeline] = OrderedDict()

    def view(
        self, request: Request, choice: Choice, controlnets: Catalog, upscalers: Catalog
    ) -> StableDiffusionPipeline:
        """The pipeline as a request needs it: without networks that it shows no picture. Waits until they are loaded.

        Raises Unknown, CannotLoad, CheckpointError for a network that does not fit the model.
        """
        wanted = [("controlnet", name, controlnets) for name in choice.controlnets or ()]
        wanted += [] if choice.upscaler is None else [("upscaler", choice.upscaler, upscalers)]
        left_out = self._left_out(request, choice)
        if not wanted and not left_out:
            return self._pipe
        with self._lock:
            key = (*choice, *left_out)
            found = [(component, self._module(component, name, catalog)) for component, name, catalog in wanted]
            if key not in self._views:
                self._views[key] = self._pipe.with_networks(**{**dict.fromkeys(left_out), **_replaced(found)})
            self._forget(len(wanted))
            self._views.move_to_end(key)
            if len(self._views) > VIEWS:
                self._views.popitem(last=False)
            return self._views[key]

    def _left_out(self, request: Request, choice: Choice) -> list[str]:
        """The components of the pipeline that a request has others for, or no pictures."""
        pipe = self._pipe
        found = [*pipe.controls] if choice.controlnets is not None or not request.control_image else []
        if request.ip_adapter_image or any(getattr(pipe, name).config.kind == "face" for name in pipe.ip_adapters):
            return found  # an IP-Adapter of faces has a LoRA too, which would stay
        return [*found, *pipe.ip_adapters]

    def _module(self, component: str, name: str, catalog: Catalog) -> Model:
        if component == "controlnet" and name in self._pipe.controlnets:
            return getattr(self._pipe, name)
        key = component, name
        if key not in self._loaded:
            path = catalog.path(name)
            while self._loaded and not fits(str(path)):
                self._forget(0, len(self._loaded) - 1)
            with fitting(name), loading(name, str(path)):
                unet, dtype = self._pipe.unet, self._pipe.unet.conv_in.dtype
                self._loaded[key] = components.load_model(component, path, dtype=dtype, unet=unet)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _forget(self, needed: int, most: int = KEPT) -> None:
        """Those that were used the longest ago, and the views that have them."""
        while len(self._loaded) > max(needed, most):
            (_, gone), _ = self._loaded.popitem(last=False)
            for key in [key for key in self._views if gone in (*(key[0] or ()), key[1])]:
                del self._views[key]


def own_names(pipe: StableDiffusionPipeline) -> list[str]:
    """What requests call the ControlNets that a model has from the start."""
    return [name for name in CONTROLNETS if name in pipe.controlnets]


def _replaced(found: Sequence[tuple[str, Model]]) -> dict[str, Any]:
    """The components of these: those of several ControlNets one after the other."""
    places = iter(CONTROLNETS)
    return {next(places) if component == "controlnet" else component: model for component, model in found}
