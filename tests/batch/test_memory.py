"""The batch that fits: by the compiler's own account of the programs, against the memory of the devices."""

from dataclasses import replace

import jax
import pytest

from sdjax.batch import memory
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import Request
from sdjax.runtime import parallel

SMALL = Request("goose", negative_prompt="", guidance_scale=3.0, width=32, height=32, clip_skip=0)
LARGE = Request("goose", negative_prompt="", guidance_scale=3.0, width=64, height=64, clip_skip=0)


@pytest.fixture(scope="module")
def pipe(one_level_folder):
    return StableDiffusionPipeline.from_pretrained(one_level_folder, mesh=parallel.data_mesh(jax.devices()[:2]))


@pytest.mark.parametrize(("width", "call"), [(48, {}), (56, {"cache_interval": 2}), (64, {"vae_tiling": True})])
def test_the_programs_are_those_that_run(pipe, caplog, width, call):
    """What was compiled to be asked is not compiled again."""
    size = {"width": width, "height": 40}  # of no other test: the noise is not compiled yet
    memory.needed(pipe, replace(SMALL, **size, **call), 2)
    pipe.set_progress_bar_config(disable=True)
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        made = pipe(["goose"] * 4, guidance_scale=3, num_inference_steps=1, output_type="jax", **size, **call)
        made.images.block_until_ready()
    compiled = [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]
    assert any("jit(noise)" in message for message in compiled)
    asked = ("denoise_segment", "deep_features", "jit(decode)")
    assert not any(name in message for name in asked for message in compiled)


def test_it_is_the_largest_power_of_two_that_fits(pipe, monkeypatch):
    weights, one, four = memory.weight_bytes(pipe), memory.needed(pipe, SMALL, 1), memory.needed(pipe, SMALL, 4)
    assert weights < one < four
    for limit, batch in ((four, 4), (four - 1, 2), (one, 1), (0, 1)):
        monkeypatch.setattr(memory, "device_memory", lambda pipe, limit=limit: limit)
        assert memory.per_device_batch(pipe, [SMALL], 4) == batch


def test_the_largest_shape_decides(pipe, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda pipe: memory.needed(pipe, SMALL, 2))
    assert memory.per_device_batch(pipe, [SMALL], 2) == 2
    assert memory.per_device_batch(pipe, [SMALL, LARGE], 2) == 1


@pytest.mark.parametrize(("most", "batch"), [(1, 1), (3, 2), (1000, 8)])
def test_no_more_than_is_wanted(most, batch, pipe, monkeypatch):
    monkeypatch.setattr(memory, "needed", lambda *_: 0)
    assert memory.per_device_batch(pipe, [SMALL], most) == batch


def test_a_compiler_that_runs_out_of_memory_says_no(pipe, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")

    monkeypatch.setattr(memory, "_programs", fail)
    assert memory.needed(pipe, SMALL, 8) == float("inf")


def test_the_memory_of_the_host_is_shared_by_its_devices(pipe, one_level_folder):
    alone = StableDiffusionPipeline.from_pretrained(one_level_folder, mesh=parallel.data_mesh(jax.devices()[:1]))
    assert 0 < memory.device_memory(pipe) == pytest.approx(memory.device_memory(alone) / 2, rel=0.2)


def test_a_second_pass_counts(pipe):
    """Pictures that are made larger in a second pass take what pictures of that size take."""
    hires = replace(SMALL, hires_scale=2.0)
    assert memory.last_pass(pipe, hires).size == (64, 64)
    assert memory.needed(pipe, memory.last_pass(pipe, hires), 2) == memory.needed(pipe, LARGE, 2)


def test_more_branches_take_more(pipe, monkeypatch):
    """Of one size, that with most predictions is asked for."""
    asked = []
    monkeypatch.setattr(memory, "needed", lambda pipe, item, batch: asked.append(item) or 0)
    perturbed = replace(SMALL, pag_scale=3.0)
    memory.per_device_batch(pipe, [perturbed, SMALL], 2)
    assert asked == [perturbed]
