"""The command: what it parses, calls, prints and refuses: with a stand-in for the pipeline, then a tiny real one."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import diffusers
import jax
import numpy as np
import oracle
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import sdjax.commands.main
from sdjax.commands.main import main
from sdjax.commands.options import parse_embeddings
from sdjax.models import AutoencoderKLConfig, UNet2DConditionConfig
from sdjax.pictures.grids import image_grid
from sdjax.pictures.metadata import read_settings, slug
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import Request
from sdjax.request.values import parse_lora
from sdjax.sampling import from_config

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


VAE = {
    "block_out_channels": (32,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


class StandIn:
    """A pipeline whose picture of seed s has the colour (s, 0, 0); it keeps what it was given."""

    def __init__(self):
        self.config = {}
        self.calls = []
        self.during = lambda: None
        self.scheduler = types.SimpleNamespace(config={"_class_name": "PNDMScheduler", "skip_prk_steps": True})
        layer, config = types.SimpleNamespace(kernel=np.zeros(1, np.float32)), UNet2DConditionConfig(sample_size=8)
        self.unet = types.SimpleNamespace(conv_in=layer, config=config)
        self.vae = types.SimpleNamespace(config=AutoencoderKLConfig(**VAE))
        self.guidance_scale = 7.5
        self.flagged = None
        self.not_finite = ()

    def from_pretrained(self, model, **options):
        self.calls.append((model, options))
        return self

    def load_lora(self, path, weight, name):
        self.calls.append((path, weight))

    def load_textual_inversion(self, path, token):
        self.calls.append((path, token))
        return token

    def sample(self, requests):
        self.calls.append(requests)
        self.during()
        sizes = [(request.width or 64, request.height or 64) for request in requests]
        pictures = [Image.new("RGB", size, (r.seed % 256, 0, 0)) for size, r in zip(sizes, requests, strict=True)]
        not_finite = [request.seed in self.not_finite for request in requests]
        return types.SimpleNamespace(images=pictures, nsfw_content_detected=self.flagged, not_finite=not_finite)


LOADED = {"scheduler": None}


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
    assert pipeline.calls == [(None, LOADED), [Request("A goose, on blue!")]]
    assert [path.name for path in tmp_path.iterdir()] == ["a-goose-on-blue-0.png"]


def test_a_path_that_the_terminal_has_no_letters_for_is_printed(pipeline, tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "x", "--out", "grün.png"])
    out.flush()
    assert (exit_.value.code, out.buffer.getvalue()) == (0, b"gr\\xfcn.png\n")


def test_options_reach_the_pipeline_and_the_png(pipeline, run):
    options = "--negative red --model folder --seeds 7 --steps 25 --guidance 5 --sampler euler --size 32x48"
    assert run("generate", "鹅 🦢", *options.split(), "--dtype", "bfloat16", "--out", "goose.png") == (
        0,
        ["goose.png"],
        [],
    )
    call = {"negative_prompt": "red", "num_inference_steps": 25, "guidance_scale": 5.0, "height": 48, "width": 32}
    assert pipeline.calls == [
        ("folder", LOADED | {"dtype": "bfloat16", "scheduler": "euler"}),
        [Request("鹅 🦢", **call, seed=7, scheduler="euler")],
    ]
    settings = read_settings("goose.png")
    assert settings.items() >= (call | {"prompt": "鹅 🦢", "seed": 7, "sampler": "euler", "model": "folder"}).items()
    assert settings["dtype"] == "float32"
    assert settings["scheduler"] == {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    with Image.open("goose.png") as image:
        assert image.text["parameters"].endswith("CFG scale: 5.0, Seed: 7, Size: 32x48, Model: folder")


def test_what_the_model_predicts_can_be_said(pipeline, run):
    assert run("generate", "x", "--prediction-type", "v_prediction", "--out", "x.png") == (0, ["x.png"], [])
    assert pipeline.calls[0] == (None, LOADED | {"prediction_type": "v_prediction"})
    assert read_settings("x.png")["prediction_type"] == "v_prediction"
    code, _, [line] = run("generate", "x", "--prediction-type", "flow")
    assert code == 2 and "'flow' is not one of 'epsilon', 'v_prediction', 'sample'" in line


def test_what_the_model_predicts_goes_before_what_a_folder_says(one_level_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = ("--prediction-type", "v_prediction")
    assert run("convert", str(one_level_folder), "new", *option)[0] == 0
    assert json.loads(Path("new/scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    for source, options, expected in (
        (one_level_folder, (), "epsilon"),
        (one_level_folder, option, option[1]),
        ("new", (), option[1]),
    ):
        [line] = [line for line in run("info", str(source), *options)[1] if line.startswith("scheduler")]
        assert line.split()[1:] == ["PNDMScheduler", expected]
    job = ("batch", "--prompt", "x", "--model", str(one_level_folder), "--size", "16x32", "--steps", "1", "--quiet")
    assert run(*job, "--batch", "1", "--out", "out", *option)[0] == 0
    [picture] = Path("out").rglob("*.png")
    settings = read_settings(picture)
    assert settings["scheduler"]["prediction_type"] == settings["prediction_type"] == "v_prediction"


def test_what_is_added_to_a_model_reaches_the_pipeline_and_the_png(pipeline, run, tmp_path):
    for name in ("style.safetensors", "more.safetensors"):
        (tmp_path / name).touch()
    for name, token in (("cat.pt", "<cat>"), ("dog.pt", "<dog>"), ("*.pt", "*")):
        torch.save({token: torch.zeros(24)}, tmp_path / name)
    options = "--variant fp16 --revision main --vae other.safetensors --clip-skip 1 --noise cuda --no-safety-checker"
    added = "--lora style.safetensors:0.8 --lora more.safetensors --embedding cat.pt --embedding dog.pt"
    added += " --embedding *.pt:[cat:2]"
    code, _, err = run(
        "generate", "a <Cat> [cat:2]", *options.split(), *added.split(), "--model", "folder", "--out", "x.png"
    )
    assert (code, err) == (0, ["warning: --embedding dog.pt: its word '<dog>' is in no prompt"])
    replaced = {"vae": "other.safetensors", "safety_checker": None}
    loras = (("more.safetensors", 1.0), ("style.safetensors", 0.8))
    assert pipeline.calls == [
        ("folder", LOADED | {"variant": "fp16", "revision": "main"} | replaced),
        *loras,
        ("cat.pt", "<cat>"),
        ("dog.pt", "<dog>"),
        ("*.pt", "[cat:2]"),
        [Request("a <Cat> [cat:2]", clip_skip=1, noise="cuda", loras=loras)],
    ]
    assert (
        read_settings("x.png").items()
        >= {
            "variant": "fp16",
            "revision": "main",
            **replaced,
            "loras": {"style.safetensors": 0.8, "more.safetensors": 1.0},
            "embeddings": {"cat.pt": "<cat>", "dog.pt": "<dog>", "*.pt": "[cat:2]"},
            "clip_skip": 1,
            "noise": "cuda",
            "guidance_scale": 7.5,
        }.items()
    )
    with Image.open("x.png") as image:
        assert image.text["parameters"].endswith("Model: folder, VAE: other.safetensors, Clip skip: 2, RNG: NV")


def test_work_that_is_traded_for_time_reaches_the_pipeline_and_the_png(pipeline, run):
    options = "--guidance-interval 0.3:5 --cache-interval 3 --vae-tiling --out x.png"
    assert run("generate", "x", *options.split())[0] == 0
    traded = {"guidance_interval": (0.3, 5.0), "cache_interval": 3, "vae_tiling": True}
    assert pipeline.calls[-1] == [Request("x", **traded)]
    assert read_settings("x.png").items() >= (traded | {"guidance_interval": "0.3:5.0"}).items()


def test_the_spacing_of_timesteps_is_of_the_scheduler_and_in_the_png(pipeline, run):
    assert run("generate", "x", "--spacing", "trailing", "--out", "x.png") == (0, ["x.png"], [])
    settings = read_settings("x.png")
    assert settings["timestep_spacing"] == settings["scheduler"]["timestep_spacing"] == "trailing"
    theirs = diffusers.PNDMScheduler.from_config(settings["scheduler"])
    theirs.set_timesteps(5)
    np.testing.assert_array_equal(from_config(settings["scheduler"]).timesteps(5), theirs.timesteps)


def test_a_sampler_keeps_the_spacing_that_is_asked_for(one_level_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--sampler euler --spacing trailing --steps 2 --size 16x16 --out x.png"
    assert run("generate", "x", "--model", str(one_level_folder), *options.split()) == (0, ["x.png"], [])
    settings = read_settings("x.png")
    assert (settings["sampler"], settings["scheduler"]["_class_name"]) == ("euler", "EulerDiscreteScheduler")
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder, scheduler=settings["scheduler"])
    again = pipe("x", height=16, width=16, num_inference_steps=2).images[0]
    with Image.open("x.png") as image:
        np.testing.assert_array_equal(image, again)
    plain = pipe("x", height=16, width=16, num_inference_steps=2, scheduler=from_config("euler")).images[0]
    assert (np.asarray(plain) != np.asarray(again)).any()


@pytest.mark.filterwarnings("default:old. outdated configs")
def test_an_outdated_folder_is_one_line(one_level_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(one_level_folder, tmp_path / "old")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"steps_offset": 1', '"steps_offset": 0'))
    code, out, [line] = run("generate", "x", "--model", "old", "--steps", "1", "--size", "16x16")
    assert (code, out) == (0, ["x-0.png"])
    assert line == "warning: old: outdated configs, read as PyTorch does: steps_offset 1 instead of 0"


def test_what_is_not_asked_for_is_not_in_the_png(pipeline, run):
    run("generate", "x", "--out", "x.png")
    absent = {"variant", "revision", "vae", "loras", "embeddings", "clip_skip", "noise", "safety_checker"}
    absent |= {"guidance_interval", "cache_interval", "vae_tiling", "timestep_spacing"}
    assert not absent & read_settings("x.png").keys()
    assert read_settings("x.png")["negative_prompt"] is None


def test_black_pictures_are_explained(pipeline, run):
    pipeline.flagged = [True, False, True]
    code, out, err = run("generate", "x", "--seeds", "0:3")
    assert (code, len(out)) == (0, 3)
    assert err == ["warning: the safety checker made 2 of 3 pictures black"]


def test_pictures_that_are_not_finite_are_not_written(pipeline, run):
    pipeline.not_finite = {1, 2}
    code, out, err = run("generate", "x", "--seeds", "0:4")
    assert (code, out) == (1, ["x-0.png", "x-3.png"])
    [line] = err
    assert line.startswith("error: 2 of 4 pictures not finite (seed 1, 2): ") and "try dtype" in line


@pytest.mark.parametrize(("not_finite", "written"), [({1}, ["x-0-3-grid.png"]), ({0, 1, 2, 3}, [])])
def test_a_grid_of_which_pictures_are_not_finite(pipeline, run, not_finite, written):
    pipeline.not_finite = not_finite
    code, out, err = run("generate", "x", "--grid", "2x2")
    assert (code, out, len(err)) == (1, written, 1)


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
    "guidance nan": (["x", "--guidance", "nan"], "--guidance must be a finite number"),
    "guidance inf": (["x", "--guidance", "inf"], "--guidance must be a finite number"),
    "dtype": (["x", "--dtype", "int8"], "--dtype"),
    "size 0": (["x", "--size", "0x64"], "--size 0x64"),
    "size negative": (["x", "--size", "64x-64"], "--size 64x-64"),
    "size text": (["x", "--size", "large"], "--size large"),
    "grid": (["x", "--grid", "4"], "--grid 4"),
    "grid of fewer": (["x", "--grid", "2x2", "--seeds", "0:3"], "takes 4 pictures; --seeds makes 3"),
    "seed negative": (["x", "--seeds", "-1"], "--seeds -1"),
    "seed over 64 bits": (["x", "--seeds", str(2**64)], "2^64 - 1"),
    "seeds empty": (["x", "--seeds", ""], "neither a seed"),
    "seeds backwards": (["x", "--seeds", "5:5"], "'5:5' names no seeds"),
    "seeds twice": (["x", "--seeds", "1,0:3"], "twice"),
    "seeds endless": (["x", "--seeds", f"0:{2**64}"], "more than 10,000,000 seeds"),
    "unknown option": (["x", "--seedz", "1"], "--seedz"),
    "out file for many": (["x", "--seeds", "0:2", "--out", "x.png"], "one file for 2 pictures"),
    "out exists": (["x", "--out", "here.png"], "here.png: exists already"),
    "out in no folder": (["x", "--out", "nowhere/x.png"], "no folder nowhere"),
    "out in a file": (["x", "--out", "here.png/x.png"], "no folder here.png"),
    "out is no png": (["x", "--out", "x.jpg"], "neither a .png file nor a folder"),
    "sampler": (["x", "--sampler", "eulr"], "euler"),
    "noise": (["x", "--noise", "numpy"], "--noise"),
    "spacing": (["x", "--spacing", "even"], "--spacing"),
    "spacing of a sampler without": (
        ["x", "--sampler", "dpmpp_2s", "--spacing", "leading"],
        "no option 'timestep_spacing'",
    ),
    "guidance interval": (["x", "--guidance-interval", "5:0.3"], "--guidance-interval must be two noise levels"),
    "no guidance interval": (["x", "--guidance-interval", ""], "--guidance-interval must be two noise levels"),
    "cache interval": (["x", "--cache-interval", "0"], "--cache-interval"),
    "clip skip": (["x", "--clip-skip", "-1"], "--clip-skip"),
    "lora": (["x", "--lora", "./nowhere.safetensors:0.5"], "./nowhere.safetensors: no such file"),
    "lora twice": (["x", "--lora", "here.png", "--lora", "here.png:2"], "names a LoRA twice"),
    "lora in a folder without": (["x", "--lora", "."], ".: a folder, without pytorch_lora_weights.safetensors"),
    "embedding": (["x", "--embedding", "./nowhere.pt"], "./nowhere.pt: no such file"),
    "lora in the prompt": (["a <lora:style:0.8> goose"], "loaded by load_lora, or by --lora"),
    "a network in the negative prompt": (["x", "--negative", "<lora:a:1>"], "does not load networks"),
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
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root, every folder can
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


@pytest.mark.parametrize(
    ("error", "status", "begins"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),
            1,
            "out of",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 9 bytes."), 1, "out of"),
        (MemoryError("Unable to allocate 9 GiB"), 1, "out of memory: Unable to allocate 9 GiB; make fewer or smaller"),
        (RuntimeError("Unable to initialize backend 'x': not known"), 2, "Unable to initialize backend 'x'"),
    ],
)
def test_what_a_host_does_not_have_is_one_line(pipeline, run, tmp_path, error, status, begins):
    def fail():
        raise error

    pipeline.during = fail
    code, out, [line] = run("generate", "x")
    assert (code, out) == (status, []) and line.startswith(f"error: {begins}")
    assert not list(tmp_path.iterdir())


def test_a_path_with_bytes_that_are_no_utf8(pipeline, run, tmp_path):
    """What a shell hands over of a file name in another encoding."""
    code, [path], _ = run("generate", "x", "--model", "m\udcff")
    assert code == 0 and read_settings(path)["model"] == "m\udcff"
    assert run("generate", "--from", path)[0] == 0 and pipeline.calls[-2][0] == "m\udcff"


def test_a_defect_is_not_disguised(pipeline):
    pipeline.during = lambda: [][0]
    with pytest.raises(IndexError):
        main(["generate", "x"])


@pytest.mark.parametrize(
    "traded", ["--guidance-interval 0.4:4 --cache-interval 3", "--vae-tiling --size 16x272 --steps 1"]
)
def test_the_settings_in_the_png_make_the_picture_again(sd1_folder, run, tmp_path, monkeypatch, traded):
    monkeypatch.chdir(tmp_path)
    options = "--negative blue --seeds 3,8 --steps 3 --guidance 4 --sampler dpmpp_2m_karras --size 16x32 --grid 1x2"
    arguments = ["generate", "a goose", "--model", str(sd1_folder), *options.split(), *traded.split()]
    assert run(*arguments) == (0, ["a-goose-3-8-grid.png"], [])
    settings = read_settings("a-goose-3-8-grid.png")

    pipe = StableDiffusionPipeline.from_pretrained(settings["model"], settings["dtype"], settings["scheduler"])
    names = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale")
    call = {name: settings[name] for name in names} | {"num_images_per_prompt": 2, "seed": settings["seeds"]}
    more = {"guidance_interval": settings.get("guidance_interval")}
    more |= {name: settings[name] for name in ("cache_interval", "vae_tiling") if name in settings}
    again, plain = (image_grid(pipe(**call, **kw).images, *settings["grid"]) for kw in (more, {}))
    with Image.open("a-goose-3-8-grid.png") as image:
        np.testing.assert_array_equal(image, again)
    assert again != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "30x32"], "width must be a positive multiple of 4, not 30"),
        (["--steps", "1001"], "num_inference_steps=1001"),
        (["--model", "."], "not a checkpoint folder"),
        (["--model", "./nowhere"], "no such folder"),
        (["--model", "./nowhere.ckpt"], "no such file"),
        (["--clip-skip", "3"], "clip_skip must be a whole number from 0 to 2, not 3"),
        (["--vae", "./nowhere"], "no such folder"),
    ],
)
def test_what_only_the_model_can_refuse(one_level_folder, run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("generate", "x", "--model", str(one_level_folder), *options)
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
    assert line.count("unknown: decoder.") + line.count("unknown: encoder.") == 5
    assert re.search(r"; unknown: … and \d+ more; ", line) and len(line) < 2100
    with pytest.raises(sdjax.CheckpointError) as everything:
        StableDiffusionPipeline.from_pretrained(tmp_path / "broken")
    assert str(everything.value).count("\n  unknown: ") > 5


def test_names_in_a_file_do_not_command_the_terminal(run, tmp_path):
    save_file({f"{'long' * 1000}\x1b[31m{i}": torch.zeros(1) for i in range(9)}, tmp_path / "x.safetensors")
    code, out, [line] = run("info", str(tmp_path / "x.safetensors"))
    assert (code, out) == (2, [])
    assert "x.safetensors: no Stable Diffusion model: 9 tensors, names of up to 4,006 characters" in line
    assert "\x1b" not in line and len(line) < 2100


class Malice:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def corrupt(path):
    path.write_bytes(b"PK\x03\x04 of no archive")


def malicious(path):
    torch.save({"state_dict": Malice()}, path)


def of_another_family(path):
    save_file({f"{QUERY}.lora_A.weight": torch.ones(2, 320), f"{QUERY}.lora_B.weight": torch.ones(320, 2)}, path)


@pytest.mark.parametrize("option", ["--model", "--lora", "--vae", "--embedding"])
@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.safetensors", corrupt, "truncated, or no weights"),
        ("x.ckpt", corrupt, "truncated, or no weights"),
        ("x.ckpt", malicious, "refused: it uses posix.mkdir"),
        ("x.safetensors", of_another_family, ""),
    ],
)
def test_a_file_that_does_not_do_is_one_line(sd1_folder, run, tmp_path, monkeypatch, option, name, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    model = [] if option == "--model" else ["--model", str(sd1_folder)]
    code, out, [line] = run("generate", "x", *model, option, name)
    assert (code, out) == (2, [])
    assert line.startswith(f"error: {name}: {message}")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_loras_embeddings_and_the_rest_make_the_picture_that_python_makes(sd1_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = {f"{QUERY}.lora_A.weight": torch.ones(2, 16), f"{QUERY}.lora_B.weight": torch.ones(16, 2)}
    save_file(lora, tmp_path / "style.safetensors")
    save_file({"<cat>": torch.from_numpy(oracle.normal(2, 24))}, tmp_path / "cat.safetensors")
    options = "--lora style.safetensors:0.5 --embedding cat.safetensors --clip-skip 1 --noise torch"
    common = "--size 16x16 --steps 2 --seeds 5 --out x.png"
    arguments = ["generate", "a <cat>", "--model", str(sd1_folder), *options.split(), *common.split()]
    assert run(*arguments) == (0, ["x.png"], [])
    pipe = StableDiffusionPipeline.from_pretrained(sd1_folder)
    pipe.load_lora("style.safetensors", 0.5)
    pipe.load_textual_inversion("cat.safetensors")
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "seed": [5], "clip_skip": 1, "noise": "torch"}
    with Image.open("x.png") as image:
        np.testing.assert_array_equal(image, pipe("a <cat>", **call).images[0])
        assert np.any(np.array(image) != pipe("a <cat>", **call | {"clip_skip": 0}).images[0])


def test_two_loras_of_one_file_name_in_two_folders(sd1_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, value in (("a", 1.0), ("b", -2.0)):
        (tmp_path / folder).mkdir()
        lora = {f"{QUERY}.lora_A.weight": torch.ones(2, 16), f"{QUERY}.lora_B.weight": torch.full((16, 2), value)}
        save_file(lora, tmp_path / folder / "style.safetensors")
    files = "--lora a/style.safetensors:0.5 --lora b/style.safetensors:0.2"
    arguments = f"generate x {files} --model {sd1_folder} --size 16x16 --steps 1 --seeds 5 --out x.png"
    assert run(*arguments.split()) == (0, ["x.png"], [])
    pipe = StableDiffusionPipeline.from_pretrained(sd1_folder)
    assert pipe.load_lora("a/style.safetensors", 0.5) == "style"
    with pytest.raises(ValueError, match="a LoRA 'style' is loaded already; give this one another name="):
        pipe.load_lora("b/style.safetensors", 0.2)
    pipe.load_lora("b/style.safetensors", 0.2, name="other")
    with Image.open("x.png") as image:
        made = pipe("x", height=16, width=16, num_inference_steps=1, seed=[5])
        np.testing.assert_array_equal(image, made.images[0])


@pytest.mark.parametrize(
    ("text", "path", "word"),
    [
        ("cat.pt", "cat.pt", None),
        ("cat.pt:<cat>", "cat.pt", "<cat>"),
        ("cat.pt:<cat:1.2>", "cat.pt", "<cat:1.2>"),
        ("cat.pt:", "cat.pt:", None),
        ("is:there.pt", "is:there.pt", None),
        ("is:there.pt:word", "is:there.pt", "word"),
        ("./is:there.pt:a:b", "./is:there.pt", "a:b"),
        (r"C:\\cat.pt", r"C:\\cat.pt", None),
        (r"C:\\cat.pt:cat", r"C:\\cat.pt", "cat"),
        ("c:/cat.pt:cat", "c:/cat.pt", "cat"),
        ("owner/cat-toy:[my cat]", "owner/cat-toy", "[my cat]"),
        ("owner/repository/cat.pt:a:b", "owner/repository/cat.pt", "a:b"),
        ("https://huggingface.co/a/b/resolve/main/c.pt", "https://huggingface.co/a/b/resolve/main/c.pt", None),
        ("https://huggingface.co/a/b/resolve/main/c.pt:cat", "https://huggingface.co/a/b/resolve/main/c.pt", "cat"),
    ],
)
def test_an_embedding_and_its_word(tmp_path, monkeypatch, text, path, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "is:there.pt").touch()
    assert parse_embeddings([text, text]) == {path: word}
    with pytest.raises(ValueError, match="two words"):
        parse_embeddings([f"{path}:one", f"{path}:other"])


@pytest.mark.filterwarnings("default:--embedding:UserWarning")
def test_an_embedding_of_a_batch(one_level_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        save_file({"*": torch.from_numpy(oracle.normal(2, 24))}, tmp_path / f"{name}.safetensors")
    words = "--embedding cat.safetensors:[cat] --embedding dog.safetensors"
    common = f"--model {one_level_folder} {words} --size 16x16 --steps 2"
    code, _, err = run("batch", "--prompt", "a [Cat]", "--out", "pictures", *common.split(), "--quiet")
    assert (code, err) == (0, ["warning: --embedding dog.safetensors: its word 'dog' is in no prompt"])
    [path] = (tmp_path / "pictures").rglob("*.png")
    assert run("generate", "a [Cat]", "--out", "x.png", *common.split())[0] == 0
    assert read_settings(path)["embeddings"] == {"cat.safetensors": "[cat]", "dog.safetensors": "dog"}
    with Image.open(path) as made, Image.open("x.png") as image:
        np.testing.assert_array_equal(made, image)


def test_info_counts_parameters_bytes_and_devices(sd1_folder, run):
    code, out, err = run("info", str(sd1_folder))
    assert (code, err) == (0, [])
    parameters = sum(value.numel() for value in load_file(sd1_folder / "unet" / UNET_WEIGHTS).values())
    [unet] = [line.split() for line in out if line.startswith("unet")]
    assert unet[1:6] == ["UNet2DConditionModel", f"{parameters:,}", "parameters", f"{4 * parameters:,}", "bytes"]
    assert sum(line.startswith("device") for line in out) == len(jax.devices())
    assert f"jax {jax.__version__}, " in out[-1]


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return oracle.save_pipeline(tmp_path_factory.mktemp("xl"), oracle.SDXL)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """SD 1 in a folder of float16 files alone, called so."""
    folder = tmp_path_factory.mktemp("halves")
    oracle.pipeline(folder, oracle.SD1).to(torch.float16).save_pretrained(folder / "model", variant="fp16")
    return folder / "model"


# wide enough for what no single file tells: 32 groups in a norm, heads of 64 channels in the text encoder
WIDE = replace(
    oracle.SD1,
    unet={
        **oracle.SD1.unet,
        "block_out_channels": (32, 64),
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
    },
    vae={**oracle.SD1.vae, "block_out_channels": (32, 32), "norm_num_groups": 32},
    text={**oracle.SD1.text, "vocab_size": 49408, "hidden_size": 64, "num_attention_heads": 1},
)
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """(one file with the models under the prefixes of the original repository, the folder of the same weights)."""
    folder = oracle.save_pipeline(tmp_path_factory.mktemp("wide"), WIDE)
    files = {prefix: next((folder / name).glob("*.safetensors")) for name, prefix in PREFIXES.items()}
    tensors = {prefix + key: value for prefix, file in files.items() for key, value in load_file(file).items()}
    save_file(tensors, path := folder.parent / "model.safetensors")
    return path, folder


def test_info_shows_the_files_of_sdxl_variants_and_single_files(xl, halves, single_file, run):
    code, out, err = run("info", str(xl))
    assert (code, err) == (0, [])
    lines = {line.split()[0]: line.split() for line in out}
    assert lines["text_encoder_2"][1] == "CLIPTextModel" and lines["tokenizer_2"][1] == "CLIPTokenizer"
    assert lines["scheduler"][1] == "EulerDiscreteScheduler"
    assert [line.split()[-1] for line in run("info", str(halves), "--variant", "fp16")[1][:3]] == ["float16"] * 3
    [refused] = run("info", str(halves))[2]
    assert "variant='fp16'" in refused
    assert [line.split()[0] for line in run("info", str(single_file[0]))[1][:3]] == ["text_encoder", "unet", "vae"]


def assert_same_in_pytorch(ours, theirs, dtype, **kw):
    """Both folders load in PyTorch to the same weights, and ours has them in this dtype."""
    for path in ours.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {dtype}
    first, second = (
        diffusers.DiffusionPipeline.from_pretrained(folder, **options) for folder, options in ((ours, {}), (theirs, kw))
    )
    assert type(first) is type(second) and first.components.keys() == second.components.keys()
    for name, reference in second.components.items():
        assert type(first.components[name]) is type(reference)
        if isinstance(reference, torch.nn.Module):
            own, values = first.components[name].state_dict(), reference.state_dict()
            assert own.keys() == values.keys()
            assert all(torch.equal(own[key].to(dtype), values[key].to(dtype)) for key in values)


@pytest.mark.parametrize(
    ("source", "options", "kw", "dtype"),
    [
        ("sd1_folder", [], {}, torch.float32),
        ("xl", [], {}, torch.float32),
        ("xl", ["--dtype", "bfloat16"], {}, torch.bfloat16),
        ("halves", ["--variant", "fp16"], {"variant": "fp16"}, torch.float16),
    ],
)
def test_a_converted_folder_is_the_same_in_pytorch(request, run, tmp_path, monkeypatch, source, options, kw, dtype):
    monkeypatch.chdir(tmp_path)
    folder = request.getfixturevalue(source)
    assert run("convert", str(folder), "new", *options) == (0, ["new"], [])
    assert os.listdir(tmp_path) == ["new"]
    files = {path.name for path in Path("new").rglob("*") if path.suffix in (".safetensors", ".bin")}
    assert files == {UNET_WEIGHTS, "model.safetensors"}
    assert_same_in_pytorch(Path("new"), folder, dtype, **kw)


def test_a_converted_single_file_is_the_same_in_pytorch(single_file, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, folder = single_file
    assert run("convert", str(path), "new") == (0, ["new"], [])
    assert_same_in_pytorch(Path("new"), folder, torch.float32)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("here", "here: exists already"),
        ("link", "link: exists already"),
        ("nowhere/new", "nowhere/new: there is no folder"),
        ("here/new", "there is no folder"),
    ],
)
def test_a_target_that_does_not_do_is_refused_before_anything_is_read(run, tmp_path, monkeypatch, target, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("nowhere")
    code, out, [line] = run("convert", "./no-source", target)
    assert (code, out) == (2, [])
    assert line.startswith(f"error: {target}: ") and message in line
    assert {path.name for path in tmp_path.iterdir()} == {"here", "link"}


def test_a_target_in_a_folder_that_cannot_be_written_to(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root, every folder can
    [line] = run("convert", "./no-source", str(tmp_path / "new"))[2]
    assert line == f"error: {tmp_path / 'new'}: the folder {tmp_path} cannot be written to"


def test_a_source_that_does_not_do_leaves_nothing(sd1_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    malicious(tmp_path / "x.ckpt")
    for source in ("./nowhere", "x.ckpt", str(sd1_folder / "unet")):
        code, out, err = run("convert", source, "new")
        assert (code, out, len(err)) == (2, [], 1)
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_the_embedded_model_paints_the_asked_background(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("generate", "a goose on a blue background", "--out", "goose.png") == (0, ["goose.png"], [])
    with Image.open("goose.png") as image:
        red, green, blue = np.median(np.array(image)[:4].reshape(-1, 3), axis=0)
    assert blue > red + 50 and blue > green + 20


def test_help_and_refusals_do_without_jax(tmp_path):
    code = """import sys; from sdjax.commands.main import main
