"""sdjax.text.prompts: the web UI's documented examples, closed forms, and texts at random."""

import random
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import BOS, EOS, MERGES, normal, vocabulary

from sdjax.text import prompts
from sdjax.text.prompts import BREAK
from sdjax.text.tokenizer import CLIPTokenizer, words_pattern

N = len(vocabulary())
START, END = vocabulary()[BOS], vocabulary()[EOS]
A, B, C, D, COMMA, GOOSE = (vocabulary()[f"{token}</w>"] for token in ("a", "b", "c", "d", ",", "goose"))


def tokenizer(length=77, **options):
    return CLIPTokenizer(vocabulary(), MERGES, model_max_length=length, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the examples that the web UI documents
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *[("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55)],
                *[(", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
            ],
        ),
        ("", []),
        ("()[]", []),
        ("((word))", [("word", 1.21)]),
        ("[word]", [("word", 1 / 1.1)]),
        ("[[a] b", [("a", 1 / 1.21), (" b", 1 / 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("(a:1.3) (b:.5) (c:+2) (d:-1.)", [("a", 1.3), (" ", 1), ("b", 0.5), (" ", 1), ("c", 2), (" ", 1), ("d", -1)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:1.3", [("a:1.3", 1.1)]),
        ("a:1.3)", [("a:1.3)", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("a) ] b", [("a) ] b", 1)]),
        (r"\\ \( \) \[ \] \x \ ", [(r"\ ( ) [ ] x  ", 1)]),
        (r"(a \(b:1.4\):1.2)", [("a (b:1.4)", 1.2)]),
        ("9:16 | 3:4, [a] | [b:c]", [("9:16 | 3:4, ", 1), ("a", 1 / 1.1), (" | ", 1), ("b:c", 1 / 1.1)]),
        ("a:b:0.5] | c", [("a:b:0.5] | c", 1)]),
        ("[a|b:0.5", [("a|b:0.5", 1 / 1.1)]),
        ("a BREAK b", [("a ", 1), BREAK, (" b", 1)]),
        ("(a BREAK (b:2) BREAK):0.5", [("a ", 1.1), BREAK, (" ", 1.1), ("b", 2.2), (" ", 1.1), BREAK, (":0.5", 1)]),
        ("BREAK[]BREAK", [BREAK, BREAK]),
        (r"<lora> <lora\:x> <cat:1> lora:x", [("<lora> <lora:x> <cat:1> lora:x", 1)]),
        ("break OUTBREAK BREAKS band and", [("break OUTBREAK BREAKS band and", 1)]),
    ],
)
def test_texts_and_their_weights(text, expected):
    pieces = prompts.parse(text)
    assert [piece[0] for piece in pieces] == [piece[0] for piece in expected]
    np.testing.assert_allclose([piece[1] for piece in pieces], [piece[1] for piece in expected], rtol=1e-12)
    assert [piece is BREAK for piece in pieces] == [piece is BREAK for piece in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [cat:dog:0.5] b", r"^'\[cat:dog:0.5\]': prompt editing is not supported"),
        ("[cat:10]", r"^'\[cat:10\]': prompt editing"),
        ("([cat::.25])", r"^'\[cat::.25\]': prompt editing"),
        ("[a: (b:1.2): 3]", r"^'\[a: \(b:1.2\): 3\]': prompt editing"),
        ("a [cat|dog] b", r"^'\[cat\|dog\]': alternation is not supported"),
        ("[a|(b:1.1)]", "alternation"),
        ("a cat AND a dog", r"^'a cat AND a dog': AND is not supported but between prompts"),
        ("(a <lora:style:0.8> cat)", r"^'<lora:style:0.8>': a prompt does not load networks; .* load_lora"),
        ("<lyco:x>", r"^'<lyco:x>': a prompt"),
        ("a, <hypernet:x y:1>", r"^'<hypernet:x y:1>': a prompt"),
    ],
)
def test_what_is_not_supported_is_named(text, message):
    for call in (prompts.parse, lambda text: prompts.chunks(tokenizer(), text)):
        with pytest.raises(ValueError, match=message):
            call(text)


def test_texts_at_random():
    """Nothing raises but what is not supported; without brackets the words stay as they are; escaped, all signs do."""
    signs = ["(", ")", "[", "]", ":", "|", "\\", "1.3", ".", "-", " ", "a", "BREAK", "AND", ",", "\n", "é", "ANDY"]
    generator = random.Random(0)
    refused = 0
    for _ in range(3000):
        text = "".join(generator.choices(signs, k=generator.randrange(16)))
        try:
            pieces = prompts.parse(text)
        except ValueError as error:
            assert "is not supported" in str(error)
            assert "AND" in text or "[" in text
            refused += 1
        else:
            weights = [weight for _, weight in pieces]
            assert np.isfinite(weights).all()
            kept = [sign for sign in text if sign not in "()[]\\:.-13"]
            assert [sign for piece, _ in pieces for sign in piece if sign not in "()[]\\:.-13"] == kept
        plain = text.replace("BREAK", "").replace("AND", "")
        escaped = "".join(f"\\{sign}" if sign in "()[]\\" else sign for sign in plain)
        assert "".join(piece for piece, _ in prompts.parse(escaped)) == plain
        assert {weight for _, weight in prompts.parse(escaped)} <= {1.0}
    assert 100 < refused < 1500


@pytest.mark.parametrize("options", [{}, {"special_tokens": {"pad_token": "!"}}])
def test_a_short_plain_text_is_one_chunk_as_the_tokenizer_gives_it(options):
    own = tokenizer(**options)
    for text in ["", "a goose, a blue goose!", r"a goose: 9:16 | b", "goose " * 75]:
        ids, weights = prompts.chunks(own, text)
        assert ids.dtype == np.int32 and weights.dtype == np.float32
        np.testing.assert_array_equal(ids, own(text))
        np.testing.assert_array_equal(weights, np.ones((1, 77)))


def test_weights_belong_to_the_tokens_of_their_words():
    ids, weights = prompts.chunks(tokenizer(10), "a (goose, b:1.5) [c]")
    np.testing.assert_array_equal(ids, [[START, A, GOOSE, COMMA, B, C, END, END, END, END]])
    np.testing.assert_allclose(weights, [[1, 1, 1.5, 1.5, 1.5, 1 / 1.1, 1, 1, 1, 1]], rtol=1e-7)


def contents(own, text):
    """The ids of each chunk between bos and the first eos."""
    ids, _ = prompts.chunks(own, text)
    assert (ids[:, 0] == START).all() and (ids == END).any(axis=1).all()
    return [row[1 : row.index(END)] for row in ids.tolist()]


def test_a_long_text_has_several_chunks():
    assert contents(tokenizer(), "goose " * 76) == [[GOOSE] * 75, [GOOSE]]
    assert contents(tokenizer(), "goose " * 150) == [[GOOSE] * 75] * 2
    ids, weights = prompts.chunks(tokenizer(), "goose " * 70 + "(goose goose:1.2) " * 5)
    assert ids.shape == weights.shape == (2, 77)
    np.testing.assert_allclose(weights[0, 71:], [*[1.2] * 5, 1], rtol=1e-6)
    np.testing.assert_allclose(weights[1], [1, *[1.2] * 5, *[1] * 71], rtol=1e-6)
    np.testing.assert_array_equal(ids[1, :8], [START, *[GOOSE] * 5, END, END])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a BREAK b", [[A], [B]]),
        ("a BREAK BREAK b", [[A], [], [B]]),
        ("BREAK a", [[], [A]]),
        ("a BREAK", [[A]]),
        ("BREAK", [[]]),
        ("(a BREAK b)", [[A], [B]]),
        ("a break", [[A, *(vocabulary()[letter] for letter in "brea"), vocabulary()["k</w>"]]]),
    ],
)
def test_break_ends_a_chunk(text, expected):
    assert contents(tokenizer(), text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # a comma is the last token that fits; among the last; the last that is near; too far; the next; none is needed
        ("goose " * 74 + ", a", [[GOOSE] * 74 + [COMMA], [A]]),
        ("goose " * 70 + ", a b c d a b", [[GOOSE] * 70 + [COMMA], [A, B, C, D, A, B]]),
        ("goose " * 55 + "," + " b" * 20, [[GOOSE] * 55 + [COMMA], [B] * 20]),
        ("goose " * 54 + "," + " b" * 21, [[GOOSE] * 54 + [COMMA] + [B] * 20, [B]]),
        ("goose " * 72 + ", a b, c", [[GOOSE] * 72 + [COMMA, A, B], [COMMA, C]]),
        ("goose " * 71 + ", a b c", [[GOOSE] * 71 + [COMMA, A, B, C]]),
    ],
)
def test_a_full_chunk_ends_after_a_near_comma(text, expected):
    assert contents(tokenizer(), text) == expected


def test_weights_move_with_their_words():
    _, weights = prompts.chunks(tokenizer(), "goose " * 70 + ", (a:1.5) b c d a b")
    np.testing.assert_array_equal(weights[:, 1:3], [[1, 1], [1.5, 1]])
    np.testing.assert_array_equal(weights[0], np.ones(77))


def test_the_vectors_of_an_added_token_stay_in_one_chunk():
    own = tokenizer(8)
    own.add_token("<toy>", 4)
    own.add_token("<wide>", 8)
    toy, wide = [*range(N, N + 4)], [*range(N + 4, N + 12)]
    assert contents(own, "a <toy> b") == [[A, *toy, B]]
    assert contents(own, "a b c <toy> d") == [[A, B, C], [*toy, D]]
    assert contents(own, "<toy><toy>") == [toy, toy]
    assert contents(own, "a b c d, a <toy>") == [[A, B, C, D, COMMA], [A, *toy]]
    assert contents(own, "a <wide> b") == [[A, *wide[:5]], [*wide[5:], B]]
    _, weights = prompts.chunks(own, "a (<toy>:1.2)")
    np.testing.assert_allclose(weights, [[1, 1, 1.2, 1.2, 1.2, 1.2, 1, 1]])


def test_a_batch_has_equally_many_chunks():
    own = tokenizer(6)
    texts = ["a", "a b c d a b c d a", "", "(a:1.5) BREAK b"]
    ids, weights = prompts.batch(own, [prompts.chunks(own, text) for text in texts], 3)
    assert ids.shape == weights.shape == (4, 3, 6)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    for text, own_ids, own_weights in zip(texts, ids, weights, strict=True):
        alone, alone_weights = prompts.chunks(own, text)
        np.testing.assert_array_equal(own_ids[: len(alone)], alone)
        np.testing.assert_array_equal(own_weights[: len(alone)], alone_weights)
        np.testing.assert_array_equal(own_ids[len(alone) :], np.repeat(own(""), 3 - len(alone), axis=0))
        np.testing.assert_array_equal(own_weights[len(alone) :], np.ones((3 - len(alone), 6)))
    assert prompts.batch(own, [], 1)[0].shape == (0, 1, 6)


def test_no_text_is_too_long_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts.chunks(tokenizer(), "goose " * 1000)


def test_weighted_states_keep_the_mean_of_each_row():
    states, weights = normal(3, 5, 4) + 0.3, np.array([[1, 1.3, 0.5, 1, 1], [1] * 5, [1, 1, -1, 2, 1]], np.float32)
    result = np.asarray(jax.jit(prompts.weighted)(states, weights), np.float64)
    scaled = states.astype(np.float64) * weights[..., None]
    expected = scaled * (states.mean((1, 2)) / scaled.mean((1, 2)))[:, None, None]
    np.testing.assert_allclose(result, expected, rtol=1e-4)
    np.testing.assert_allclose(result.mean((1, 2)), states.mean((1, 2)), rtol=1e-4)
    alone = prompts.weighted(states[2:], weights[2:])
    np.testing.assert_allclose(result[2:], alone, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weights_of_one_change_nothing(dtype):
    states = jnp.asarray(normal(3, 77, 8), dtype)
    states = states.at[1].add(-states[1].mean()).at[2].set(0)  # a mean of 0 as well
    result = jax.jit(prompts.weighted)(states, jnp.ones((3, 77)))
    assert result.dtype == dtype
    np.testing.assert_array_equal(np.asarray(result), np.asarray(states))
    gradient = jax.grad(lambda x: (prompts.weighted(x, jnp.ones((3, 77))) ** 2).sum().astype(jnp.float32))(states)
    np.testing.assert_allclose(gradient.astype(jnp.float32), 2 * states.astype(jnp.float32))
    mixed = prompts.weighted(states, jnp.ones((3, 77)).at[0, 3].set(1.5))
    assert mixed.dtype == dtype
    np.testing.assert_array_equal(np.asarray(mixed[1:]), np.asarray(states[1:]))


@pytest.mark.parametrize("opened", ["(", "[", "(a:"])
def test_brackets_nest_a_hundred_deep(opened):
    prompts.parse(100 * opened + "x")
    with pytest.raises(ValueError, match=r"more than 100 . open at once"):
        prompts.parse(101 * opened + "x")


@pytest.mark.parametrize("text", ["ab c", "(ab:1.5)", "|", "\\(", "BREAK ", "<lora", "é"])
def test_a_text_of_tens_of_thousands_of_words_is_read_in_linear_time(text):
    def seconds(words):
        begun = time.process_time()
        prompts.chunks(tokenizer(), text * words)
        return time.process_time() - begun

    few, many = min(seconds(4000) for _ in range(3)), seconds(32000)
    assert many < 4 * 8 * few + 0.1


def test_a_word_of_half_characters_is_named():
    with pytest.raises(ValueError, match=r"the word 'a\\udcff' is not of whole characters"):
        words_pattern(["a\udcff"])
    with pytest.raises(ValueError, match="is not of whole characters"):
        tokenizer().check_new("a\udcff", 1)
