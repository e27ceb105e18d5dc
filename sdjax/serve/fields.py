"""The fields of `Request` over HTTP: which there are, their types, and how they are read.

No value names a file or an address: pictures are data, LoRAs and samplers have names.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image

from sdjax.components import CONTROLNETS
from sdjax.fields import brief
from sdjax.pictures import preprocessors
from sdjax.pictures.picture import Picture
from sdjax.request import FIELDS, Request, Spec, kinds
from sdjax.request.elsewhere import hint
from sdjax.request.kinds import Kind
from sdjax.request.values import MAX_SEED, finite, is_listed, one_of, whole
from sdjax.sampling import NAMES
from sdjax.serve import pictures
from sdjax.serve.catalog import Catalog, Unknown
from sdjax.serve.held import Share
from sdjax.serve.limits import Limits
from sdjax.serve.networks import Choice
from sdjax.serve.prompts import without_loras

DIGITS = re.compile(r"\d{1,20}", re.ASCII)
RANDOM = 2**32  # seeds that are drawn are below it: JavaScript holds them
PREPROCESSORS = (preprocessors.NONE, preprocessors.INPAINT, *preprocessors.OWN)

TYPES: Mapping[Kind, tuple[str, Mapping[str, Any]]] = {
    kinds.TEXT: ("text", {"type": "string"}),
    kinds.FLAG: ("flag", {"type": "boolean"}),
    kinds.SEED: ("seed", {"type": ["integer", "string", "null"], "minimum": -1, "maximum": MAX_SEED}),
    **dict.fromkeys((kinds.COUNT, kinds.SIDE, kinds.WHOLE, kinds.PIXELS), ("integer", {"type": "integer"})),
    **dict.fromkeys((kinds.NUMBER, kinds.SCALE, kinds.FACTOR, kinds.SHARE), ("number", {"type": "number"})),
    kinds.SAMPLER: ("sampler", {"type": "string", "enum": list(NAMES)}),
    kinds.INTERVAL: ("interval", {"type": ["string", "array"]}),
    **dict.fromkeys((kinds.NUMBERS, kinds.ROW_OF_FACTORS), ("numbers", {"type": ["string", "array"]})),
    **dict.fromkeys((kinds.FACTORS, kinds.SHARES), ("numbers", {"type": ["number", "string", "array"]})),
    kinds.TYPES: ("numbers", {"type": ["integer", "string", "array"]}),
    kinds.PAIR: ("pair", {"type": ["string", "array"]}),
    kinds.MARGINS: ("margins", {"type": ["string", "array"]}),
    kinds.SCALES: ("scales", {"type": ["number", "string", "array", "object"]}),
    kinds.LORAS: ("loras", {"type": "object", "additionalProperties": {"type": "number"}}),
    kinds.PICTURE: ("picture", {"type": "string", "contentEncoding": "base64"}),
    kinds.PICTURES: ("pictures", {"type": ["string", "array"], "items": {"type": "string"}}),
    kinds.PICTURES_EACH: ("picture lists", {"type": ["string", "array"]}),
    **dict.fromkeys((kinds.WORDS, kinds.ONE_WORDS), ("words", {"type": ["string", "array"]})),
}
"""What each kind of value is called, and its JSON Schema"""
PICTURES = (kinds.PICTURE, kinds.PICTURES, kinds.PICTURES_EACH)


class Asked(NamedTuple):
    """A request, and the seeds of its pictures."""

    request: Request
    seeds: list[int]
    model: str | None
    """None: the one that is used now"""
    share: Share
    """what its pictures hold"""
    networks: Choice = Choice()
    eta: float | None = None
    """of DDIM"""


@dataclass(frozen=True)
class Reader:
    """Reads the values of fields: what is data, and what is chosen by name."""

    limits: Limits
    loras: Catalog
    controlnets: Catalog
    upscalers: Catalog
    share: Share

    def asked(self, given: Mapping[str, Any], called: Mapping[str, str] = MappingProxyType({})) -> Asked:
        """The request of an object of JSON. Raises ValueError that begins with the name of what is wrong.

        called: fields, and what messages call them.
        """
        given = {"seed": None, **given}
        values = {name: given.pop(name, None) for name in OWN}
        if "prompt" not in given:
            raise ValueError("prompt: is missing")
        count = (
            1 if values["count"] is None else whole(called.get("count", "count"), values["count"], 1, self.limits.count)
        )
        found = {name: self.value(name, value, called.get(name)) for name, value in given.items()}
        texts = {name: text for name, text in found.items() if text and FIELDS[name].kind is kinds.TEXT}
        if found.get("prompt_syntax", "web-ui") == "web-ui":
            for name, text in texts.items():
                found[name], loras = without_loras(name, text)
                found["loras"] = found.get("loras", ()) + tuple(self._loras(name, loras))
        found["loras"] = tuple(sorted(dict(found.get("loras", ())).items()))
        if values["had_image"] and not any(found.get(name) for name, spec in FIELDS.items() if spec.kind in PICTURES):
            raise ValueError("had_image: the pictures of these settings are missing; give them, or leave it out")
        request = Request(**found)
        self._check_limits(request, called.get("num_inference_steps", "num_inference_steps"))
        seeds = [(request.seed + i) & MAX_SEED for i in range(count)]
        eta = None if values["eta"] is None else finite("eta", values["eta"], 0, 1)
        if eta is not None and request.scheduler != "ddim":
            raise ValueError("eta: only with the scheduler ddim")
        return Asked(request, seeds, values["model"], self.share, self._networks(values), eta)

    def _networks(self, values: Mapping[str, Any]) -> Choice:
        """Of the names in `controlnet` and `upscaler`."""
        given, upscaler = values["controlnet"], values["upscaler"]
        if given is not None and not is_listed(given):
            given = [given]
        if given is not None and len(given) > len(CONTROLNETS):
            raise ValueError(f"controlnet: {len(given)} of them; {len(CONTROLNETS)} at most")
        names = None if given is None else tuple(self.controlnet("controlnet", name) for name in given)
        return Choice(names, None if upscaler is None else _named("upscaler", self.upscalers, upscaler))

    def controlnet(self, field: str, wanted: Any) -> str:
        """The name of what is called so. Raises ValueError that begins with the field."""
        return wanted if wanted in list(CONTROLNETS) else _named(field, self.controlnets, wanted)

    def value(self, name: str, value: Any, called: str | None = None) -> Any:
        """The value of a field, as `Request` has it. Raises ValueError that begins with what it is called."""
        if name not in FIELDS:
            raise ValueError(f"{str(name)[:80]}: unknown{hint(name, (*FIELDS, *OWN))}")
        spec = FIELDS[name] if called is None else replace(FIELDS[name], name=called)
        read = READERS.get(spec.kind)
        try:
            if value is None and spec.default is None:
                return None
            return spec.check(value) if read is None else read(self, spec, value)
        except RecursionError:
            raise ValueError(f"{name}: nested too deeply") from None

    def seed(self, spec: Spec, value: Any) -> int:
        """One that is drawn for None and -1; a text where a number of JavaScript does not hold it."""
        if isinstance(value, str) and DIGITS.fullmatch(value):
            value = int(value)
        return secrets.randbelow(RANDOM) if value is None or value == -1 else spec.check(value)

    def text(self, spec: Spec, value: Any) -> str:
        found = spec.check(value)
        if len(found) > self.limits.text:
            raise ValueError(f"{spec.name}: of {len(found):,} characters; {self.limits.text:,} at most")
        return found

    def sampler(self, spec: Spec, value: Any) -> str:
        """By name alone."""
        if value not in list(NAMES):
            raise ValueError(f"{spec.name}: there is no sampler {brief(value)}{hint(value, NAMES, every=False)}")
        return value

    def words(self, spec: Spec, value: Any) -> tuple[str, ...]:
        """Of preprocessors, those that need no other model."""
        found = spec.check(value)
        if spec.name == "control_preprocessor":
            for word in found:
                one_of(spec.name, word, PREPROCESSORS)
        return found

    def picture(self, spec: Spec, value: Any) -> Picture:
        if isinstance(value, Picture):
            return value
        return self.sent(spec.name, value)

    def sent(self, name: str, value: Any) -> Picture:
        """The picture of base64 or a data URL. Raises as `opened`."""
        return pictures.of_image(name, self.opened(name, pictures.decoded(name, value)))

    def opened(self, name: str, data: bytes) -> Image.Image:
        """Of the bytes of a file, of which the header is read, and its pixels are counted before they are there.

        Raises ValueError that begins with the name, Busy.
        """
        image = pictures.opened(name, data, self.limits.source_pixels)
        self.share.take(name, image.width * image.height)
        return image

    def pictures(self, spec: Spec, value: Any) -> tuple[Picture, ...]:
        return spec.check([self.picture(spec, one) for one in self._listed(spec, value)])

    def picture_lists(self, spec: Spec, value: Any) -> tuple[tuple[Picture, ...], ...]:
        every = [self._listed(spec, own) for own in self._listed(spec, value)]
        return spec.check([[self.picture(spec, one) for one in own] for own in every])

    def _listed(self, spec: Spec, value: Any) -> list[Any]:
        listed = list(value) if is_listed(value) else [value]
        if len(listed) > self.limits.count:
            raise ValueError(f"{spec.name}: {len(listed)} pictures; {self.limits.count} at most")
        return listed

    def by_name(self, spec: Spec, value: Any) -> tuple[tuple[str, float], ...]:
        """{name: weight} -> ((path, weight), …)."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{spec.name}: must be an object, {{name: weight}}, not {brief(value)}")
        return tuple(self._loras(spec.name, [(name, weight) for name, weight in value.items()]))

    def _loras(self, field: str, named: list[tuple[str, float]]) -> list[tuple[str, float]]:
        try:
            known = [(self.loras.path(self.loras.name(name)), weight) for name, weight in named]
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        return [
            (str(path), finite(f"{field}: the weight of {path.stem}", weight, -LARGEST, LARGEST))
            for path, weight in known
        ]

    def _check_limits(self, request: Request, steps: str) -> None:
        """Raises ValueError for steps, and for pictures that are made larger than may be sent."""
        whole(steps, request.num_inference_steps, 1, self.limits.steps)
        if request.image is not None and request.outpaint is not None:
            width, height = request.whole_size
            if width * height > self.limits.source_pixels:
                raise ValueError(f"outpaint: to {width}x{height}, more than {self.limits.source_pixels:,} pixels")


