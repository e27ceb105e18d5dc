"""sdjax.engine: each request's picture once, whatever it was sampled beside, and before the next request is there."""

import threading
from dataclasses import replace

import jax
import numpy as np
import pytest

from sdjax.engine import Engine, Group, Unit, cut, grouped, prompt_chunk_counter, row_counter
from sdjax.engine.sampled import _to_uint8
from sdjax.pictures.pixels import denormalize, to_uint8
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import Request
from sdjax.runtime import parallel

GOOSE = Request("goose", num_inference_steps=2, guidance_scale=3.0, width=32, height=32)


@pytest.fixture(scope="module")
def pipe(one_level_folder) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(one_level_folder, mesh=parallel.data_mesh(jax.devices()[:2]))


def units(pipe, work, batch: int) -> list[Unit]:
    """Of (request, tag)."""
    requests, tags = zip(*work, strict=True)
    rows = row_counter(pipe)
    places = grouped(requests, prompt_chunk_counter([*pipe.tokenizers.values()], rows), rows)
    return [
        unit
        for group, own in places.items()
        for unit in cut(group, [requests[i] for i in own], [tags[i] for i in own], batch)
    ]


def test_units_have_one_group_each_and_equal_rows_beside_each_other(pipe):
    steps = (4, 2, 4, 2, 3)
    work = [(replace(GOOSE, num_inference_steps=count), tag) for tag, count in enumerate(steps)]
    work.insert(1, (replace(GOOSE, width=16), "small"))
    work += [(replace(GOOSE, prompt="goose " * 100), "long"), (replace(GOOSE, width=16, prompt="duck"), "duck")]
    made = units(pipe, work, 2)
    assert [unit.tags for unit in made] == [(1, 3), (4, 0), (2,), ("small", "duck"), ("long",)]
    known = {tag: request for request, tag in work}
    for unit in made:
        assert unit.batch == 2 and unit.requests[: len(unit)] == tuple(known[tag] for tag in unit.tags)
        assert set(unit.requests[len(unit) :]) <= {unit.requests[len(unit) - 1]}


def test_a_unit_in_halves():
    requests = [replace(GOOSE, seed=seed) for seed in range(11)]
    whole = cut(Group.of(GOOSE, 1), requests, range(11), 8)
    assert [len(unit) for unit in whole] == [8, 3]
    halves = [half for unit in whole for half in unit.halves(4)]
    assert [(len(half), half.batch) for half in halves] == [(4, 4), (4, 4), (3, 4)]
    assert [tag for half in halves for tag in half.tags] == [*range(11)]
    assert whole[1].halves(8) == whole[1].halves(None) == [whole[1]]


def sampled(engine, units, **options):
    found = []
    engine.run(units, found.extend, **options)
    return found


def test_pictures_are_those_of_the_call(pipe):
    work = [(replace(GOOSE, seed=seed, num_inference_steps=1 + seed % 2), seed) for seed in range(5)]
    engine = Engine(pipe)
    found = {picture.tag: picture for picture in sampled(engine, units(pipe, work, 2))}
    assert found.keys() == {*range(5)}
    for request, seed in work:
        expected = np.asarray(pipe.sample([request]).images[0])
        assert np.abs(found[seed].pixels.astype(int) - expected).max() <= 1
        assert found[seed].pixels.dtype == np.uint8 and found[seed].seconds > 0 and not found[seed].mended


def test_a_picture_does_not_wait_for_the_next_request(pipe):
    """As on a server, where the next may never come."""
    there, engine = threading.Event(), Engine(pipe)

    def arriving():
        yield from units(pipe, [(GOOSE, 0), (GOOSE, 1)], 1)
        assert there.wait(120)

    engine.run(arriving(), lambda pictures: there.set())


def test_out_of_memory_makes_what_is_left_in_halves(pipe, monkeypatch):
    sample, sizes, batches = StableDiffusionPipeline.sample, [], []

    def limited(self, requests, **options):
        sizes.append(len(requests) // self.mesh.size)
        if len(requests) > self.mesh.size and len(sizes) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        return sample(self, requests, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "sample", limited)
    engine = Engine(pipe, batches.append)
    found = sampled(engine, units(pipe, [(replace(GOOSE, seed=seed), seed) for seed in range(11)], 2))
    assert [picture.tag for picture in found] == [*range(11)]
    assert batches == [1] and sizes == [2, 2, 1, 1, 1, 1]


def test_after_a_stop_no_call_is_begun(pipe, monkeypatch):
    stop, engine = threading.Event(), Engine(pipe)
    dispatch = Engine._dispatch

    def stopping(self, units):
        stop.set()
        return dispatch(self, units)

    monkeypatch.setattr(Engine, "_dispatch", stopping)
    work = units(pipe, [(replace(GOOSE, seed=seed), seed) for seed in range(6)], 1)
    assert [picture.tag for picture in sampled(engine, work, stop=stop)] == [0, 1]


def test_to_uint8_is_that_of_a_single_picture():
    x = np.linspace(-1.2, 1.2, 3 * 2**16, dtype=np.float32)
    assert np.array_equal(_to_uint8(denormalize(x)), to_uint8(x))
