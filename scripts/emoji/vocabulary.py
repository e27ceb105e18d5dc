"""A tokenizer in CLIP's format, learned from captions."""

import json
from collections.abc import Iterable
from pathlib import Path

import recipe
from captions import captions
from drawings import Drawings
from scenes import GROUNDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from sdjax.text.tokenizer import END_OF_WORD, SPECIAL_TOKENS, CLIPTokenizer


def tokenizer(work: Path) -> CLIPTokenizer:
    """Learned from all the captions that there are, once: work/tokenizer"""
    path = work / "tokenizer"
    if not path.exists():
        names = Drawings.load(work / "drawings.npz").names
        texts = (text for name in names for color in GROUNDS for text in captions(name, color))
        train_tokenizer(texts, recipe.VOCABULARY, recipe.TEXT["max_position_embeddings"]).save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> CLIPTokenizer:
    """Byte-level BPE of at most vocab_size tokens, laid out as CLIP's: bytes, bytes that end a word, merges, specials.

    All bytes are in the vocabulary, so every text has tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = [*alphabet, *(byte + END_OF_WORD for byte in alphabet)]
    special = list(dict.fromkeys(SPECIAL_TOKENS.values()))
    merges = _merges(texts, vocab_size - len(fixed) - len(special))
    tokens = dict.fromkeys([*fixed, *map("".join, merges), *special])
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=model_max_length)


def _merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The `count` most useful merges (Sennrich et al. 2016, arXiv:1508.07909), fewer when all words are one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + count,
        initial_alphabet=alphabet,
        # letters that end a word are an alphabet of their own: numbered here, pairs that are as frequent have one order
        special_tokens=[letter + END_OF_WORD for letter in sorted(alphabet)],
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]][:count]
