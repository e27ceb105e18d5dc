"""The options of a run, from Python and from the command."""

import dataclasses

import pytest

from sdjax.commands.main import main
from sdjax.commands.train import HELP
from sdjax.training.options import FIELDS, METHODS, Options, of_method

NEEDED = {"data": "pictures", "out": "x.safetensors"}


def test_every_field_has_help_and_a_default_that_it_allows():
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(Options)} - {"method"}
    for option in FIELDS.values():
        assert option.help and set(option.of) <= set(METHODS)
        if option.default is not dataclasses.MISSING and option.default is not None:
            assert option.check(option.default) == option.default
    assert HELP.keys() == {*METHODS}


def test_methods_have_only_the_options_that_they_use():
    assert "rank" not in of_method("full") and "class_prompt" not in of_method("lora")
    with pytest.raises(ValueError, match="class_prompt: only with dreambooth"):
        Options.of("lora", **NEEDED, class_prompt="a dog")
    with pytest.raises(ValueError, match="learn_rate: unknown; did you mean learning_rate"):
        Options.of("lora", **NEEDED, learn_rate=1e-4)
    with pytest.raises(ValueError, match="method must be one of lora"):
        Options.of("loras", **NEEDED)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("lora", {"out": None}, "out: is needed"),
        ("lora", {"out": "folder"}, "out: a .safetensors file is what lora makes"),
        ("full", {}, "out: a new folder is what full makes"),
        ("lora", {"format": "peft"}, "out: a new folder is what lora makes"),
        ("lora", {"rank": 0}, "rank must be a whole number, 1 or more"),
        ("lora", {"learning_rate": "fast"}, "learning_rate must be a finite number"),
        ("lora", {"random_flip": "yes"}, "random_flip must be true or false"),
        ("lora", {"keep_tokens": 1}, "keep_tokens: only with shuffle_caption"),
        ("lora", {"lr_warmup_steps": 10}, "lr_warmup_steps: constant has none"),
        ("lora", {"lr_warmup_steps": 1000, "lr_scheduler": "cosine"}, "lr_warmup_steps: 1000 of 1000 steps"),
        ("lora", {"proportion_empty_prompts": 1.5}, "proportion_empty_prompts must be a finite number from 0 to 1"),
        ("lora", {"resume_from_checkpoint": "first"}, "resume_from_checkpoint must be a whole number"),
        ("lora", {"lcm": True, "snr_gamma": 5.0}, "snr_gamma: not with lcm"),
        ("dreambooth", {"class_data_dir": "x"}, "class_data_dir: only with class_prompt"),
        ("textual-inversion", {"placeholder_token": "<x>"}, "placeholder_token, initializer_token: give the word"),
        ("controlnet", {"out": "x", "validation_prompt": "a"}, "validation_prompt: a ControlNet also needs"),
        ("controlnet", {"out": "x", "validation_image": ["a"]}, "validation_image: one for each validation_prompt"),
    ],
)
def test_what_is_wrong_is_named(method, given, message):
    with pytest.raises(ValueError) as error:
        Options.of(method, **(NEEDED | given))
    assert str(error.value).startswith(message)


def test_learning_rates_are_those_of_the_method():
    assert Options.of("lora", **NEEDED).rate == 1e-4
    assert Options.of("dreambooth", data="x", out="dog").rate == 5e-6
    assert Options.of("dreambooth", **NEEDED).rate == 1e-4
    assert Options.of("lora", **NEEDED, learning_rate=0.5).rate == 0.5


def test_the_record_is_json_that_makes_the_same_options():
    options = Options.of("dreambooth", **NEEDED, validation_prompt=["a", "b"], target_modules="to_q", seed=2**64 - 1)
    assert Options.of(**options.record()) == options


def failed(capsys, *args):
    """The line on stderr of a command that has to fail with status 2."""
    with pytest.raises(SystemExit) as error:
        main(["train", *map(str, args)])
    assert error.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_the_command_names_what_is_wrong(capsys, tmp_path):
    out = tmp_path / "x.safetensors"
    assert failed(capsys, "lora", tmp_path) == (
        "error: --out: is needed; where the result goes: a .safetensors file, or of a model a new folder"
    )
    message = "error: --max-train-steps must be a whole number, 1 or more, not 0"
    assert failed(capsys, "lora", tmp_path, "--out", out, "--max-train-steps", 0) == message
    assert failed(capsys, "lora", tmp_path, "--out", out, "--max_train_steps", 0) == message
    assert "No such option: --class-prompt" in failed(capsys, "lora", tmp_path, "--class-prompt", "a dog")
    assert "there is no such folder" in failed(capsys, "lora", tmp_path / "none", "--out", out)
    assert "no pictures in it" in failed(capsys, "lora", tmp_path, "--out", out)
    out.touch()
    assert "exists already" in failed(capsys, "lora", tmp_path, "--out", out)


@pytest.mark.parametrize("method", METHODS)
def test_each_command_has_help(capsys, method):
    with pytest.raises(SystemExit) as error:
        main(["train", method, "--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert all(option.options[0] in shown for name, option in of_method(method).items() if name != "data")
