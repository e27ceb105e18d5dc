"""sdjax.text.tokenizer against transformers' CLIPTokenizer."""

import json
import re
import warnings

import diffusers
import numpy as np
import pytest
import transformers
from oracle import BOS, EOS, MERGES, vocabulary

from sdjax.text.tokenizer import CLIPTokenizer

LENGTH = 16
N = len(vocabulary())

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
    for config in ({}, {"model_max_length": None}, {"model_max_length": 1e30}):
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
            "added tokens do not go on from the .* of the vocabulary: '<cat-toy>' 900",
        ),
        (
            lambda folder: (folder / "added_tokens.json").write_text(json.dumps({"<x>": N, "<y>": N})),
            f"do not go on .* '<x>' {N}, '<y>' {N}",
        ),
        (lambda folder: (folder / "added_tokens.json").write_text("[]"), "added_tokens.json: not a JSON object"),
        (lambda folder: (folder / "added_tokens.json").write_text('{"<x>": null}'), "not as transformers writes them"),
        (change("tokenizer_config.json", added_tokens_decoder=[]), "not as transformers writes them"),
        (change("tokenizer_config.json", added_tokens_decoder={str(N): {}}), "not as transformers writes them"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": null}'), "not a BPE tokenizer"),
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
        "<cat-toy>": (N,),
        "EasyNegative": (N + 1, N + 2, N + 3),
        "easynegative-v2": (N + 4, N + 5),
        "bad hands": (N + 6,),
        "\u00e9tude": (N + 7,),
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


@pytest.mark.parametrize("name", ["<cat>", "<cat>_3", "<cat>_1", "dog"])
def test_a_name_that_diffusers_would_read_with_another_one_is_refused(name):
    tokenizer = added(("<cat>", 3), ("dog_1", 1))
    with pytest.raises(ValueError, match=f"'({name}|{name}_1)' (is a token|would be read as one more vector)"):
        tokenizer.add_token(name, 1)


WORDS = ["<cat-toy>", "<cat>", "<cat>_1", "<cat>_2", "Sks", "<cat-toy>_1", "(b: a:1.2)", "<|pad|>"]
WITH_WORDS = ["<CAT-toy>", "a<cat-toy>blue", "<cat>", "<cat>_1<cat>_2 <cat>_12", "sks, asksa", "(B: a:1.2)", "<|PAD|>"]


def learned(folder, form):
    """A saved tokenizer of transformers' that has learned WORDS, as its versions write one."""
    write_published_layout(folder, EOS)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(WORDS[:-1])
    theirs.add_tokens([transformers.AddedToken(WORDS[-1], special=True)])
    theirs.save_pretrained(folder / "new")
    if form == "tokenizer.json":
        return theirs, folder / "new"
    ids = {word: N + i for i, word in enumerate(WORDS)}
    if form == "added_tokens.json":
        (folder / form).write_text(json.dumps(dict(sorted(ids.items()))))
        change("special_tokens_map.json", additional_special_tokens=[WORDS[-1]])(folder)
    else:
        tokens = {str(id): token.__getstate__() for id, token in theirs.added_tokens_decoder.items()}
        change("tokenizer_config.json", added_tokens_decoder=tokens)(folder)
    return theirs, folder


@pytest.mark.parametrize("form", ["added_tokens.json", "tokenizer.json", "added_tokens_decoder"])
def test_learned_words_of_a_saved_tokenizer(tmp_path, form):
    """A word that has several vectors becomes all of them, as diffusers' pipelines write it out."""
    theirs, folder = learned(tmp_path, form)
    (tmp_path / "again").mkdir()
    ours = CLIPTokenizer.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "again")
    assert len(ours) == len(theirs) == N + len(WORDS)
    assert set(ours.added_tokens) == {"<cat-toy>", "<cat>", "Sks", "(b: a:1.2)", "<|pad|>"}
    readers = [ours, CLIPTokenizer.from_pretrained(tmp_path / "again")]
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path / "again")
    convert = diffusers.loaders.TextualInversionLoaderMixin()._maybe_convert_prompt
    for text in [*WITH_WORDS, *TEXTS]:
        expected = theirs(convert(text, theirs), add_special_tokens=False)["input_ids"]
        assert again(convert(text, again), add_special_tokens=False)["input_ids"] == expected
        if text == WITH_WORDS[0]:  # which diffusers writes out in the word's own case alone
            expected = [N, N + 5]
        assert [reader.encode(text) for reader in readers] == [expected] * 2
    ours.add_token("<dog>", 2)
    assert ours.encode("<dog> <cat>") == [N + 8, N + 9, N + 1, N + 2, N + 3]


def test_a_padding_token_past_the_vocabulary(tmp_path):
    write_published_layout(tmp_path, "<pad>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": N}))
    ours = CLIPTokenizer.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        np.testing.assert_array_equal(ids(CLIPTokenizer.from_pretrained(folder), TEXTS), reference(tmp_path))
    np.testing.assert_array_equal(reference(tmp_path / "again"), reference(tmp_path))


def test_words_of_an_older_transformers_beside_a_config_that_does_not_know_them(tmp_path):
    """It copies the config that it read, and writes added_tokens.json beside it."""
    write_published_layout(tmp_path, EOS)
    change("tokenizer_config.json", added_tokens_decoder={str(N - 1): {"content": EOS, "special": True}})(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat>": N}))
    assert CLIPTokenizer.from_pretrained(tmp_path).encode("a <cat>") == [A, N]


def test_added_tokens_are_saved_as_diffusers_names_them(tmp_path):
    ours = added(("<cat-toy>", 3), ("easynegative", 1))
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "easynegative"]) == [
        *range(N, N + 4)
    ]
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("<cat-toy>", "a <cat-toy>_1", "easynegatives", "easynegative,"):
        assert again.encode(text) == ours.encode(text)
    assert again.added_tokens == ours.added_tokens
