"""How drawings are asked for: articles, backgrounds, two side by side; and the pairings that training never sees."""

import re
import zlib
from collections.abc import Sequence

from drawings import DEFAULT_COLOR, PALETTE

SUBSTANCES = """
bacon, baggage claim, bread, broccoli, butter, cheese, cooked rice, coral, corn, curry rice, dna, fire, fog, garlic,
ginger root, ice, left luggage, luggage, mate, meat on bone, non-potable water, oden, popcorn, potable water,
pouring liquid, roasted sweet potato, sake, salt, soap, spaghetti, sushi, thread, wood, yarn,
badminton, bowling, camping, cooking, currency exchange, field hockey, horse racing, ice hockey, lacrosse, ping pong,
softball, tennis, building construction, construction, no littering, no smoking, infinity, yin yang, sunrise, sunset,
sunrise over mountains, skis, plus, minus, multiply, divide, ZZZ, om, breast-feeding, rolling on the floor laughing,
Santa Claus, Mrs. Claus, Mx Claus, Mount Fuji, Tokyo Tower, Aries, Taurus, Gemini, Cancer, Leo, Virgo, Libra, Scorpio,
Sagittarius, Capricorn, Aquarius, Pisces, Ophiuchus
"""
NO_ARTICLE = frozenset(re.split(r",\s+", SUBSTANCES.strip()))
THE = ("Statue of ", "milky way")
SINGULAR_IN_S = ("ss", "us", "is")
PLURALS = frozenset({"men", "women", "people", "children"})
HEAD_ENDS = re.compile(r" (with|of|on|in|at|behind|between|over|without|to|for|feeding|wearing|holding|and) ")
SILENT_H = ("hour", "heir")
CONSONANT_SOUND = ("uni", "uk", "eu", "one-", "u-")
SPELLED_WITH_VOWEL = "AEFHILMNORSX"


def with_article(name: str) -> str:
    """The name after "a", "an" or "the"; plurals, substances, pursuits and persons stand alone."""
    if name.startswith(THE):
        return f"the {name}"
    if not takes_article(name):
        return name
    return f"{'an' if starts_with_vowel(name.split()[0]) else 'a'} {name}"


def takes_article(name: str) -> bool:
    """Whether "a" or "an" can precede the name."""
    return not (name in NO_ARTICLE or name.startswith(THE) or is_plural(name))


def is_plural(name: str) -> bool:
    """Whether the word that the name is about has the form of a plural: "two hearts", "people with bunny ears"."""
    head = HEAD_ENDS.split(name)[0].split()[-1].lower()
    return head in PLURALS or (head.endswith("s") and not head.endswith(SINGULAR_IN_S))


def starts_with_vowel(word: str) -> bool:
    """By sound: an owl, an hourglass, a unicorn; letters are spelled: an NG button, an x-ray."""
    if len(word) <= 3 and word.isupper():
        return word[0] in SPELLED_WITH_VOWEL
    word = word.lower()
    return word.startswith((*SILENT_H, "x-")) or (word[0] in "aeiou" and not word.startswith(CONSONANT_SOUND))


def captions(name: str, color: str | None, adjective: str | None = None) -> list[str]:
    """The six ways to ask for a drawing on the named background, or on none.

    Two of them name its own colour, if it has one that the name does not give: "a yellow key".
    """
    own = f"{adjective} {name}" if adjective else name
    phrases = [with_article(name), name, with_article(own) if takes_article(name) else own, own]
    if color is None:
        return [*phrases, f"an emoji of {phrases[0]}", f"{name} emoji"]
    ground = f"{with_article(color)} background"
    return [*(f"{phrase} on {ground}" for phrase in phrases), f"{phrases[0]}, {color} background", f"{name} on {color}"]


def pair_captions(names: Sequence[str], color: str | None) -> list[str]:
    """The six ways (some the same) to ask for two drawings side by side, the first on the left."""
    ground = "" if color is None else f" on {with_article(color)} background"
    with_articles, plain = (" and ".join(phrases) for phrases in (map(with_article, names), names))
    return [text + ground for text in (with_articles, plain) * 3]


def is_held_out(name: str, color: str) -> bool:
    """Whether training never shows this drawing on this background: one pairing in ten, never on the default one.

    By the checksum of both names, so that it does not depend on the set.
    """
    return color != DEFAULT_COLOR and zlib.crc32(f"{name} on {color}".encode()) % 10 == 0


def own_color(name: str, shares: Sequence[float]) -> str | None:
    """The colour that most of a drawing has, None if its name has one: shares of PALETTE's colours -> "yellow"."""
    named = name.startswith(THE) or set(name.lower().split()) & {*PALETTE, "grey"}
    color, share = max(zip(PALETTE, shares, strict=True), key=lambda pair: pair[1])
    return color if share > 0.6 and not named else None
