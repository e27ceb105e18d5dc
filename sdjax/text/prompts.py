r"""Prompts as the Stable Diffusion web UI writes them: weighted words, and texts of any length in chunks.

    (word)    1.1 times the weight       (word:1.3)       1.3 times
    [word]    1 / 1.1 times              \( \) \[ \] \\   the sign itself
    BREAK     ends the chunk         a AND b:0.5   two prompts, see `parts`

Brackets nest and multiply; one that is never closed ends with the prompt. The signs in a learned word, such as <cat:2>
or [cat], are the word's. Prompts that change from row to row are those of `editing`. Networks (<lora:name:0.8>) raise
ValueError: read as text they would be another picture.

In the plain syntax, that of PyTorch diffusers, all signs are text and what does not fit into one chunk is cut off.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.request.values import PLAIN
from sdjax.text.tokenizer import NOTHING, CLIPTokenizer

FACTORS = {"(": 1.1, "[": 1 / 1.1}
HEAVIEST = 1e6
CLOSES = {")": "(", "]": "["}
BREAK = ("BREAK", -1.0)
"""The piece of `parse` that ends a chunk; compared by identity, so that no text equals it"""

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
SIGN = re.compile(
    rf"""\\(?P<literal>[()\[\]\\]?)
    | :\s*(?P<weight>{NUMBER})\s*\)
    | (?P<editing>:\s*{NUMBER}(?:[eE][+-]?\d+)?\])
    | (?P<word>\b(?:BREAK|AND)\b)
    | [()\[\]:|]
    | (?:(?!\b(?:BREAK|AND)\b)[^\\()\[\]:|])+""",
    re.VERBOSE,
)

DEPTH = 100  # of brackets; the web UI's weights overflow beyond some hundreds
NETWORK = r"<(?:lora|lyco|hypernet):[^<>]*>"

COMMA = ",</w>"
BACKTRACK = 20  # what follows a comma among so many last tokens of a full chunk moves on to the next, as in the web UI

Piece = tuple[str, float]
Token = tuple[int, float]


def parts(text: str, syntax: str) -> list[tuple[str, float]]:
    """'a goose AND a lake:0.5' -> [('a goose ', 1.0), (' a lake', 0.5)]: prompts that guidance adds up, and weights.

    One of weight 1 without AND between white space, and in the plain syntax.
    """
    found = [text] if syntax == PLAIN else re.split(r"(?<!\S)AND(?!\S)", text)
    if len(found) == 1:
        return [(text, 1.0)]
    matches = (re.fullmatch(rf"(.*?)(?::\s*({NUMBER})\s*)?", part, re.DOTALL) for part in found)
    weighted = [(match[1], float(match[2] or 1)) for match in matches]
    if heavy := next((part for part in weighted if not abs(part[1]) <= HEAVIEST), None):
        raise ValueError(f"{heavy[0][:60]!r}: its weight {heavy[1]:g} is more than {HEAVIEST:g}")
    return weighted


def texts_of(field: str, text: str, syntax: str) -> list[str]:
    """What is encoded of a field of a request: of the prompt its parts, of others the text."""
    return [part for part, _ in parts(text, syntax)] if field == "prompt" else [text]


def parse(text: str, words: str = NOTHING, syntax: str = "web-ui") -> list[Piece]:
    """(text, weight) in order, neighbours of equal weight joined, and BREAK. A backslash before another sign goes.

    words: the regular expression of what is text as it stands (`CLIPTokenizer.word_pattern`). syntax: of
    `kinds.PROMPT_SYNTAXES`. Raises ValueError for prompt editing, alternation, AND, networks and brackets that nest
    more than DEPTH deep. No other text is an error, and none in the plain syntax.
    """
    if syntax == PLAIN:
        return [(text, 1.0)]
    pieces: list[Piece] = []
    opened: dict[str, list[tuple[int, int]]] = {bracket: [] for bracket in FACTORS}  # (first piece, place in the text)
    bar = -1  # the place of the last |

    def multiply(first: int, factor: float) -> None:
        pieces[first:] = [piece if piece is BREAK else (piece[0], piece[1] * factor) for piece in pieces[first:]]

    for sign in signs(text, words):
        found, bracket = sign[0], CLOSES.get(sign[0][-1])
        if sign["literal"] is not None:
            pieces.append((sign["literal"], 1.0))
        elif found in opened:
            opened[found].append((len(pieces), sign.start()))
            if len(opened[found]) > DEPTH:
                raise ValueError(rf"a prompt has more than {DEPTH} {found} open at once; as text, write \{found}")
        elif bracket and opened[bracket]:
            first, start = opened[bracket].pop()
            if sign["editing"] or (bracket == "[" and bar > start):
                kind = "prompt editing" if sign["editing"] else "alternation"
                raise ValueError(
                    rf"{text[start : sign.end()]!r}: {kind} is not supported here; as text, write \[ and \]"
                )
            multiply(first, float(sign["weight"] or FACTORS[bracket]))
        elif sign["word"] == "AND":
            advice = "with spaces around it, and not in a negative one; as a word, write it in small letters"
            raise ValueError(f"{text!r}: AND is not supported but between prompts, {advice}")
        else:
            pieces.append(BREAK if sign["word"] else (found, 1.0))
            bar = sign.start() if found == "|" else bar
    for bracket, factor in FACTORS.items():
        for first, _ in opened[bracket]:
            multiply(first, factor)
    if heavy := next((piece for piece in pieces if not abs(piece[1]) <= HEAVIEST), None):
        raise ValueError(f"{heavy[0][:60]!r}: its weight {heavy[1]:g} is more than {HEAVIEST:g}")
    return _joined(pieces)


def signs(text: str, words: str) -> Iterator[re.Match]:
    """The signs of the text, a word being one literal sign. Raises ValueError for a network."""
    start = 0
    for match in re.finditer(rf"(?P<literal>{words})|{NETWORK}", text):
        if match["literal"] is None:
            raise ValueError(
                f"{match[0]!r}: a prompt does not load networks; a LoRA is loaded by load_lora, or by --lora"
            )
        yield from SIGN.finditer(text, start, match.start())
        yield match
        start = match.end()
    yield from SIGN.finditer(text, start)


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and piece is not BREAK and joined[-1] is not BREAK and piece[1] == joined[-1][1]:
            joined[-1] = (joined[-1][0] + piece[0], piece[1])
        elif piece[0]:
            joined.append(piece)
    return joined


def chunks(tokenizer: CLIPTokenizer, text: str, syntax: str = "web-ui") -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and their weights float32, both [C L]: C >= 1 chunks of L = tokenizer.model_max_length.

    A chunk is bos, up to L - 2 tokens, eos and padding; what is not of the text weighs 1. A full one ends after a comma
    that is near its end. The vectors of an added token stay together where a chunk can hold them. In the plain syntax
    there is one chunk, of the first tokens. Raises ValueError as `parse` does.
    """
    length = tokenizer.model_max_length
    if syntax == PLAIN:
        rows = [[(token, 1.0) for token in tokenizer.encode(text)[: length - 2]]]
    else:
        rows = _divided(tokenizer, parse(text, tokenizer.word_pattern), length - 2)
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    weights = np.ones((len(rows), length), np.float32)
    ids[:, 0] = tokenizer.bos_token_id
    for row, (own_ids, own_weights) in zip(rows, zip(ids, weights, strict=True), strict=True):
        own_ids[1 : len(row) + 2] = [*(token for token, _ in row), tokenizer.eos_token_id]
        own_weights[1 : len(row) + 1] = [weight for _, weight in row]
    return ids, weights