for arguments in ("--help", "generate --help", "generate x --sampler eulr", "samplers"):
    try: main(arguments.split())
    except SystemExit: assert 'jax' not in sys.modules, arguments
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_samplers_lists_each_on_a_line(run):
    code, out, err = run("samplers")
    assert (code, err) == (0, [])
    names = [line.split()[0] for line in out]
    assert {"ddim", "pndm", "euler", "dpmpp_2m_karras", "unipc", "lcm"} <= set(names)
    assert len(set(names)) == len(names)


def test_version(run):
    assert run("--version") == (0, [sdjax.__version__], [])


def test_loras():
    assert parse_lora("style.safetensors") == ("style.safetensors", 1.0)
    assert parse_lora("a/b/style.safetensors:-.5") == ("a/b/style.safetensors", -0.5)
    assert parse_lora("owner/name:2") == ("owner/name", 2.0)
    assert parse_lora("https://huggingface.co/a/b/resolve/main/c.safetensors:1.25")[1] == 1.25
    assert parse_lora("https://huggingface.co/a/b/resolve/main/c.safetensors")[1] == 1.0


def test_slug():
    assert slug("A goose, on blue!") == "a-goose-on-blue"
    assert slug("🦢 ../..") == "image"
    assert slug("été 鹅") == "été-鹅"
    assert len(f"{slug('鹅' * 300)}-{2**64}-{2**64}-grid-10.png".encode()) <= 255


