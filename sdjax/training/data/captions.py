"""Captions as they are seen in one step."""

from collections.abc import Sequence

import numpy as np

OBJECT = (
    "a photo of {}",
    "a picture of {}",
    "a good photo of {}",
    "a close-up photo of {}",
    "a bright photo of {}",
    "a cropped photo of {}",
    "a rendition of {}",
    "a photo of one {}",
)
STYLE = (
    "a picture in the style of {}",
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "an artwork in the style of {}",
    "a close-up in the style of {}",
    "a small picture in the style of {}",
)
TEMPLATES = {"object": OBJECT, "style": STYLE}
"""Sentences around a word that is learnt, by what it means (arXiv:2208.01618, appendix)"""


def seen(caption: str, chance: np.random.Generator, *, shuffle: bool = False, keep: int = 0, empty: float = 0.0) -> str:
    """The caption, or "" with probability `empty` (arXiv:2207.12598); shuffled: its tags between commas in another
    order, the first `keep` where they are."""
    if chance.random() < empty:
        return ""
    if not shuffle:
        return caption
    tags = [tag.strip() for tag in caption.split(",")]
    rest = tags[keep:]
    return ", ".join([*tags[:keep], *(rest[place] for place in chance.permutation(len(rest)))])


def sentence(templates: Sequence[str], word: str, chance: np.random.Generator) -> str:
    """One of the templates, about a word."""
    return templates[chance.integers(len(templates))].format(word)
