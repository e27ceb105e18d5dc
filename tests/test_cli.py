"""The command: what it parses, calls, prints and refuses: with a stand-in for the pipeline, then a tiny real one."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import types
import warnings

import jax
import numpy as np
import pytest
from oracle import MERGES, vocabulary
from PIL import Image
from safetensors.torch import load_file

import sdjax.cli
from sdjax.cli import main, parse_seeds, slug
from sdjax.images import image_grid, read_settings
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.tokenizer import CLIPTokenizer

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"


class StandIn:
    """A pipeline whose picture of seed s has the colour (s, 0, 0); it keeps what it was given."""

    def __init__(self):
        self.calls = []
        self.during = lambda: None
        self.scheduler = types.SimpleNamespace(config={"_class_name": "PNDMScheduler", "skip_prk_steps": True})
        self.unet = types.SimpleNamespace(conv_in=types.SimpleNamespace(kernel=np.zeros(1, np.float32)))

    def from_pretrained(self, model, **options):
        self.calls.append((model, options))
        return self

    def __call__(self, prompt, **options):
        self.calls.append((prompt, options))
        self.during()
        size = (options["width"] or 64, options["height"] or 64)
        return types.SimpleNamespace(images=[Image.new("RGB", size, (seed % 256, 0, 0)) for seed in options["seed"]])


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "sdjax.pipeline", types.SimpleNamespace(StableDiffusionPipeline=stand_in))
    monkeypatch.chdir(tmp_path)
    return stand_in


@pytest.fixture
def run(capsys):
    def run(*args):
        with pytest.raises(SystemExit) as exit_:
            main(list(args))
        output = capsys.readouterr()
        return exit_.value.code, output.out.splitlines(), output.err.splitlines()

    return run


def test_one_picture_named_after_prompt_and_seed(pipeline, run, tmp_path):
    assert run("generate", "A goose, on blue!") == (0, ["a-goose-on-blue-0.png"], [])
    assert pipeline.calls == [
        (None, {"dtype": None, "scheduler": None}),
        (
            "A goose, on blue!",
            {
                "seed": [0],
                "height": None,
                "width": None,
                "negative_prompt": "",
                "num_inference_steps": 50,
                "guidance_scale": 3.0,
                "num_images_per_prompt": 1,
            },
        ),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a-goose-on-blue-0.png"]


def test_options_reach_the_pipeline_and_the_png(pipeline, run):
    options = "--negative red --model folder --seeds 7 --steps 25 --guidance 5 --sampler euler --size 32x48"
    assert run("generate", "鹅 🦢", *options.split(), "--dtype", "bfloat16", "--out", "goose.png") == (
        0,
        ["goose.png"],
        [],
    )
    call = {"negative_prompt": "red", "num_inference_steps": 25, "guidance_scale": 5.0, "height": 48, "width": 32}
    assert pipeline.calls == [
        ("folder", {"dtype": "bfloat16", "scheduler": "euler"}),
        ("鹅 🦢", call | {"seed": [7], "num_images_per_prompt": 1}),
    ]
    settings = read_settings("goose.png")
    assert settings.items() >= (call | {"prompt": "鹅 🦢", "seed": 7, "sampler": "euler", "model": "folder"}).items()
    assert settings["dtype"] == "float32"
    assert settings["scheduler"] == {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    with Image.open("goose.png") as image:
        assert image.text["parameters"].endswith("CFG scale: 5.0, Seed: 7, Size: 32x48, Model: folder")


def test_many_seeds_go_to_a_folder_and_existing_names_are_left_alone(pipeline, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x-1.png").write_bytes(b"precious")
    code, out, err = run("generate", "x", "--seeds", "1,5,8:10", "--out", "out")
    assert (code, err) == (0, [])
    assert out == [os.path.join("out", f"x-{name}.png") for name in ("1-2", "5", "8", "9")]
    assert [read_settings(path)["seed"] for path in out] == [1, 5, 8, 9]
    assert [Image.open(path).getpixel((0, 0)) for path in out] == [(seed, 0, 0) for seed in (1, 5, 8, 9)]
    assert (tmp_path / "out" / "x-1.png").read_bytes() == b"precious"


def test_a_grid_is_one_file_with_a_seed_for_every_cell(pipeline, run):
    assert run("generate", "x", "--grid", "2x3", "--out", "grid.png")[1] == ["grid.png"]
    with Image.open("grid.png") as image:
        assert image.size == (3 * 64, 2 * 64)
        reds = np.array(image)[::64, ::64, 0]
    np.testing.assert_array_equal(reds, [[0, 1, 2], [3, 4, 5]])
    settings = read_settings("grid.png")
    assert (settings["seeds"], settings["grid"], settings["width"]) == ([0, 1, 2, 3, 4, 5], [2, 3], 64)
    assert run("generate", "x", "--grid", "1x2", "--seeds", "3,9")[1] == ["x-3-9-grid.png"]


BAD = {
    "no prompt": ([], "prompt"),
    "steps 0": (["x", "--steps", "0"], "--steps"),
    "steps text": (["x", "--steps", "many"], "--steps"),
    "guidance nan": (["x", "--guidance", "nan"], "--guidance nan"),
    "guidance inf": (["x", "--guidance", "inf"], "--guidance inf"),
    "dtype": (["x", "--dtype", "int8"], "--dtype"),
    "size 0": (["x", "--size", "0x64"], "--size 0x64"),
    "size negative": (["x", "--size", "64x-64"], "--size 64x-64"),
    "size text": (["x", "--size", "large"], "--size large"),
    "grid": (["x", "--grid", "4"], "--grid 4"),
    "grid of fewer": (["x", "--grid", "2x2", "--seeds", "0:3"], "takes 4 pictures; --seeds 0:3 makes 3"),
    "seed negative": (["x", "--seeds", "-1"], "--seeds -1"),
    "seed over 64 bits": (["x", "--seeds", str(2**64)], "2^64 - 1"),
    "seeds empty": (["x", "--seeds", ""], "neither a seed"),
    "seeds backwards": (["x", "--seeds", "5:5"], "'5:5' names no seeds"),
    "seeds twice": (["x", "--seeds", "1,0:3"], "twice"),
    "seeds endless": (["x", "--seeds", f"0:{2**64}"], "more than 10000"),
    "unknown option": (["x", "--seedz", "1"], "--seedz"),
    "out file for many": (["x", "--seeds", "0:2", "--out", "x.png"], "one file for 2 pictures"),
    "out exists": (["x", "--out", "here.png"], "here.png: exists already"),
    "out in no folder": (["x", "--out", "nowhere/x.png"], "no folder nowhere"),
    "out in a file": (["x", "--out", "here.png/x.png"], "no folder here.png"),
    "out is no png": (["x", "--out", "x.jpg"], "neither a .png file nor a folder"),
    "sampler": (["x", "--sampler", "eulr"], "euler"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_any_work(pipeline, run, tmp_path, args, message):
    (tmp_path / "here.png").write_bytes(b"precious")
    code, out, err = run("generate", *args)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: ") and message in err[0]
    assert pipeline.calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]


def test_a_folder_that_cannot_be_written_to(pipeline, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sdjax.cli.os, "access", lambda path, mode: False)  # as root, every folder can
    assert run("generate", "x") == (2, [], ["error: --out .: the folder . cannot be written to"])
    assert pipeline.calls == []


@pytest.mark.parametrize(
    "error", [ValueError("height 65 is not a multiple of 8"), OSError(errno.ENOSPC, "No space left on device", "x.png")]
)
def test_an_error_of_the_library_is_one_line(pipeline, run, tmp_path, error):
    def fail():
        raise error

    pipeline.during = fail
    assert run("generate", "x") == (2, [], [f"error: {error}"])
    assert not list(tmp_path.iterdir())


def test_a_defect_is_not_disguised(pipeline):
    pipeline.during = lambda: [][0]
    with pytest.raises(IndexError):
        main(["generate", "x"])


def test_a_long_prompt_says_what_was_cut(pipeline, run):
    prompt = "goose " * 75 + "and a fox"
    pipeline.during = lambda: CLIPTokenizer(vocabulary(), MERGES)(prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, [warning] = run("generate", prompt, "--out", "x.png")
    assert (code, out) == (0, ["x.png"])
    assert warning == "warning: the prompt is longer than 77 tokens; this part is ignored: 'and a fox'"


def test_the_settings_in_the_png_make_the_picture_again(sd1_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--negative blue --seeds 3,8 --steps 3 --guidance 4 --sampler dpmpp_2m_karras --size 16x32 --grid 1x2"
    arguments = ["generate", "a goose", "--model", str(sd1_folder), *options.split()]
    assert run(*arguments) == (0, ["a-goose-3-8-grid.png"], [])
    settings = read_settings("a-goose-3-8-grid.png")

    pipe = StableDiffusionPipeline.from_pretrained(settings["model"], settings["dtype"], settings["scheduler"])
    names = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale")
    again = pipe(**{name: settings[name] for name in names}, num_images_per_prompt=2, seed=settings["seeds"]).images
    with Image.open("a-goose-3-8-grid.png") as image:
        np.testing.assert_array_equal(image, image_grid(again, *settings["grid"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "30x32"], "width must be a positive multiple of 4, not 30"),
        (["--steps", "1001"], "num_inference_steps=1001"),
        (["--model", "."], "not a checkpoint folder"),
        (["--model", "./nowhere"], "no such folder"),
    ],
)
def test_what_only_the_model_can_refuse(sd1_folder, run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("generate", "x", "--model", str(sd1_folder), *options)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: ") and message in err[0]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit_is_one_line(sd1_folder, run, tmp_path):
    shutil.copytree(sd1_folder, tmp_path / "broken")
    shutil.copy(tmp_path / "broken" / "vae" / UNET_WEIGHTS, tmp_path / "broken" / "unet" / UNET_WEIGHTS)
    code, out, [line] = run("generate", "x", "--model", str(tmp_path / "broken"))
    assert (code, out) == (2, [])
    assert "tensors do not fit: unknown: decoder." in line
    assert "; missing: conv_in.weight [16, 4, 3, 3]" in line


def test_info_counts_parameters_bytes_and_devices(sd1_folder, run):
    code, out, err = run("info", str(sd1_folder))
    assert (code, err) == (0, [])
    parameters = sum(value.numel() for value in load_file(sd1_folder / "unet" / UNET_WEIGHTS).values())
    [unet] = [line.split() for line in out if line.startswith("unet")]
    assert unet[1:6] == ["UNet2DConditionModel", f"{parameters:,}", "parameters", f"{4 * parameters:,}", "bytes"]
    assert sum(line.startswith("device") for line in out) == len(jax.devices())


def test_the_embedded_model_paints_the_asked_background(tmp_path):
    command = "import sys; from sdjax.cli import main; main(sys.argv[1:])"
    arguments = ["generate", "a goose on a blue background", "--out", "goose.png"]
    result = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "goose.png\n"), result.stderr
    with Image.open(tmp_path / "goose.png") as image:
        red, green, blue = np.median(np.array(image)[:4].reshape(-1, 3), axis=0)
    assert blue > red + 50 and blue > green + 20


WAITING = """
import sys, time, types
from sdjax.cli import main
class Pipeline:
    from_pretrained = classmethod(lambda cls, *_, **__: cls())
    def __call__(self, *_, **__):
        print("sampling", flush=True)
        time.sleep(60)
