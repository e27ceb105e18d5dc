"""CLIP's tokenizer: byte-level BPE, on the `tokenizers` library alone."""

import itertools
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sdjax.checkpoints import hub
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import read_json, read_text, write_json
from sdjax.fields import Within, brief, checked, encodable
from sdjax.files import replacing

SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"
EXTRA_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token's matching
NOTHING = r"(?!)"  # matches nowhere
MAX_LENGTH = 77
MOST_IDS, MOST_WORDS = 2**22, 10_000  # of a vocabulary, of added tokens
UNSET_LENGTH = 1e6  # transformers writes 1e30 for a model_max_length that is not set


class CLIPTokenizer:
    """Text to token ids: bos, the BPE tokens of the text, eos, then pad up to model_max_length.

    The text is NFC-normalised, its runs of white space become one space, it is lower-cased, split into words (letters,
    single digits, other signs, English contractions), and every word's UTF-8 bytes are merged by rank
    (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4).
    A special token written out in the text becomes that token, an added one (a learned word) all of its ids.

    vocab: token -> id. merges: pairs in order of rank. special_tokens: names of SPECIAL_TOKENS -> token, each in vocab
    or added. added_tokens: their ids go on from those of vocab. The ids of an added token are those of itself and, as
    diffusers names the vectors of a word that has several, of the added tokens token_1, token_2, ….
    Raises CheckpointError for a special token or a merge that vocab does not have.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        model_max_length: int = MAX_LENGTH,
        special_tokens: Mapping[str, str | AddedToken] = SPECIAL_TOKENS,
        added_tokens: Sequence[AddedToken] = (),
    ):
        tokens = {name: _token(token, special=True) for name, token in {**SPECIAL_TOKENS, **special_tokens}.items()}
        self.vocab, self.merges, self.special_tokens = dict(vocab), [tuple(pair) for pair in merges], tokens
        self.model_max_length = model_max_length
        self.added_tokens: dict[str, tuple[int, ...]] = {}
        """the learned words -> their ids"""
        self.word_pattern = NOTHING
        """the regular expression of all added tokens as they stand in a text"""
        self.vocab_size = max(vocab.values(), default=-1) + 1
        """how many ids the vocabulary has; those of added tokens go on from here"""
        self._added: list[AddedToken] = []
        self._expanded: dict[int, tuple[int, ...]] = {}  # the library's id of an added token -> its ids here
        ids = {**vocab, **{token.content: id for id, token in enumerate(added_tokens, self.vocab_size)}}
        if unknown := [f"{name} {token.content!r}" for name, token in tokens.items() if token.content not in ids]:
            raise CheckpointError(f"the tokenizer's vocabulary has no {', '.join(unknown)}")
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = (
            ids[tokens[name].content] for name in SPECIAL_TOKENS
        )
        self._tokenizer = _byte_pair_encoding(self.vocab, self.merges, tokens)
        self._add(added_tokens)

    def __len__(self) -> int:
        """How many ids there are, those of added tokens included."""
        return self.vocab_size + len(self._added)

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
        """From now on the name, in any case, is so many ids of its own, counted on from those there are.

        A name that starts or ends with a letter, a digit or _ is found as a whole word (easynegative), another one
        anywhere (<cat-toy>); of two that start at one place the longer. Raises ValueError as `check_new`.
        """
        self.check_new(name, vectors)
        self._add([_word(own, name) for own in itertools.islice(_names(name), vectors)])

    def check_new(self, name: str, vectors: int) -> None:
        """Raises ValueError for a name that cannot be added: that is empty, has white space around it, or is a token.

        So are name_1, name_2, … up to the number of vectors, and the one after it: the word would be read with it.
        """
        _check_characters(name)
        if not name or name != name.strip():
            raise ValueError(f"a token needs a name without white space around it, not {name!r}")
        if vectors < 1:
            raise ValueError(f"the token {name!r} needs at least one vector, not {vectors}")
        for own in itertools.islice(_names(name), vectors + 1):
            if own in self.vocab or len(self._encode(own).ids) == 1:  # the second: in any case, and of those added
                raise ValueError(f"{own!r} is a token of the tokenizer already; give the new one another name")
        base, _, number = name.rpartition("_")
        if base in self.added_tokens and number == str(len(self.added_tokens[base])):
            raise ValueError(f"{name!r} would be read as one more vector of {base!r}; give it another name")

    def _add(self, tokens: Sequence[AddedToken]) -> None:
        if tokens and self.vocab_size != len(self.vocab):  # the library counts on from the number of tokens
            raise CheckpointError(
                f"the {len(self.vocab)} tokens of the vocabulary have ids up to {self.vocab_size - 1}: none can follow"
            )
        self._added += tokens
        self._tokenizer.add_tokens(list(tokens))
        ids = {token.content: id for id, token in enumerate(self._added, self.vocab_size)}
        all_ids = {name: tuple(ids[own] for own in itertools.takewhile(ids.__contains__, _names(name))) for name in ids}
        further = {id for own in all_ids.values() for id in own[1:]}
        self.added_tokens = {name: own for name, own in all_ids.items() if own[0] not in further}
        self._expanded = {self._tokenizer.token_to_id(name): own for name, own in all_ids.items()}
        longest_first = sorted(self._added, key=lambda token: -len(token.content))
        self.word_pattern = "|".join(map(_pattern, longest_first)) or NOTHING

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
        try:
            return cls(**_read(folder))
        except CheckpointError as error:
            message = str(error)
            raise CheckpointError(message if message.startswith(str(folder)) else f"{folder}: {message}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: its files are not as transformers writes them: {error!r}") from error

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes vocab.json, merges.txt and tokenizer_config.json, which transformers' CLIPTokenizer reads too.

        Added tokens are in tokenizer_config.json and, for transformers before 4.34, in added_tokens.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        merges = "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""])
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.model_max_length,
            **{name: {"__type": "AddedToken", **_fields(token)} for name, token in self.special_tokens.items()},
        }
        if self._added:
            added = dict(enumerate(self._added, self.vocab_size))
            special = {self.vocab[t.content]: t for t in self.special_tokens.values() if t.content in self.vocab}
            config["added_tokens_decoder"] = {
                str(id): {**_fields(token), "special": token.special} for id, token in (special | added).items()
            }
            write_json(folder / "added_tokens.json", {token.content: id for id, token in added.items()})
        write_json(folder / "vocab.json", self.vocab)
        with replacing(folder / "merges.txt") as temporary:
            temporary.write_text(merges, encoding="utf-8")
        write_json(folder / "tokenizer_config.json", config)


def words_pattern(names: Iterable[str]) -> str:
    """The regular expression of learned words in a text, as `CLIPTokenizer.add_token` finds them.

    Raises ValueError for a word that no text has.
    """
    names = list(names)
    for name in names:
        _check_characters(name)
    return "|".join(_pattern(_word(name, name)) for name in names) or NOTHING


def _check_characters(name: str) -> None:
    """Raises ValueError for a name that no text has: with half a character, or a byte that is no UTF-8."""
    if encodable(name) != name:
        raise ValueError(f"the word {brief(name)} is not of whole characters; give another one, FILE:WORD")


def _names(word: str) -> Iterator[str]:
    """What diffusers calls the vectors of a word: word, word_1, word_2, …"""
    return itertools.chain([word], (f"{word}_{i}" for i in itertools.count(1)))


def _word(name: str, word: str) -> AddedToken:
    whole_word = bool(re.match(r"\w", word) or re.search(r"\w$", word))
    return AddedToken(name, single_word=whole_word, normalized=True)


def _pattern(token: AddedToken) -> str:
    spelled = r"\s+".join(map(re.escape, token.content.split()))
    spelled = rf"(?i:{spelled})" if token.normalized else spelled
    return rf"(?<!\w){spelled}(?!\w)" if token.single_word else spelled


def _token(value: str | AddedToken | Mapping[str, Any], *, special: bool) -> AddedToken:
    """An added token as the JSON files write it: its text, or its text with the flags of its matching."""
    if isinstance(value, AddedToken):
        return value
    fields = {"content": value} if isinstance(value, str) else value
    return AddedToken(fields["content"], special=special, **{flag: fields[flag] for flag in FLAGS if flag in fields})


def _fields(token: AddedToken) -> dict[str, Any]:
    return {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}


def _declared(
    folder: Path, config: Mapping[str, Any], listed: Iterable[Mapping[str, Any]], *, special: set[str]
) -> dict[str, tuple[int, AddedToken]]:
    """text -> (id, token) of the added tokens, wherever a version of transformers writes them.

    listed: those of tokenizer.json. special: texts of special tokens.
    """
    extra = [token for name in EXTRA_SPECIAL_TOKENS for token in config.get(name) or ()]
    special = special | {_token(token, special=True).content for token in extra}
    found = [(id, {"content": content}) for content, id in _read_optional(folder / "added_tokens.json").items()]
    found += [(fields["id"], fields) for fields in listed]
    found += config.get("added_tokens_decoder", {}).items()
    return {
        fields["content"]: (int(id), _token(fields, special=fields.get("special") or fields["content"] in special))
        for id, fields in found
    }


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


def _read(folder: Path) -> dict[str, Any]:
    """The arguments of a tokenizer."""
    config = _read_optional(folder / "tokenizer_config.json")
    vocab, merges, listed = _read_vocabulary(folder)
    if "added_tokens_decoder" not in config:
        config |= _read_optional(folder / "special_tokens_map.json")
    named = {name: _token(config.get(name) or default, special=True) for name, default in SPECIAL_TOKENS.items()}
    declared = _declared(folder, config, listed, special={token.content for token in named.values()})
    words = sorted((id, content) for content, (id, _) in declared.items() if content not in vocab)
    if len(words) > MOST_WORDS:
        raise CheckpointError(f"{len(words):,} added tokens, more than {MOST_WORDS:,}")
    if [id for id, _ in words] != list(range(len(vocab), len(vocab) + len(words))):
        found = ", ".join(f"{content!r} {id}" for id, content in words)
        raise CheckpointError(f"the ids of added tokens do not go on from the {len(vocab)} of the vocabulary: {found}")
    length = checked("model_max_length", config.get("model_max_length"), float | None) or UNSET_LENGTH
    if length < UNSET_LENGTH:
        length = checked("tokenizer_config.json: model_max_length", length, Annotated[int, Within(3, 4096)])
    return {
        "vocab": vocab,
        "merges": merges,
        "model_max_length": length if length < UNSET_LENGTH else MAX_LENGTH,
        "special_tokens": {name: declared.get(token.content, (0, token))[1] for name, token in named.items()},
        "added_tokens": [declared[content][1] for _, content in words],
    }


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list]:
    """(vocab, merges, added tokens)"""
    path, added = folder / "tokenizer.json", []
    if path.is_file():
        content = read_json(path)
        model = content.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
            raise CheckpointError(f"{path}: not a BPE tokenizer, as CLIP's is")
        vocab, merges, added = model["vocab"], model["merges"], content.get("added_tokens") or []
    else:
        path = folder / "vocab.json"
        vocab, merges = read_json(path), _read_merges(folder / "merges.txt")
    strange = next((token for token, id in vocab.items() if type(id) is not int or not 0 <= id < MOST_IDS), None)
    if strange is not None:
        raise CheckpointError(
            f"{path}: the id of {brief(strange)} is {brief(vocab[strange])}, no whole number of an id"
        )
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    if wrong := [pair for pair in pairs if len(pair) != 2 or not all(isinstance(part, str) for part in pair)]:
        raise CheckpointError(f"{folder}: its merges have {brief(wrong[0])}, which is no pair of tokens")
    return vocab, pairs, added


def _read_merges(path: Path) -> list[str]:
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has vocab.json but no merges.txt") from None
    return [line for line in lines[lines[0].startswith("#version") :] if line.strip()]


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
