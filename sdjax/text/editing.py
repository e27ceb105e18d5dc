"""Prompts that change from row to row, as the Stable Diffusion web UI writes them.

    [from:to:when]  [to:when]  [from::when]   one, then the other: `when` is a part of the rows (0.4), or so many (12)
    [one|other|…]                             each in turn

They nest, in each other and in brackets that weigh words.
"""

import re
from typing import NamedTuple

from sdjax.request.values import PLAIN
from sdjax.text import prompts
from sdjax.text.tokenizer import NOTHING

SEPARATORS = (":", "|")


class Change(NamedTuple):
    """What a prompt has in one place."""

    options: "list[list[str | Change]]"
    when: str | None
    """until when it is the first of two; None: each in turn"""

    def at(self, row: int, rows: int) -> "list[str | Change]":
        """The option of a row."""
        if self.when is None:
            return self.options[row % len(self.options)]
        last = float(self.when) * (rows if "." in self.when else 1)
        before, after = self.options if len(self.options) == 2 else ([], *self.options)
        return before if row + 1 <= int(last) else after


class Separator(str):
    """A sign that may part the options of the bracket that it is in."""


class Bracket(NamedTuple):
    """One that is open, and what is in it so far."""

    sign: str
    pieces: "list[str | Change]"


def by_row(text: str, rows: int, syntax: str, words: str = NOTHING) -> list[str]:
    """The text of each row. words: the regular expression of what is text as it stands. Raises as `prompts.signs`."""
    if syntax == PLAIN or "[" not in text:
        return [text] * rows
    pieces = _read(text, words)
    if not any(isinstance(piece, Change) for piece in pieces):
        return [text] * rows
    return [_written(pieces, row, rows) for row in range(rows)]


def _written(pieces: "list[str | Change]", row: int, rows: int) -> str:
    return "".join(_written(piece.at(row, rows), row, rows) if isinstance(piece, Change) else piece for piece in pieces)


def _read(text: str, words: str) -> "list[str | Change]":
    """The text as it stands, and the changes in it."""
    opened = [Bracket("", [])]
    for sign in prompts.signs(text, words):
        found, bracket = sign[0], prompts.CLOSES.get(sign[0][-1])
        if sign["literal"] is not None:
            opened[-1].pieces.append(found)
        elif found in prompts.FACTORS:
            if len(opened) > 2 * prompts.DEPTH:
                raise ValueError(f"a prompt has more than {2 * prompts.DEPTH} brackets open at once")
            opened.append(Bracket(found, []))
        elif found in SEPARATORS:
            opened[-1].pieces.append(Separator(found))
        elif bracket and opened[-1].sign == bracket:
            inside = opened.pop().pieces
            when = re.search(prompts.NUMBER, found)[0] if sign["editing"] else None
            is_change = bracket == "[" and (when is not None or Separator("|") in inside)
            made = [Change(_options(inside, when), when)] if is_change else [bracket, *inside, found]
            opened[-1].pieces.extend(made)
        else:
            opened[-1].pieces.append(found)
    first, *unclosed = opened
    return first.pieces + [piece for bracket in unclosed for piece in (bracket.sign, *bracket.pieces)]


def _options(pieces: "list[str | Change]", when: str | None) -> "list[list[str | Change]]":
    """Parted at each |, or, for two of which one follows the other, at the first colon."""
    options, sign = [[]], "|" if when is None else ":"
    for piece in pieces:
        if isinstance(piece, Separator) and piece == sign and (when is None or len(options) == 1):
            options.append([])
        else:
            options[-1].append(piece)
    return options