sys.modules["sdjax.pipeline"] = types.SimpleNamespace(StableDiffusionPipeline=Pipeline)
main(["generate", "x"])
"""


def test_ctrl_c_ends_it_with_nothing_written(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WAITING], cwd=tmp_path, text=True, **pipes) as process:
        assert process.stdout.readline() == "sampling\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_help_and_refusals_do_without_jax(tmp_path):
    code = "import sys; from sdjax.cli import main\ntry: main(sys.argv[1:])\nfinally: sys.exit('jax' in sys.modules)"
    for args in (["--help"], ["generate", "--help"], ["generate", "x", "--sampler", "eulr"], ["samplers"]):
        assert subprocess.run([sys.executable, "-c", code, *args], capture_output=True, cwd=tmp_path).returncode == 0, (
            args
        )


def test_samplers_lists_each_on_a_line(run):
    code, out, err = run("samplers")
    assert (code, err) == (0, [])
    names = [line.split()[0] for line in out]
    assert {"ddim", "pndm", "euler", "dpmpp_2m_karras", "unipc", "lcm"} <= set(names)
    assert len(set(names)) == len(names)


def test_version(run):
    assert run("--version") == (0, [sdjax.__version__], [])


def test_seeds():
    assert parse_seeds("7") == [7]
    assert parse_seeds("1, 5,8:11") == [1, 5, 8, 9, 10]
    assert parse_seeds(f"{2**64 - 2}:{2**64}") == [2**64 - 2, 2**64 - 1]


def test_slug():
    assert slug("A goose, on blue!") == "a-goose-on-blue"
    assert slug("🦢 ../..") == "image"
    assert slug("été 鹅") == "été-鹅"
    assert len(f"{slug('鹅' * 300)}-{2**64}-{2**64}-grid-10.png".encode()) <= 255
