"""Picture files that carry the settings of their picture, and their reader."""

import io
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image, PngImagePlugin

from sdjax.fields import brief, encodable, whole
from sdjax.files import creating
from sdjax.pictures import web_ui
from sdjax.request import Request
from sdjax.sampling import name_of


class NoSettings(ValueError):
    """A picture carries no settings."""


class Format(NamedTuple):
    """How Pillow writes a kind of picture file."""

    suffix: str
    options: Mapping[str, Any]


FORMATS = {
    "png": Format(".png", {}),
    "webp": Format(".webp", {"quality": 90}),
    "jpeg": Format(".jpg", {"quality": 95}),
}
EXIF_UNICODE = b"UNICODE\0"  # the encoding of an EXIF UserComment
EXIF_SDJAX = b"sdjax\0"  # whose MakerNote it is
LEFT_OUT = ("vae", "safety_checker")  # components: None where the model's own was left out
STEM_LENGTH = 48  # characters of the prompt in a file name


def picture_settings(request: Request, model: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture, for `encode`: the request's, and what the model was.

    scheduler: the configuration of the sampler, which is written beside its name.
    """
    name = request.scheduler if isinstance(request.scheduler, str) else name_of(scheduler) or scheduler["_class_name"]
    own = request.settings() | {"sampler": name, "scheduler": dict(scheduler)}
    return own | {key: value for key, value in model.items() if value not in (None, {}) or key in LEFT_OUT}


def encode(picture: Image.Image, settings: Mapping[str, Any], format: str, quality: int | None = None) -> bytes:
    """A picture file of one of FORMATS that carries its settings; the same picture and settings give the same bytes.

    PNG: the text chunks `parameters`, as the Stable Diffusion web UI writes it (see `web_ui.parameters`), and `sdjax`,
    the settings as JSON (see `read_settings`). WebP and JPEG: the EXIF fields UserComment, as the web UI writes it, and
    MakerNote. quality: of these two, 0 to 100. Raises ValueError for another format, and for settings longer than the
    64 KB that JPEG has for EXIF.
    """
    if format not in FORMATS:
        raise ValueError(f"a picture's format must be one of {', '.join(FORMATS)}, not {format!r}")
    texts = web_ui.parameters(settings), json.dumps(settings, ensure_ascii=False, allow_nan=False)
    parameters, full = map(encodable, texts)
    carried = {"pnginfo": _text_chunks(parameters, full)} if format == "png" else {"exif": _exif(parameters, full)}
    file = io.BytesIO()
    options = FORMATS[format].options if quality is None else {"quality": quality}
    picture.save(file, format, **options, **carried)
    return file.getvalue()


def _text_chunks(parameters: str, full: str) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", parameters)  # iTXt where latin-1 does not do
    text.add_text("sdjax", full)
    return text


def _exif(parameters: str, full: str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {
            ExifTags.Base.UserComment: EXIF_UNICODE + parameters.encode("utf-16-be"),
            ExifTags.Base.MakerNote: EXIF_SDJAX + full.encode(),
        }
    )
    return exif


def save_png(path: str | os.PathLike, image: Image.Image, settings: Mapping[str, Any]) -> Path:
    """Writes a PNG that carries its settings (see `encode`); the file appears complete or not at all.

    Raises FileExistsError when there is such a file, OSError when it cannot be written.
    """
    path = Path(path)
    data = encode(image, settings, "png")
    try:
        with creating(path) as temporary:
            temporary.write_bytes(data)
    except FileExistsError:
        raise FileExistsError(f"{path}: exists already; choose another name, or remove it") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    return path


def save_new(folder: Path, stem: str, image: Image.Image, settings: Mapping[str, Any]) -> Path:
    """As `save_png`, to the first free name of stem.png, stem-2.png, ... in the folder."""
    for number in itertools.count(1):
        try:
            return save_png(folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png"), image, settings)
        except FileExistsError:
            continue


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings that `encode` put in the picture. Raises NoSettings for a picture without any, ValueError for
    damaged ones."""
    text, _ = _carried(path)
    if text is None:
        raise NoSettings(f"{path}: carries no sdjax settings")
    try:
        settings = json.loads(text, parse_int=whole)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its sdjax settings are damaged: {brief(text)}")
    if isinstance(config := settings.get("scheduler"), dict):
        settings["scheduler"] = _without_infinities(config)
    return settings


def read_parameters(path: str | os.PathLike) -> str:
    """The text that the web UI, or `encode`, put in the picture. Raises ValueError where there is none."""
    _, text = _carried(path)
    if text is None:
        raise ValueError(f"{path}: carries no settings, neither of sdjax nor of the web UI")
    return text


def _carried(path: str | os.PathLike) -> tuple[str | None, str | None]:
    """The settings as JSON and the web UI's text, where a picture has them."""
    with Image.open(path) as image:
        texts, exif = getattr(image, "text", {}), image.getexif().get_ifd(ExifTags.IFD.Exif)
    note, comment = exif.get(ExifTags.Base.MakerNote, b""), exif.get(ExifTags.Base.UserComment, b"")
    own = note[len(EXIF_SDJAX) :].decode() if note[: len(EXIF_SDJAX)] == EXIF_SDJAX else None
    other = comment[len(EXIF_UNICODE) :].decode("utf-16-be") if comment[: len(EXIF_UNICODE)] == EXIF_UNICODE else None
    return texts.get("sdjax", own), texts.get("parameters", other)


def _without_infinities(read: dict[str, Any]) -> dict[str, Any]:
    """Files of older versions have the infinite defaults of a scheduler, which are not JSON."""
    return {name: value for name, value in read.items() if not (isinstance(value, float) and math.isinf(value))}


def slug(prompt: str) -> str:
    """'A goose, on blue!' -> 'a-goose-on-blue'; 'image' where nothing is left."""
    return re.sub(r"\W+", "-", prompt.lower())[:STEM_LENGTH].strip("-") or "image"
