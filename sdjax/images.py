"""Pictures: float to uint8 and PIL, grids, and PNG files that say how they were made."""

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

WEB_UI_NAMES = {
    "num_inference_steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "vae": "VAE",
    "clip_skip": "Clip skip",
    "noise": "RNG",
}
WEB_UI_NOISE = {"torch": "CPU", "cuda": "NV"}


def denormalize(images: np.ndarray) -> np.ndarray:
    """float32 in 0..1 from a model's -1..1: clip(x / 2 + 1/2, 0, 1)."""
    return (np.asarray(images, np.float32) / 2 + 0.5).clip(0, 1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """uint8 from float in -1..1, clipped and rounded to the nearest."""
    return (denormalize(images) * 255).round().astype(np.uint8)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """[B, H, W, 3] float in -1..1 -> B RGB pictures."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def image_grid(images: Sequence[Image.Image], rows: int, cols: int) -> Image.Image:
    """One picture of rows x cols pictures of one size, row by row.

    Raises ValueError unless there are exactly rows * cols pictures, all of one size.
    """
    if len(images) != rows * cols or not images:
        raise ValueError(f"a grid of {rows} rows and {cols} columns needs {rows * cols} pictures, not {len(images)}")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"the pictures of a grid must have one size, not {sorted(sizes)}")
    [(width, height)] = sizes
    grid = Image.new("RGB", (cols * width, rows * height))
    for index, image in enumerate(images):
        row, col = divmod(index, cols)
        grid.paste(image, (col * width, row * height))
    return grid


def save_png(path: str | os.PathLike, image: Image.Image, settings: Mapping[str, Any]) -> Path:
    """Writes a PNG that carries its settings; the file appears complete or not at all.

    Text chunks: `parameters`, as the Stable Diffusion web UI writes it (see `web_ui_parameters`), and `sdjax`, the
    settings as JSON (see `read_settings`).
    Raises FileExistsError when there is such a file, OSError when it cannot be written.
    """
    path = Path(path)
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", web_ui_parameters(settings))  # iTXt where latin-1 does not do
    text.add_text("sdjax", json.dumps(settings, ensure_ascii=False))
    temporary = path.with_name(f".sdjax-{secrets.token_hex(8)}.tmp")
    try:
        _write_through(temporary, lambda file: image.save(file, "PNG", pnginfo=text))
        _move_to_new(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path}: exists already; choose another name, or remove it") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write_through(path: Path, write: Callable[[BinaryIO], None]) -> None:
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _move_to_new(source: Path, path: Path) -> None:
    """os.replace that refuses an existing file, even one that another process is just making."""
    open(path, "xb").close()  # the name is ours from here on
    try:
        os.replace(source, path)
    except BaseException:
        path.unlink()
        raise


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings that `save_png` wrote. Raises ValueError when the file is a picture without any."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get("sdjax")
    if text is None:
        raise ValueError(f"{path}: carries no sdjax settings")
    return json.loads(text)


def web_ui_parameters(settings: Mapping[str, Any]) -> str:
    """The settings as text in the form of AUTOMATIC1111's web UI, which other tools read.

    prompt
    Negative prompt: ...
    Steps: 25, Sampler: euler, CFG scale: 7.5, Seed: 5, Size: 512x768, Model: ..., Clip skip: 2, RNG: CPU
    """
    skipped = settings.get("clip_skip")
    values = {
        "size": f"{settings['width']}x{settings['height']}",
        **settings,
        "clip_skip": skipped + 1 if skipped else None,  # there 1 is all layers
        "noise": WEB_UI_NOISE.get(settings.get("noise")),
    }
    values = {name: values[key] for key, name in WEB_UI_NAMES.items() if values.get(key) is not None}
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text