def test_a_picture_is_made_again_from_its_file(sd1_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = f"--model {sd1_folder} --size 16x32 --steps 2 --sampler euler_ancestral --guidance 3"
    options += " --grid 1x2 --spacing trailing --negative blue --cache-interval 3"
    assert run("generate", "a (goose:1.2)", *options.split(), "--out", "x.png")[0] == 0
    assert run("generate", "--from", "x.png", "--out", "again.png") == (0, ["again.png"], [])
    assert Path("again.png").read_bytes() == Path("x.png").read_bytes()
    assert run("generate", "blue", "--from", "x.png", "--steps", "3", "--out", "other.png")[0] == 0
    settings = read_settings("x.png")
    other = {name: value for name, value in read_settings("other.png").items() if settings.get(name) != value}
    assert other == {"prompt": "blue", "num_inference_steps": 3}


def test_a_single_picture_is_asked_for_again(pipeline, run):
    options = "--seeds 7 --steps 2 --guidance 3 --out x.png"
    assert run("generate", "a (goose:1.2)", *options.split())[0] == 0
    assert run("generate", "--from", "x.png", "--model", "folder", "--out", "again.png")[0] == 0
    [again] = pipeline.calls[-1]
    asked = {"prompt": "a (goose:1.2)", "seed": 7, "num_inference_steps": 2, "guidance_scale": 3.0}
    assert {name: getattr(again, name) for name in asked} == asked and (again.width, again.height) == (64, 64)


def test_a_picture_of_the_web_ui_is_made_again(pipeline, run, tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text(
        "parameters",
        "a goose\nNegative prompt: a duck\nSteps: 5, Sampler: DPM++ 2M Karras, CFG scale: 6, Seed: 3, Size: 64x48, "
        "Model: goose-v1, Denoising strength: 0.5, Clip skip: 2",
    )
    Image.new("RGB", (64, 48)).save("web.png", pnginfo=text)
    code, _, [line] = run("generate", "--from", "web.png")
    assert code == 2 and "its model is goose-v1; give its place by --model" in line
    code, _, [line] = run("generate", "--from", "web.png", "--model", "goose.safetensors", "--seeds", "4")
    assert code == 0 and line == "warning: --from web.png: not made again: Denoising strength"
    own = {"negative_prompt": "a duck", "seed": 4, "num_inference_steps": 5, "guidance_scale": 6.0}
    own |= {"width": 64, "height": 48, "clip_skip": 1, "noise": "cuda", "scheduler": "dpmpp_2m_karras"}
    assert pipeline.calls[-1] == [Request("a goose", **own)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([1], "its sdjax settings are damaged"),
        ("x" * 10**6, "its sdjax settings are damaged"),
        ({"prompt": "x", "model": 5}, "model=5: must be a text or null"),
        ({"prompt": "x", "vae": ["a"]}, "vae="),
        ({"prompt": "x", "grid": "ab"}, "grid='ab': must be a list"),
        ({"prompt": "x", "grid": [2, "x"]}, "grid="),
        ({"prompt": "x", "embeddings": [1]}, "embeddings="),
        ({"prompt": "x", "dtype": "nope"}, "dtype must be one of float32, bfloat16, float16"),
        ({"prompt": "x", "seed": {"a": 1}}, "--from: seed"),
    ],
)
def test_settings_of_a_picture_from_elsewhere_are_checked(pipeline, run, settings, message):
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a goose\nSteps: 5")
    text.add_text("sdjax", json.dumps(settings))
    Image.new("RGB", (8, 8)).save("odd.png", pnginfo=text)
    code, out, [line] = run("generate", "--from", "odd.png")
    assert (code, out, pipeline.calls) == (2, [], []) and message in line and len(line) < 400


def test_a_picture_without_settings_is_named(pipeline, run, tmp_path):
    Image.new("RGB", (8, 8)).save("plain.png")
    code, _, [line] = run("generate", "--from", "plain.png")
    assert code == 2 and "plain.png: carries no settings, neither of sdjax nor of the web UI" in line
    (tmp_path / "text.png").write_text("no picture")
    assert run("generate", "--from", "text.png")[0] == 2
    assert run("generate", "--from", "none.png")[0] == 2