def batch(
    tokenizer: CLIPTokenizer, read: Sequence[tuple[np.ndarray, np.ndarray]], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `chunks` gives for several texts, both [B C L]: C is count, up to which chunks of "" fill each."""
    empty = chunks(tokenizer, "")
    shape = (len(read), count, tokenizer.model_max_length)
    ids, weights = (np.broadcast_to(part, shape).copy() for part in empty)
    for i, (own_ids, own_weights) in enumerate(read):
        ids[i, : len(own_ids)], weights[i, : len(own_ids)] = own_ids, own_weights
    return ids, weights


def _divided(tokenizer: CLIPTokenizer, pieces: list[Piece], size: int) -> list[list[Token]]:
    """The tokens of each chunk, at most size of them."""
    comma = tokenizer.vocab.get(COMMA)
    rows: list[list[Token]] = [[]]
    for piece in pieces:
        if piece is BREAK:
            rows.append([])
            continue
        text, weight = piece
        for ids in _units(tokenizer, text, size):
            if len(rows[-1]) == size and ids != [comma]:
                rows.append(_after_comma(rows[-1], comma))
            if len(rows[-1]) + len(ids) > size:
                rows.append([])
            rows[-1] += [(token, weight) for token in ids]
    return rows if rows[-1] or len(rows) == 1 else rows[:-1]


def _units(tokenizer: CLIPTokenizer, text: str, size: int) -> Iterator[list[int]]:
    """The ids of the text, those of one added token together unless they are more than size."""
    lengths = {ids[0]: len(ids) for ids in tokenizer.added_tokens.values() if len(ids) <= size}
    ids, start = tokenizer.encode(text), 0
    while start < len(ids):
        length = lengths.get(ids[start], 1)
        yield ids[start : start + length]
        start += length


def _after_comma(row: list[Token], comma: int | None) -> list[Token]:
    """Takes what follows the last comma off the row, if the comma is among its last BACKTRACK tokens."""
    for i in range(len(row) - 1, max(len(row) - BACKTRACK, 0) - 1, -1):
        if row[i][0] == comma:
            moved = row[i + 1 :]
            del row[i + 1 :]
            return moved
    return []


def weighted(states: Array, weights: Array) -> Array:
    """states [B L D] times weights [B L], scaled so that the mean of each [L D] stays; where all weights are 1, states.

    w x mean(x) / mean(w x), the web UI's "Original" emphasis, in float32.
    """
    plain = (weights == 1).all(axis=1)[:, None, None]
    x = states.astype(jnp.float32)
    scaled = weights[..., None] * x
    mean = scaled.mean(axis=(1, 2), keepdims=True)
    scaled *= x.mean(axis=(1, 2), keepdims=True) / jnp.where(plain, 1, mean)
    return jnp.where(plain, states, scaled.astype(states.dtype))


def unused_words(words: Mapping[str, str], prompts: Iterable[str]) -> list[str]:
    """Of words (path -> word) a warning for each that is in none of these prompts."""
    absent = {path: word.lower() for path, word in words.items()}
    for prompt in prompts:
        if not absent:
            break
        absent = {path: word for path, word in absent.items() if word not in prompt.lower()}
    return [f"--embedding {path}: its word {words[path]!r} is in no prompt" for path in absent]
