"""sdjax.text.tokenizer against transformers' CLIPTokenizer."""

import json
import re
import warnings

import numpy as np
import pytest
import transformers
from oracle import BOS, EOS, MERGES, vocabulary

from sdjax.text.tokenizer import CLIPTokenizer

LENGTH = 16

TEXTS = [
    "",
    " \t\n ",
    "a goose",
    "A  GOOSE,\non a\tblue\u3000background!",
    "it's what they've said; I'll, you'd, we're, 'S",
    "2026 \uff14\uff15 ½ ²",
    "café CAFE\u0301 \u212b",
    "\u0130stanbul \u1e9e \u01c5",
    "日本語",
    "🦢🏽",
    "a\x00b\x07c\x7f",
    "\ufeffa\u200bb\u00adc",
    "!! wow!",
    "snake_case kebab-case",
    f"{EOS} a {BOS.upper()}b",
    "goose " * 40,
    "!" * 40,
]


def write_published_layout(folder, pad_token):
    """The files of the tokenizer folders of Stable Diffusion 1 (pad_token=EOS) and 2 (pad_token="!")."""
    fields = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {name: {"content": token, **fields} for name, token in [("bos_token", BOS), ("eos_token", EOS)]}
    special["unk_token"] = special["eos_token"]
    config = {name: {"__type": "AddedToken", **token} for name, token in special.items()}
    config |= {"model_max_length": LENGTH, "pad_token": EOS, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad_token}))
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n", encoding="utf-8")


def reference(folder) -> np.ndarray:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return tokenizer(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")["input_ids"]


def ids(tokenizer, texts) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the prompt is longer")
        return tokenizer(texts)


@pytest.mark.parametrize("pad_token", [EOS, "!"])
def test_ids_of_published_files_are_those_of_transformers(tmp_path, pad_token):
    write_published_layout(tmp_path, pad_token)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    result = ids(tokenizer, TEXTS)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, reference(tmp_path))
    assert tokenizer.pad_token_id == vocabulary()[pad_token]


@pytest.mark.parametrize("pad_token", [EOS, "!"])
def test_tokenizer_json_reads_as_transformers_reads_it(tmp_path, pad_token):
    write_published_layout(tmp_path, pad_token)
    transformers.CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").exists() and not (tmp_path / "saved" / "vocab.json").exists()
    np.testing.assert_array_equal(ids(CLIPTokenizer.from_pretrained(tmp_path / "saved"), TEXTS), reference(tmp_path))


@pytest.mark.parametrize("pad_token", [EOS, "!"])
def test_saved_files_read_the_same_here_and_in_transformers(tmp_path, pad_token):
    write_published_layout(tmp_path, pad_token)
    CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "model" / "tokenizer")
    expected = reference(tmp_path)
    np.testing.assert_array_equal(reference(tmp_path / "model" / "tokenizer"), expected)
    np.testing.assert_array_equal(
        ids(CLIPTokenizer.from_pretrained(tmp_path / "model", subfolder="tokenizer"), TEXTS), expected
    )


def test_one_text_is_a_batch_of_one():
    tokenizer = CLIPTokenizer(vocabulary(), MERGES, model_max_length=6)
    start, goose, end = (vocabulary()[token] for token in (BOS, "goose</w>", EOS))
    np.testing.assert_array_equal(tokenizer("goose"), [[start, goose, end, end, end, end]])
    assert tokenizer([]).shape == (0, 6)


def test_the_part_that_does_not_fit_is_named_in_the_words_of_the_prompt():
    tokenizer = CLIPTokenizer(vocabulary(), MERGES, model_max_length=5)
    assert tokenizer.truncated("goose  GOOSE goose") == ""
    assert tokenizer.truncated("goose  GOOSE goose Goose, goosé") == "Goose, goosé"
    with pytest.warns(UserWarning, match=r"longer than 5 tokens.*'Goose, goosé'"):
        tokenizer(["goose", "goose goose goose Goose, goosé"])


def test_model_max_length_is_77_where_the_files_do_not_say(tmp_path):
    write_published_layout(tmp_path, EOS)
    for config in ({}, {"model_max_length": 1e30}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert CLIPTokenizer.from_pretrained(tmp_path).model_max_length == 77


def change(name, **fields):
    def edit(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "vocab.json").unlink(), "vocab.json"),
        (lambda folder: (folder / "merges.txt").unlink(), "merges.txt"),
        (lambda folder: (folder / "merges.txt").write_text("x yz\n"), "do not fit together.*yz"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "vocab.json: not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "Other"}}'), "not a BPE tokenizer"),
        (change("special_tokens_map.json", pad_token="<pad>"), "pad_token '<pad>'"),
        (
            change("tokenizer_config.json", added_tokens_decoder={"900": {"content": "<cat-toy>"}}),
            "added tokens outside the vocabulary.*<cat-toy>",
        ),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path, damage, message):
    write_published_layout(tmp_path, EOS)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        CLIPTokenizer.from_pretrained(tmp_path)


