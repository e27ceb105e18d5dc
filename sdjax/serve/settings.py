"""The settings of pictures: those that files carry, and the same as fields that a request over HTTP takes."""

import io
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from sdjax import inputs
from sdjax.pictures import metadata, web_ui
from sdjax.request import FIELDS, Request
from sdjax.sampling import NAMES
from sdjax.serve import pictures
from sdjax.serve.catalog import Catalog
from sdjax.serve.fields import PICTURES
from sdjax.serve.models import Loaded


def of_request(loaded: Loaded, request: Request, loras: Catalog) -> dict[str, Any]:
    """What the file of a picture carries, as `sdjax generate` writes it; LoRAs by their paths within the folder."""
    config = inputs.scheduler_of(loaded.pipe, request.scheduler, request.timestep_spacing).config
    height, width = inputs.request_size(loaded.pipe, request)
    scale = inputs.guidance_scale(loaded.pipe, cfg_plus_plus=request.cfg_plus_plus)
    filled = {"width": width, "height": height, "guidance_scale": scale}
    own = metadata.picture_settings(request, {**loaded.settings, "version": version("sdjax")}, config)
    if request.loras:
        own["loras"] = {loras.file_of(path): weight for path, weight in request.loras}
    return own | {name: value for name, value in filled.items() if own[name] is None}


def fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a file carries, what a request over HTTP takes: all but pictures, in place of which `had_image` is true;
    the sampler by its name."""
    found = {name: value for name, value in settings.items() if name in FIELDS and name != "scheduler"}
    found = {name: value for name, value in found.items() if FIELDS[name].kind not in PICTURES}
    sampler = settings.get("sampler", settings.get("scheduler"))
    known = {"scheduler": sampler} if isinstance(sampler, str) and sampler in NAMES else {}
    own = {name: settings[name] for name in ("model", "upscaler") if isinstance(settings.get(name), str)}
    for name, kind in (("controlnet", list), ("eta", float)):
        if isinstance(settings.get(name), kind):
            own[name] = settings[name]
    if any(settings.get(name) for name, spec in FIELDS.items() if spec.kind in PICTURES):
        own["had_image"] = True
    return found | known | own


def carried(name: str, data: bytes, most_pixels: int) -> dict[str, Any]:
    """The settings that the bytes of a picture file carry, of sdjax or of the web UI, as `fields`.

    Raises ValueError that begins with the name.
    """
    pictures.opened(name, data, most_pixels)
    try:
        try:
            settings = metadata.read_settings(_Named(name, data))
        except metadata.NoSettings:
            settings, others = web_ui.read(metadata.read_parameters(_Named(name, data)))
            settings |= {"model": others["Model"]} if "Model" in others else {}
        return fields({key: _checked(key, value) for key, value in settings.items()})
    except Exception as error:  # of many types, by codec
        said = str(error) if isinstance(error, ValueError) else "is damaged"
        raise ValueError(f"{name}: {said.removeprefix(f'{name}: ')}") from None


class _Named(io.BytesIO):
    """A file that messages call so."""

    def __init__(self, name: str, data: bytes):
        super().__init__(data)
        self._name = name

    def __str__(self) -> str:
        return self._name


def _checked(name: str, value: Any) -> Any:
    """The value. Raises ValueError for one that no request has."""
    spec = FIELDS.get(name)
    if spec and name not in ("scheduler", "loras") and spec.kind not in PICTURES:
        spec.check(value)
    return value
