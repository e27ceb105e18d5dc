"""`<lora:style:0.8>` in prompts, as in the web UI."""

import re

from sdjax.fields import brief

LORA = re.compile(r"<lora:([^<>]*)>")


def without_loras(name: str, text: str) -> tuple[str, list[tuple[str, float]]]:
    """The text without them, and (name, weight) of each. Raises ValueError that begins with the name of the field."""
    found = [_lora(name, match[1]) for match in LORA.finditer(text)]
    return (LORA.sub("", text).strip() if found else text), found


def _lora(name: str, text: str) -> tuple[str, float]:
    lora, *weights = text.split(":")
    try:
        numbers = {float(weight) for weight in weights} or {1.0}
    except ValueError:
        numbers = set()
    if not lora or len(numbers) != 1:
        raise ValueError(f"{name}: <lora:{brief(text)[1:-1]}> must be <lora:NAME:WEIGHT>, with one weight")
    return lora, numbers.pop()
