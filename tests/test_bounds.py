"""What cannot fit is refused before XLA is asked, and nothing else is."""

import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from compilations import compilations

from sdjax.batch import memory
from sdjax.batch.prepare import lay_out, prepare
from sdjax.engine import Engine, Group, cut
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import Request
from sdjax.runtime import bounds, host, parallel
from sdjax.runtime.bounds import Load
from sdjax.runtime.lowering import DoesNotFit

GOOSE = Request(
    "goose", negative_prompt="", num_inference_steps=1, guidance_scale=3.0, width=32, height=32, clip_skip=0
)


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    made = StableDiffusionPipeline.from_pretrained(sd1_folder, mesh=parallel.data_mesh(jax.devices()[:1]))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def has(monkeypatch):
    """Sets what the host has."""
    return lambda size: monkeypatch.setattr(host, "total", lambda: size)


@pytest.mark.parametrize(("batch", "request_"), [(1, GOOSE), (4, GOOSE), (1, replace(GOOSE, width=64, height=64))])
def test_it_is_less_than_what_the_compiler_counts(pipe, batch, request_):
    load = Load(batch, request_.height, request_.width, tokens=77)
    working = memory.needed(pipe, request_, batch) - memory.weight_bytes(pipe)
    assert working / bounds.NEAR < bounds.least_bytes(pipe.models, load) < working


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 999_992, "width": 999_992}, r"^out of memory: a picture of 999992x999992 takes .* GB or more, and"),
        ({"num_images_per_prompt": 10**7}, r"a batch of 16,777,216 pictures of 512x512 .*; one at a time takes .* MB"),
        ({"prompt": ["goose"] * 10**6}, "a batch of 1,048,576 pictures of 512x512"),
        ({"seed": range(10**7)}, "a batch of 16,777,216 pictures of 512x512"),
        ({"num_images_per_prompt": 10**400}, "num_images_per_prompt must be a whole number, from 1 to 10000000"),
        ({"height": 10**30}, "height must be a whole number, from 1 to 1000000"),
    ],
)
def test_what_no_host_has_memory_for_is_refused_at_once(pipe, has, arguments, message):
    has(2**37)
    begun = time.perf_counter()
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "goose", "height": 512, "width": 512, **arguments})
    assert compiled == [] and time.perf_counter() - begun < 5


def test_what_to_do_follows_from_what_would_fit(pipe, has):
    def refusal(limit, **load):
        has(limit)
        with pytest.raises(DoesNotFit) as refused:
            bounds.check(pipe.models, pipe.mesh, Load(**{"pictures": 1, "height": 512, "width": 512, **load}))
        return str(refused.value).partition("; ")[2]

    least = bounds.least_bytes(pipe.models, Load(1, 512, 512))
    assert refusal(least - 1) == "make it smaller, or decode it in tiles (vae_tiling)"
    assert refusal(least // 9, tiled=True) == "make it smaller"
    assert refusal(least, pictures=2).startswith("one at a time takes ")
    assert refusal(least, tokens=10**6) == "shorten the prompt"


def test_where_it_is_near_the_compiler_decides(pipe, has, monkeypatch):
    least = bounds.least_bytes(pipe.models, Load(1, 32, 32))
    call = {"prompt": "goose", "width": 32, "height": 32, "num_inference_steps": 1}
    has(least * bounds.NEAR // 2)
    monkeypatch.setattr(bounds, "NEAR", 1)
    pipe(**call)
    monkeypatch.undo()
    has(least + 1)
    with pytest.raises(DoesNotFit, match="a picture of 32x32 takes"):
        pipe(**call)


def test_a_prompt_of_many_chunks(pipe, has):
    has(10**9)
    with pytest.raises(DoesNotFit, match=r"; shorten the prompt$"):
        pipe("BREAK " * 100_000, height=32, width=32)


def test_a_job_that_cannot_fit_is_refused_before_anything_is_written(pipe, has, tmp_path):
    has(2**35)
    large = prepare([{"prompt": "goose", "width": 999_992, "height": 999_992}], tmp_path / "a", model=pipe)
    with pytest.raises(DoesNotFit, match="a picture of 999992x999992"):
        lay_out(large)
    small = prepare([{"prompt": "goose", "width": 512, "height": 512}], tmp_path / "b", model=pipe)
    with pytest.raises(DoesNotFit, match=r"a batch of 1,048,576 pictures of 512x512 .* one at a time"):
        lay_out(small, batch=2**20)
    assert not list(tmp_path.iterdir())


def test_an_engine_halves_a_batch_that_does_not_fit(pipe, monkeypatch):
    monkeypatch.setattr(
        bounds, "check", lambda models, mesh, load: bounds.check_against(1, models, load) if load.pictures > 2 else None
    )
    batches, found = [], []
    requests = [replace(GOOSE, seed=seed) for seed in range(4)]
    Engine(pipe, batches.append).run(cut(Group.of(GOOSE, 1), requests, range(4), 4), found.extend)
    assert batches == [2] and sorted(picture.tag for picture in found) == [0, 1, 2, 3]


MEMORY = ["MemTotal:       1000 kB", "MemAvailable:    600 kB", "SwapTotal:        24 kB", "HugePages_Total:   0"]


@pytest.mark.parametrize(
    ("groups", "total", "available"),
    [
        ({}, 1024, 600),
        ({"cgroup": ["0::/a/b"], "a/memory.max": ["524288"], "a/memory.current": ["102400"]}, 512, 412),
        ({"cgroup": ["0::/a"], "a/memory.max": ["max"], "a/memory.current": ["102400"]}, 1024, 600),
        (
            {
                "cgroup": ["4:cpu,memory:/b", "0::/"],
                "memory/b/memory.limit_in_bytes": ["262144"],
                "memory/b/memory.usage_in_bytes": ["0"],
            },
            256,
            256,
        ),
    ],
)
def test_the_memory_of_the_host(groups, total, available, monkeypatch):
    files = {"/proc/meminfo": MEMORY, "/proc/self/cgroup": groups.pop("cgroup", [])}
    files |= {f"/sys/fs/cgroup/{name}": lines for name, lines in groups.items()}
    monkeypatch.setattr(host, "_lines", lambda path: files.get(str(path), []))
    monkeypatch.setattr(host, "_ulimit", lambda: np.inf)
    assert (host.total(), host.available()) == (1024 * total, 1024 * available)


def test_a_system_that_does_not_say_has_no_limit(monkeypatch):
    monkeypatch.setattr(host, "_lines", lambda path: [])
    monkeypatch.setattr(host, "_ulimit", lambda: np.inf)
    monkeypatch.delattr(host.os, "sysconf")
    assert host.total() == np.inf
