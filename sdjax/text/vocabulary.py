"""The vocabulary of CLIP (arXiv:2103.00020), for checkpoints that come without a tokenizer."""

from pathlib import Path

MERGES = Path(__file__).parents[1] / "assets" / "clip-tokenizer" / "merges.txt"
PRINTABLE = ("!~", "¡¬", "®ÿ")  # first and last: the bytes that stand for themselves
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in order of rank): 49,408 tokens, 48,894 merges

    Ids count the 256 bytes, the bytes that end a word, what the merges make, then the special tokens. Bytes that do not
    print are spelled by the characters from 256 on (Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners", section 2.2).
    """
    lines = MERGES.read_text(encoding="utf-8").splitlines()[1:]  # after the version
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    letters = [chr(code) for ends in PRINTABLE for code in range(ord(ends[0]), ord(ends[1]) + 1)]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), *SPECIAL]
    return {token: i for i, token in enumerate(tokens)}, merges
