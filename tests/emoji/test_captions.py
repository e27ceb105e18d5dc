"""How drawings are asked for: captions, rounds of scenes, the tokenizer."""

import numpy as np
import pytest
from captions import captions, is_held_out, own_color, pair_captions, with_article
from drawings import PALETTE
from scenes import GROUNDS, one_round
from transformers import CLIPTokenizer as ReferenceTokenizer
from vocabulary import train_tokenizer

PHRASES = """
a goose, an owl, a unicorn, an orange heart, a red apple, a T-Rex, grapes, french fries, an eye, an hourglass done,
an NG button, a VS button, an x-ray, people with bunny ears, a man with a beard, two hearts, a bus, a compass, a dress,
the Statue of Liberty, Santa Claus, an octopus, a kiss between a man and a woman, clapping hands, an SUV
"""


@pytest.mark.parametrize("phrase", PHRASES.replace("\n", " ").strip().split(", "))
def test_articles(phrase):
    name = phrase.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    assert with_article(name) == phrase


def test_captions_name_the_background_or_none():
    assert captions("owl", None)[:2] == ["an owl", "owl"]
    assert captions("grapes", None)[:2] == ["grapes", "grapes"]
    assert captions("goose", "blue")[:2] == ["a goose on a blue background", "goose on a blue background"]
    assert captions("goose", "orange")[0] == "a goose on an orange background"
    assert {len(captions("goose", color, own)) for color in (None, "blue") for own in (None, "gray")} == {6}


def test_captions_can_name_the_drawings_own_colour():
    assert captions("key", "purple", "yellow")[2:4] == [f"{a}yellow key on a purple background" for a in ("a ", "")]
    assert captions("grapes", None, "purple")[2:4] == ["purple grapes"] * 2
    shares = [float(color == "yellow") for color in PALETTE]
    assert own_color("key", shares) == "yellow"
    assert own_color("yellow heart", shares) is None
    assert own_color("Statue of Liberty", shares) is None
    assert own_color("key", [1 / len(PALETTE)] * len(PALETTE)) is None


def test_two_drawings_are_asked_for_from_left_to_right():
    texts = pair_captions(("goose", "eyes"), "blue")
    assert len(texts) == len(captions("goose", "blue"))
    assert texts[:2] == [f"{a}goose and eyes on a blue background" for a in ("a ", "")]


def test_one_pairing_in_ten_is_held_out_but_none_on_white():
    held_out = np.array([[is_held_out(f"name {i}", color) for color in PALETTE] for i in range(500)])
    assert not held_out[:, list(PALETTE).index("white")].any()
    assert held_out.mean() == pytest.approx(0.1 * 11 / 12, abs=0.01)


def test_rounds_show_every_pairing_but_those_held_out():
    names = [f"name {i}" for i in range(20)]
    shown = set()
    for number in range(len(GROUNDS)):
        for scenes in one_round(names, number, batch=8, pairs=2):
            alone = len(scenes.drawings) - len(scenes.beside)
            shown |= {(n, k) for n, k in zip(scenes.drawings[:alone], scenes.grounds[:alone], strict=True)}
            texts = scenes.captions(names, [None] * len(names))
            assert texts[0] == captions(names[scenes.drawings[0]], GROUNDS[scenes.grounds[0]])
            assert names[scenes.beside[-1]] in texts[-1][0]
            for name in (names[scenes.drawings[-1]], names[scenes.beside[-1]]):
                color = GROUNDS[scenes.grounds[-1]]
                assert color is None or not is_held_out(name, color)
    expected = {
        (n, k) for n, name in enumerate(names) for k, c in enumerate(GROUNDS) if not c or not is_held_out(name, c)
    }
    assert shown == expected


TEXTS = ["a goose on a blue background", "", "An OWL", "T-Rex", "snow-capped", "Zürich 42!", "鹅", "it's 3pm"]


def test_the_tokenizer_is_clips(tmp_path):
    corpus = [text for name in ("goose", "T-Rex") for color in (None, *PALETTE) for text in captions(name, color)]
    tokenizer, again = (train_tokenizer(corpus, vocab_size=640, model_max_length=24) for _ in range(2))
    assert tokenizer.vocab == again.vocab
    assert len(tokenizer.vocab) <= 640
    assert {"goose</w>", "background</w>", "purple</w>"} <= tokenizer.vocab.keys()
    tokenizer.save_pretrained(tmp_path)
    reference = ReferenceTokenizer.from_pretrained(tmp_path)
    assert reference.model_max_length == 24
    expected = reference(TEXTS, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(tokenizer(TEXTS), expected)
    assert tokenizer.vocab["<|endoftext|>"] == len(tokenizer.vocab) - 1  # what CLIPTextModel pools at