def _named(field: str, catalog: Catalog, wanted: Any) -> str:
    try:
        return catalog.name(wanted)
    except Unknown as error:
        raise ValueError(f"{field}: {error}") from None


LARGEST = 100.0  # weight of a LoRA
OWN = ("count", "model", "controlnet", "upscaler", "eta", "had_image")
"""What a body may have beside the fields of `Request`"""
READERS: Mapping[Kind, Callable[[Reader, Spec, Any], Any]] = {
    kinds.TEXT: Reader.text,
    kinds.SEED: Reader.seed,
    kinds.SAMPLER: Reader.sampler,
    kinds.WORDS: Reader.words,
    kinds.PICTURE: Reader.picture,
    kinds.PICTURES: Reader.pictures,
    kinds.PICTURES_EACH: Reader.picture_lists,
    kinds.LORAS: Reader.by_name,
}
"""Of kinds whose values are read otherwise than from files"""


def limits_of(spec: Spec) -> dict[str, Any]:
    """The least and the largest number, or the choices, that a field may have."""
    known = getattr(spec.kind.check, "keywords", {})
    names = {"least": "minimum", "most": "maximum", "choices": "choices"}
    return {theirs: known[own] for own, theirs in names.items() if known.get(own) is not None}


def described(spec: Spec) -> dict[str, Any]:
    """A field, for whoever makes a form of it."""
    kind = TYPES.get(spec.kind, ("choice", {}))[0]
    limits = {**limits_of(spec), **EXTRA.get(spec.name, {})}
    default = None if spec.name == "prompt" else spec.json(spec.default)
    return {"name": spec.name, "type": kind, "default": default, "help": spec.help, **limits}


