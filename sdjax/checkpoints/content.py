"""What a file of weights is, from its first bytes: people rename them, and downloads go wrong."""

from pathlib import Path

from sdjax.checkpoints.errors import CheckpointError

LONGEST_HEADER = 16 << 20  # bytes, of a safetensors file; SDXL's takes a quarter of a million
LENGTH = 8  # bytes before that header, which hold its own
LOOKED_AT = 512
ENDINGS = {
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    ".msgpack": "msgpack",
    **dict.fromkeys((".bin", ".ckpt", ".pt", ".pth"), "pickle"),
}
"""What the names of weight files end with, in upper or lower case, and the format that each stands for"""

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # the zip container, the older stream
MSGPACK_MAPS = {*range(0x81, 0x90), 0xDE, 0xDF}
NO_WEIGHTS = {
    b"version https://git-lfs.github.com": "a Git LFS pointer, which stands for the file: fetch that with `git lfs "
    "pull`, or download it from its page",
    b"<!doctype html": "a web page, as comes from a download that needs a login or another address",
    b"<html": "a web page, as comes from a download that needs a login or another address",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"), "a picture, where a network is needed"),
    b"GGUF": "quantised weights in GGUF, which are not supported: take the checkpoint in safetensors",
}
"""What files that are no weights begin with, in lower case for text"""


def check_regular(path: Path) -> None:
    """Raises CheckpointError for a device or a pipe, which have no end. What is not there is left to be opened."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: no regular file")


def is_weight_name(name: str) -> bool:
    """Whether files of weights have names like this."""
    return name.lower().endswith(tuple(ENDINGS))


def without_ending(name: str) -> str:
    """The name without the ending of a weight file, if it has one."""
    return name[: name.rindex(".")] if is_weight_name(name) else name


def format_of(path: Path) -> str:
    """ "safetensors", "pickle" or "msgpack": by its content, or by its name where the content is damaged.

    Raises CheckpointError naming the file, and what it is if that is known, for anything else.
    """
    check_regular(path)
    with open(path, "rb") as file:
        start = file.read(LOOKED_AT)
    if not start:
        raise CheckpointError(f"{path}: truncated: the file is empty; download it again")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, what in NO_WEIGHTS.items():
        if start.startswith(beginning) or text.startswith(beginning):
            raise CheckpointError(f"{path}: no weights: it is {what}")
    if start[LENGTH : LENGTH + 1] == b"{" and int.from_bytes(start[:LENGTH], "little") <= LONGEST_HEADER:
        return "safetensors"
    if start.startswith(PICKLES):
        return "pickle"
    if start[0] in MSGPACK_MAPS:
        return "msgpack"
    named = ENDINGS.get(path.suffix.lower())
    if named is None:
        raise CheckpointError(f"{path}: no weights: neither safetensors, nor saved by PyTorch or by Flax")
    return named