def added(*tokens):
    """A tokenizer with (name, vectors) added."""
    tokenizer = CLIPTokenizer(vocabulary(), MERGES, model_max_length=LENGTH)
    for name, vectors in tokens:
        tokenizer.add_token(name, vectors)
    return tokenizer


N = len(vocabulary())
GOOSE, BLUE, A, COMMA = (vocabulary()[f"{token}</w>"] for token in ("goose", "blue", "a", ","))


def test_encode_gives_the_ids_of_the_text_alone():
    assert added().encode("a Goose, blue") == [A, GOOSE, COMMA, BLUE]
    assert added().encode("") == []
    assert added().encode("goose " * 40) == [GOOSE] * 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<Cat-Toy>", [N]),
        ("a<cat-toy>blue", [A, N, BLUE]),
        ("EASYNEGATIVE, goose", [N + 1, N + 2, N + 3, COMMA, GOOSE]),
        ("goose,EasyNegative,", [GOOSE, COMMA, N + 1, N + 2, N + 3, COMMA]),
        ("easynegative <cat-toy> easynegative", [N + 1, N + 2, N + 3, N, N + 1, N + 2, N + 3]),
        ("goose easynegative-v2 blue", [GOOSE, N + 4, N + 5, BLUE]),
        ("bad \n Hands", [N + 6]),
        ("E\u0301TUDE", [N + 7]),
    ],
)
def test_added_tokens_become_their_own_ids(text, expected):
    names = [("<cat-toy>", 1), ("EasyNegative", 3), ("easynegative-v2", 2), ("bad hands", 1), ("\u00e9tude", 1)]
    tokenizer = added(*names)
    assert tokenizer.encode(text) == expected
    np.testing.assert_array_equal(tokenizer(text)[0, 1 : len(expected) + 2], [*expected, vocabulary()[EOS]])
    assert tokenizer.added_tokens == {
        "<cat-toy>": range(N, N + 1),
        "EasyNegative": range(N + 1, N + 4),
        "easynegative-v2": range(N + 4, N + 6),
        "bad hands": range(N + 6, N + 7),
        "\u00e9tude": range(N + 7, N + 8),
    }


@pytest.mark.parametrize("text", ["veryeasynegative", "easynegative2", "easynegatives", "easynegative_a", "cat-toy"])
def test_a_plain_name_is_found_as_a_whole_word_only(text):
    assert added(("easynegative", 2), ("<cat-toy>", 1)).encode(text) == added().encode(text)


def test_a_token_of_one_vector_reads_as_transformers_reads_it(tmp_path):
    """Added there as diffusers adds it."""
    write_published_layout(tmp_path, EOS)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<cat-toy>", "<blue>"])
    ours = CLIPTokenizer.from_pretrained(tmp_path)
    ours.add_token("<cat-toy>", 1)
    ours.add_token("<blue>", 1)
    for text in ["<cat-toy>", "a <cat-toy> on <blue>, goose", "goose<blue>goose", "<blue", *TEXTS]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_a_long_text_with_added_tokens_is_cut_and_named():
    tokenizer = added(("<wide>", 9))
    text = "goose goose goose goose goose goose <wide> goose"
    with pytest.warns(UserWarning, match="'<wide> goose'"):
        ids = tokenizer(text)
    np.testing.assert_array_equal(ids[0, 1:-1], [GOOSE] * 6 + list(range(N, N + 8)))
    assert tokenizer.truncated(text) == "<wide> goose"


@pytest.mark.parametrize("name", ["", " ", " toy", "goose", "Goose", "bl", "a", EOS, "easynegative", "EASYnegative"])
def test_a_name_that_cannot_be_added_is_refused(name):
    tokenizer = added(("EasyNegative", 2))
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        tokenizer.add_token(name, 2)
    with pytest.raises(ValueError, match="'<x>' needs at least one vector, not 0"):
        tokenizer.add_token("<x>", 0)
    assert list(tokenizer.added_tokens) == ["EasyNegative"] and tokenizer.encode("<x> blur") == added().encode(
        "<x> blur"
    )


def test_added_tokens_are_not_saved(tmp_path):
    added(("<cat-toy>", 2)).save_pretrained(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path).encode("<cat-toy>") == added().encode("<cat-toy>")
    assert len(transformers.CLIPTokenizer.from_pretrained(tmp_path)) == N