EXTRA = {"control_preprocessor": {"choices": list(PREPROCESSORS)}}


def schema(limits: Limits) -> dict[str, Any]:
    """The JSON Schema of the body of a request."""
    properties = {spec.name: _schema(spec) for spec in FIELDS.values()}
    properties["num_inference_steps"]["maximum"] = limits.steps
    properties["count"] = {
        "type": "integer",
        "minimum": 1,
        "maximum": limits.count,
        "default": 1,
        "description": "Pictures, whose seeds count up",
    }
    names = {"type": ["array", "null"], "items": {"type": "string"}}
    properties["controlnet"] = names | {"description": "The network of each control picture, by name"}
    properties["upscaler"] = {"type": ["string", "null"], "description": "By name, for the hires_upscaler model"}
    properties["eta"] = {
        "type": ["number", "null"],
        "minimum": 0,
        "maximum": 1,
        "description": "How much of its noise ddim draws anew; 1: all of it, as ddpm [default: 0]",
    }
    properties["had_image"] = {"type": "boolean", "description": "As settings have it whose pictures are left out"}
    properties["model"] = {"type": ["string", "null"], "description": "By name [default: the one used now]"}
    return {"type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": False}


def _schema(spec: Spec) -> dict[str, Any]:
    own = dict(TYPES.get(spec.kind, ("choice", {"type": "string"}))[1])
    limits = limits_of(spec)
    if "choices" in limits:
        own["enum"] = list(limits.pop("choices"))
    if own.get("type") in ("integer", "number"):
        own |= limits
    if spec.default is None and isinstance(own.get("type"), str):
        own["type"] = [own["type"], "null"]
        if "enum" in own:
            own["enum"] = [*own["enum"], None]
    return own | {"description": spec.help}
