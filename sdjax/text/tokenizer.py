"""CLIP's tokenizer: byte-level BPE, on the `tokenizers` library alone."""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sdjax.checkpoints import hub
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import read_json, write_json
from sdjax.files import replacing

SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of a special token's matching
MAX_LENGTH = 77
UNSET_LENGTH = 1e6  # transformers writes 1e30 for a model_max_length that nobody set


class CLIPTokenizer:
    """Text to token ids: bos, the BPE tokens of the text, eos, then pad up to model_max_length.

    The text is NFC-normalised, its runs of white space become one space, it is lower-cased, split into words (letters,
    single digits, other signs, English contractions), and every word's UTF-8 bytes are merged by rank
    (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4).
    A special token written out in the text becomes that token, an added one (`add_token`) all of its ids.

    vocab: token -> id. merges: pairs in order of rank. special_tokens: names of SPECIAL_TOKENS -> token, each in vocab.
    Raises CheckpointError for a special token or a merge that vocab does not have.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        model_max_length: int = MAX_LENGTH,
        special_tokens: Mapping[str, str | AddedToken] = SPECIAL_TOKENS,
    ):
        tokens = {name: _special(token) for name, token in {**SPECIAL_TOKENS, **special_tokens}.items()}
        unknown = [f"{name} {token.content!r}" for name, token in tokens.items() if token.content not in vocab]
        if unknown:
            raise CheckpointError(f"the tokenizer's vocabulary has no {', '.join(unknown)}")
        self.vocab, self.merges, self.special_tokens = dict(vocab), [tuple(pair) for pair in merges], tokens
        self.model_max_length = model_max_length
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = (
            vocab[tokens[name].content] for name in SPECIAL_TOKENS
        )
        self.added_tokens: dict[str, range] = {}  # the names of add_token -> their ids
        self._expanded: dict[int, range] = {}  # the library's id of a name -> the same ids
        self._tokenizer = _byte_pair_encoding(self.vocab, self.merges, tokens)

    def __call__(self, texts: str | Iterable[str]) -> np.ndarray:
        """int32 [B, model_max_length]. Warns (UserWarning) of every text that is too long, with the part it drops."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = np.full((len(texts), self.model_max_length), self.pad_token_id, np.int32)
        for row, text in zip(ids, texts, strict=True):
            if dropped := self.truncated(text):
                warnings.warn(
                    f"the prompt is longer than {self.model_max_length} tokens; this part is ignored: {dropped!r}",
                    stacklevel=2,
                )
            content = self.encode(text)[: self.model_max_length - 2]
            row[: len(content) + 2] = [self.bos_token_id, *content, self.eos_token_id]
        return ids

    def truncated(self, text: str) -> str:
        """The end of the text that does not fit into model_max_length tokens; "" when all of it does."""
        dropped = self._tokens(text)[self.model_max_length - 2 :]
        return text[dropped[0][1] :] if dropped else ""

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone: no bos, no eos, no padding, nothing cut off."""
        return [token for token, _ in self._tokens(text)]

    def add_token(self, name: str, vectors: int) -> None:
        """From now on the name, in any case, is so many ids of its own, counted on from the vocabulary and those added.

        A name that starts or ends with a letter, a digit or _ is found as a whole word (easynegative), another one
        anywhere (<cat-toy>); of two that start at one place the longer. save_pretrained does not save it. Raises
        ValueError for a name that is empty, has white space around it or is a token already, and for no vectors.
        """
        if not name or name != name.strip():
            raise ValueError(f"a token needs a name without white space around it, not {name!r}")
        if vectors < 1:
            raise ValueError(f"the token {name!r} needs at least one vector, not {vectors}")
        if name in self.vocab or len(self._encode(name).ids) == 1:  # the second: in any case, and of those added
            raise ValueError(f"{name!r} is a token of the tokenizer already; give the new one another name")
        whole_word = bool(re.match(r"\w", name) or re.search(r"\w$", name))
        self._tokenizer.add_tokens([AddedToken(name, single_word=whole_word, normalized=True)])
        start = len(self.vocab) + sum(map(len, self.added_tokens.values()))
        ids = range(start, start + vectors)
        self.added_tokens[name] = self._expanded[self._tokenizer.token_to_id(name)] = ids

    def _tokens(self, text: str) -> list[tuple[int, int]]:
        """(id, where in the text it starts) of every token; an added token's ids start at one place."""
        encoding = self._encode(text)
        starts = [start for start, _ in encoding.offsets]
        pairs = zip(encoding.ids, starts, strict=True)
        return [(expanded, start) for token, start in pairs for expanded in self._expanded.get(token, (token,))]

    def _encode(self, text: str) -> Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | os.PathLike, subfolder: str | None = None, revision: str | None = None
    ) -> Self:
        """Reads tokenizer.json where there is one, else vocab.json and merges.txt, with their tokenizer_config.json.

        Raises FileNotFoundError for a folder that does not exist, CheckpointError for one that is no CLIP tokenizer.
        """
        folder = hub.resolve(path_or_hub_id, revision=revision, subfolder=subfolder)
        config = _read_optional(folder / "tokenizer_config.json")
        vocab, merges, declared = _read_vocabulary(folder)
        if "added_tokens_decoder" in config:
            declared = config["added_tokens_decoder"].values()
        else:
            config |= _read_optional(folder / "special_tokens_map.json")
        added = {token.content: token for token in map(_special, declared)}
        if unknown := sorted(added.keys() - vocab.keys()):
            raise CheckpointError(f"{folder}: added tokens outside the vocabulary are not supported: {unknown}")
        tokens = {name: _special(config.get(name) or default) for name, default in SPECIAL_TOKENS.items()}
        length = config.get("model_max_length", UNSET_LENGTH)
        return cls(
            vocab,
            merges,
            model_max_length=int(length) if length < UNSET_LENGTH else MAX_LENGTH,
            special_tokens={name: added.get(token.content, token) for name, token in tokens.items()},
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes vocab.json, merges.txt and tokenizer_config.json, which transformers' CLIPTokenizer reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        merges = "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""])
        write_json(folder / "vocab.json", self.vocab)
        with replacing(folder / "merges.txt") as temporary:
            temporary.write_text(merges, encoding="utf-8")
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": self.model_max_length,
                **{name: _to_json(token) for name, token in self.special_tokens.items()},
            },
        )


