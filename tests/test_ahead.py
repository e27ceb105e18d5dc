"""sdjax.runtime.ahead: programs in a file, which a process takes in place of compiling, for the same pictures."""

import hashlib
import os
import subprocess
import sys

import jax
import pytest
from compilations import compilations
from flax import nnx
from typer.testing import CliRunner

from sdjax import StableDiffusionPipeline
from sdjax.commands.main import app
from sdjax.runtime import ahead
from sdjax.runtime.network import Graph

ASKED = {"num_inference_steps": 3, "guidance_scale": 4.0, "seed": 5, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe(one_level_folder):
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(pipe):
    """The picture that is made without a file."""
    return pipe("a goose", **ASKED).images


@pytest.fixture(scope="module")
def file(one_level_folder, plain, tmp_path_factory):
    """What `sdjax compile` makes, where these programs are in JAX's caches already."""
    path = tmp_path_factory.mktemp("ahead") / "programs"
    with compilations() as compiled:
        made = CliRunner().invoke(app, ["compile", str(one_level_folder), "--out", str(path)])
    assert made.exit_code == 0, made.output
    assert made.output.split() == [str(path)]
    assert len(compiled) == 5
    return path


@pytest.fixture(autouse=True)
def unloaded():
    yield
    ahead.unload()


OTHER_PROCESS = """
import hashlib, sys
import jax
from sdjax import StableDiffusionPipeline
from sdjax.runtime import ahead
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **kw: events.append(event))
assert ahead.load(sys.argv[2])
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
events.clear()
pixels = pipe("a goose", num_inference_steps=3, guidance_scale=4.0, seed=5, output_type="np").images
print(hashlib.sha256(pixels.tobytes()).hexdigest(), len(events))
"""


def test_another_process_neither_traces_nor_compiles_and_draws_the_same_bits(one_level_folder, file, plain):
    command = [sys.executable, "-W", "error", "-c", OTHER_PROCESS, str(one_level_folder), str(file)]
    environment = os.environ | {"PYTHONHASHSEED": "7", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [hashlib.sha256(plain.tobytes()).hexdigest(), "0"]


def test_what_the_file_lacks_is_compiled_with_one_warning(pipe, file):
    wanted = pipe("a goose", **ASKED | {"guidance_scale": 1.0}).images
    assert ahead.load(file)
    with pytest.warns(UserWarning, match="has no program 'denoise_segment'") as caught:
        pictures = [pipe("a goose", **ASKED | {"guidance_scale": 1.0}).images for _ in range(2)]
    assert len(caught) == 1
    assert all((picture == wanted).all() for picture in pictures)


@pytest.mark.parametrize("name", ["jax", "code", "kind of device", "processor", "jax_default_matmul_precision"])
def test_a_stale_file_is_not_used_and_says_why(file, tmp_path, monkeypatch, name):
    here = ahead.environment()
    monkeypatch.setattr(ahead, "environment", lambda: here | {name: "another"})
    with pytest.warns(UserWarning, match=f"not used, compiled for another {name}$"):
        assert not ahead.load(file)


def test_a_damaged_file_and_one_of_another_kind_are_errors(file, tmp_path):
    path = tmp_path / "programs"
    for content, message in ((file.read_bytes()[:-1], "damaged"), (b"", "not a file"), (b"PK\n\n", "not a file")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ahead.load(path)
    with pytest.raises(FileNotFoundError):
        ahead.load(tmp_path / "none")


def test_another_model_of_the_same_shapes_is_not_taken_for_this_one(pipe, file):
    graph = Graph(pipe.unet)
    groups, pipe.unet.conv_norm_out.groups = pipe.unet.conv_norm_out.groups, 1
    try:
        assert Graph(pipe.unet).digest != graph.digest
    finally:
        pipe.unet.conv_norm_out.groups = groups
    assert Graph(pipe.unet).digest == graph.digest


class Own(nnx.Module):
    """Of the caller's, whose code may change."""


def test_a_module_of_the_callers_has_no_digest():
    with pytest.raises(ValueError, match="Own"):
        _ = Graph(Own()).digest


def test_generate_takes_the_file(one_level_folder, file, tmp_path, monkeypatch):
    jax.clear_caches()
    arguments = ["generate", "a goose", "--model", str(one_level_folder), "--steps", "2", "--out", str(tmp_path)]
    with compilations() as compiled:
        made = CliRunner().invoke(app, [*arguments, "--compiled", str(file)])
    assert made.exit_code == 0, made.output
    assert not compiled


def test_an_existing_file_is_not_overwritten(file):
    refused = CliRunner().invoke(app, ["compile", "--out", str(file)])
    assert isinstance(refused.exception, FileExistsError)
