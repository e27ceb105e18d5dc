"""What a pipeline is asked for: checked before anything is computed, and made one value for each image."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MAX_SEED = 2**64 - 1


def image_count(prompt: str | Sequence[str] | None, prompt_embeds: Any, num_images_per_prompt: int) -> tuple[int, int]:
    """(prompts, images). Raises ValueError for both or neither of prompt and prompt_embeds, and for no images."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds")
    prompts = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else prompt_embeds)
    if prompts == 0:
        raise ValueError("prompt: the list is empty; give at least one prompt")
    whole("num_images_per_prompt", num_images_per_prompt, 1)
    return prompts, prompts * num_images_per_prompt


def per_image(name: str, values: Sequence[Any], prompts: int, images: int) -> list[Any]:
    """One value for all images, one for each prompt (repeated for each of its images) or one for each image."""
    if len(values) not in (1, prompts, images):
        choices = " or ".join(str(n) for n in sorted({1, prompts, images}))
        raise ValueError(f"{name}: {len(values)} values for {images} images; give {choices}")
    return [value for value in values for _ in range(images // len(values))]


def _listed(name: str, kind: str, value: Any, single: tuple[type, ...]) -> list[Any]:
    """A list from one value or several."""
    if isinstance(value, single):
        return [value]
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} must be {kind} or a list of them, not {value!r}")
    return list(value)


def texts(name: str, value: str | Sequence[str]) -> list[str]:
    """A list of texts from one or several."""
    values = _listed(name, "text", value, (str,))
    for text in values:
        if not isinstance(text, str):
            raise ValueError(f"{name}: must be text or a list of texts, and has {text!r}")
    return values


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value. Raises ValueError unless it is a whole number in these limits."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number, {limits}, not {value!r}")
    return value


def numbers(name: str, value: float | Sequence[float], prompts: int, images: int) -> np.ndarray:
    """float32 [images], finite, from one number, one for each prompt or one for each image."""
    values = _listed(name, "a finite number", value, (int, float, np.number))
    for number in values:
        if not isinstance(number, int | float | np.number) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, not {number!r}")
    return np.array(per_image(name, values, prompts, images), np.float32)


def seeds(value: int | Iterable[int], images: int) -> list[int]:
    """A seed for each image; a single seed counts up."""
    single = isinstance(value, int | np.integer)
    values = _listed("seed", "a whole number", value, (int, np.integer))
    for seed in values:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed must be a whole number from 0 to 2^64 - 1, not {seed!r}")
    if single:
        return [(int(value) + i) & MAX_SEED for i in range(images)]
    if len(values) != images:
        raise ValueError(f"seed: {len(values)} seeds for {images} images; give one seed, or one for each image")
    return [int(seed) for seed in values]


def latent_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """(h, w) of the latents of a picture of height x width."""
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1 or size % factor:
            raise ValueError(f"{name} must be a positive multiple of {factor}, not {size!r}")
    return height // factor, width // factor


def array(name: str, value: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """A finite float32 array of this shape (None: any length). Raises ValueError naming both shapes."""
    value = np.asarray(value, np.float32)
    if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(value.shape)}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} has values that are not finite")
    return value
