"""The bytes that a TPU program moves to and from its HBM, read off the text of the optimized program."""

import math
import re
from collections.abc import Iterator

ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\w*\[([\d,]*)\](\{[^}]*\})?")
"""A type: s8[2,3]{1,0:T(8,128)S(1)}; S(n): in a memory on the chip"""
COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
NAME = re.compile(r"%([\w.-]+)")
INSIDE = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
KERNEL = "tpu_custom_call"
MOVES_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"),
    *("while", "conditional", "call", "copy-done", "slice-done", "async-done"),
}
"""They only name what others move, or are the sum of instructions that are counted themselves."""


def hbm_bytes(text: str) -> int:
    """What the instructions of a program read from and write to the HBM, each of its operands and results once.

    Like the compiler's own "bytes accessed", with the body of a loop counted once, but without what stays in memories
    on the chip, and with an asynchronous slice counted as what it takes, not as what it is taken from. Of a slice that
    is taken inside a fusion the whole array counts, of keys that a kernel reads again for other queries one reading.
    """
    inside = set(INSIDE.findall(text))
    return sum(_moved(lines) for name, lines in _computations(text) if name not in inside)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            name, lines = match[1], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _moved(lines: list[str]) -> int:
    types: dict[str, str] = {}
    moved = 0
    for match in filter(None, map(INSTRUCTION.match, lines)):
        name, result, opcode, rest = match.groups()
        types[name] = result
        if opcode in MOVES_NOTHING or (opcode == "custom-call" and KERNEL not in rest):
            continue
        if opcode.endswith("-start"):
            moved += min(size for size, _ in _arrays(result) if size > 4)  # beside it a word to wait for
            continue
        operands = [types.get(operand, "") for operand in NAME.findall(rest.split("), ", 1)[0])]
        moved += sum(size for type_ in (result, *operands) for size, is_hbm in _arrays(type_) if is_hbm)
    return moved


def _arrays(type_: str) -> list[tuple[int, bool]]:
    """(bytes, whether in the HBM) of the arrays of a type, which may be a tuple."""
    return [
        (math.prod(map(int, filter(None, shape.split(",")))) * max(1, int(bits or 8) // 8), "S(" not in layout)
        for _, bits, shape, layout in ARRAY.findall(type_)
    ]