def _special(token: str | AddedToken | dict[str, Any]) -> AddedToken:
    """A special token as the JSON files write it: its text, or its text with the flags of its matching."""
    if isinstance(token, AddedToken):
        return token
    fields = {"content": token} if isinstance(token, str) else token
    return AddedToken(fields["content"], special=True, **{flag: fields[flag] for flag in FLAGS if flag in fields})


def _to_json(token: AddedToken) -> dict[str, Any]:
    flags = {flag: getattr(token, flag) for flag in FLAGS}
    return {"__type": "AddedToken", "content": token.content, **flags}


def _byte_pair_encoding(vocab: dict, merges: list, special_tokens: dict[str, AddedToken]) -> Tokenizer:
    try:
        model = BPE(
            vocab, merges, unk_token=special_tokens["unk_token"].content, end_of_word_suffix=END_OF_WORD, fuse_unk=False
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"the tokenizer's vocabulary and merges do not fit together: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens(list(special_tokens.values()))
    return tokenizer


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list]:
    """(vocab, merges, added tokens)"""
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        model = content.get("model", {})
        if not isinstance(model.get("vocab"), dict) or "merges" not in model:
            raise CheckpointError(f"{path}: not a BPE tokenizer, as CLIP's is")
        merges, added = model["merges"], content.get("added_tokens", [])
    else:
        model = {"vocab": read_json(folder / "vocab.json")}
        merges, added = _read_merges(folder / "merges.txt"), []
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return model["vocab"], pairs, added


def _read_merges(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has vocab.json but no merges.txt") from None
    return [line for line in lines[lines[0].startswith("#version") :] if line.strip()]


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
