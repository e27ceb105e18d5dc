"""Items become chunks: each in one place, what a unit holds a function of the job and the batch alone."""

import pickle
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from sdjax import EMBEDDED_MODEL, CLIPTokenizer
from sdjax.batch.job import check, read
from sdjax.batch.plan import BYTES_PER_PIXEL, Chunk, estimate, plan
from sdjax.engine import Group, Unit, cut, prompt_chunk_counter
from sdjax.request import Request


def job(seed: int, count: int = 97) -> list[Request]:
    """Items of several groups, mixed."""
    draw = random.Random(seed)
    return [
        Request(
            draw.choice(["a goose", "a duck"]),
            negative_prompt=draw.choice([None, "", "blue"]),
            seed=i,
            scheduler=draw.choice([None, "ddim"]),
            num_inference_steps=draw.choice([5, 10]),
            guidance_scale=draw.choice([1.0, 3.0]),
            width=64,
            height=64,
        )
        for i in range(count)
    ]


def units(chunk: Chunk) -> list[Unit]:
    return cut(chunk.group, chunk.items, chunk.indices, chunk.batch)


@pytest.mark.parametrize("batch", [1, 3, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_every_item_is_in_one_chunk_at_one_place(seed, batch):
    items = job(seed)
    made = plan(items, "model", batch, 12)
    chunks = list(made)
    assert Counter(i for chunk in chunks for i in chunk.indices) == Counter(range(len(items)))
    assert len({chunk.id for chunk in chunks}) == len(chunks) == len(made)
    assert [chunk.id for chunk in chunks] == made.ids
    for chunk in chunks:
        assert chunk.items == tuple(items[i] for i in chunk.indices)
        assert chunk.ids == tuple(item.id("model") for item in chunk.items)
        assert {Group.of(item, 1) for item in chunk.items} == {chunk.group}
        assert len(chunk) <= max(12, batch)
        assert [i for unit in units(chunk) for i in unit.tags] == list(chunk.indices)
        for unit in units(chunk):
            assert len(unit.requests) == batch
            assert unit.requests[: len(unit)] == tuple(items[i] for i in unit.tags)
            assert set(unit.requests[len(unit) :]) <= {unit.requests[len(unit) - 1]}


def places(chunks: Iterable[Chunk]) -> dict[int, tuple]:
    """For each picture all that its bytes depend on: its chunk, the items of its unit, and its place among them."""
    return {
        i: (chunk.id, unit.requests, place)
        for chunk in chunks
        for unit in units(chunk)
        for place, i in enumerate(unit.tags)
    }


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_picture_is_sampled_in_the_same_company_whoever_samples_it(seed, processes):
    """Each process reads and plans for itself and takes every n-th chunk, in any order."""
    found = {}
    for process in range(processes):
        chunks = list(plan(job(seed), "model", 4, 12))[process::processes]
        random.shuffle(chunks)
        found |= places(pickle.loads(pickle.dumps(chunks)))
    assert found == places(plan(job(seed), "model", 4, 12))
    assert found.keys() == {*range(97)}


def test_only_the_last_unit_of_a_group_is_padded():
    for seed in range(3):
        made = [(chunk.group, unit) for chunk in plan(job(seed), "model", 4, 10) for unit in units(chunk)]
        short = Counter(group for group, unit in made if len(unit) < 4)
        assert set(short.values()) <= {1}
        assert all(made[i + 1 :] == [] or made[i + 1][0] != g for i, (g, unit) in enumerate(made) if len(unit) < 4)


def test_groups_come_as_their_first_items_do():
    items = job(0)
    groups = list(dict.fromkeys(Group.of(item, 1) for item in items))
    assert list(dict.fromkeys(chunk.group for chunk in plan(items, "model", 2, 4))) == groups
    assert list(plan(items, "model", 2, 4).groups) == groups


@pytest.mark.parametrize(
    "change",
    [
        {"width": 128},
        {"height": 128},
        {"loras": (("a", 1.0),)},
        {"clip_skip": 1},
        {"noise": "cuda"},
        {"prompt_syntax": "plain"},
        {"guidance_interval": (0.3, 5.0)},
        {"cache_interval": 3},
        {"vae_tiling": True},
        {"guidance_scale": 1.0},
        {"negative_prompt": ""},
    ],
)
def test_what_separates_groups(change):
    item = Request("a goose")
    assert len(plan([item, replace(item, **change)], "model", 2)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"scheduler": "ddim"},
        {"num_inference_steps": 9},
        {"guidance_interval": (1.0, 2.0)},
        {"timesteps": (999.0, 499.0)},
        {"sigmas": (14.6, 0.5, 0.0)},
    ],
)
def test_what_selects_the_programs_of_rows_separates_groups(change):
    """Of rows with guidance and rows without, those of one picture would differ by rounding beside another's."""
    item = Request("a goose", guidance_interval=(0.3, 5.0))
    assert len(plan([item, replace(item, **change)], "model", 2)) == 2
    assert len(plan([replace(one, guidance_scale=1.0) for one in (item, replace(item, **change))], "model", 2)) == 1


def test_neighbours_take_equally_many_rows():
    items = [Request("a goose", seed=i, num_inference_steps=1 + i % 3) for i in range(9)]
    chunks = plan(items, "model", 3, 3, rows=lambda item: item.num_inference_steps)
    assert [chunk.indices for chunk in chunks] == [(0, 3, 6), (1, 4, 7), (2, 5, 8)]
    assert all(chunk.ids == tuple(item.id("model") for item in chunk.items) for chunk in chunks)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "b"},
        {"seed": 1},
        {"guidance_scale": 2.0},
        {"scheduler": "ddim"},
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 60},
        {"guidance_rescale": 0.5},
    ],
)
def test_what_shares_a_batch(change):
    item = Request("a goose")
    (chunk,) = plan([item, replace(item, **change)], "model", 2)
    (unit,) = units(chunk)
    assert unit.requests == (item, replace(item, **change))


def test_no_guidance_reads_no_negative_prompt():
    assert (
        len(
            plan(
                [Request("a", guidance_scale=1.0), Request("a", negative_prompt="blue", guidance_scale=0.5)], "model", 2
            )
        )
        == 1
    )


def test_the_same_job_has_the_same_plan_and_other_lines_leave_its_ids():
    items = job(1)
    ids = plan(items, "model", 4, 8).ids
    assert plan(list(items), "model", 4, 8).ids == ids
    others = [Request("a goose", seed=i, width=128) for i in range(5)]
    mixed = items[:30] + others[:2] + items[30:] + others[2:]
    assert {*ids} < {*plan(mixed, "model", 4, 8).ids}


def test_a_chunk_id_depends_on_items_model_batch_and_format():
    items = [Request("a goose", seed=i) for i in range(4)]
    plans = [
        plan(items, "model", 2),
        plan(items, "another", 2),
        plan(items, "model", 4),
        plan(items, "model", 2, format="webdataset"),
        plan(items[::-1], "model", 2),
        plan([replace(items[0], seed=9), *items[1:]], "model", 2),
    ]
    assert len({made.ids[0] for made in plans}) == len(plans)


def test_the_content_of_a_lora_goes_into_the_ids_of_its_items_alone():
    items = [Request("a goose"), Request("a goose", loras=(("a.safetensors", 1.0),))]
    plain, styled = plan(items, "model", 1, loras={"a.safetensors": "1"})
    same, changed = plan(items, "model", 1, loras={"a.safetensors": "2"})
    assert plain.id == same.id
    assert plain.ids == (items[0].id("model"),)
    assert styled.id != changed.id and styled.ids != changed.ids


@pytest.mark.parametrize(("batch", "chunk_size", "expected"), [(4, 64, 64), (6, 64, 60), (8, 3, 8), (1, 1, 1)])
def test_chunks_are_whole_batches(batch, chunk_size, expected):
    assert len(plan([Request("a goose", seed=i) for i in range(100)], "model", batch, chunk_size)[0]) == expected


@pytest.mark.parametrize(("batch", "chunk_size"), [(0, 8), (8, 0), (-1, 8)])
def test_no_batch_and_no_chunk_are_refused(batch, chunk_size):
    with pytest.raises(ValueError, match="1 or more"):
        plan([Request("a goose")], "model", batch, chunk_size)


def test_a_chunk_is_small_to_send_and_comes_back_equal():
    items = read([{"prompt": [f"goose {i}" for i in range(2000)], "seed": "0:500"}])
    first = plan(items[:64], "model", 8)[0]
    assert pickle.loads(pickle.dumps(first)) == first
    assert len(pickle.dumps(first)) < 20_000


def test_long_prompts_are_apart_and_a_negative_prompt_counts_where_it_is_read():
    count = prompt_chunk_counter([CLIPTokenizer.from_pretrained(EMBEDDED_MODEL / "tokenizer")], lambda request: 50)
    long = "goose " * 100
    texts = [
        ("goose", None, 2.0),
        (long, None, 2.0),
        ("goose", long, 2.0),
        ("goose", long, 1.0),
        ("a BREAK b", "", None),
    ]
    items = [Request(prompt, negative_prompt=negative, guidance_scale=scale) for prompt, negative, scale in texts]
    chunks = [count(item) for item in items]
    assert chunks[0] == chunks[3] == 1
    assert chunks[1] == chunks[2] > 1
    assert chunks[4] == 2
    groups = plan(items, "model", 2, prompt_chunks=count).groups
    assert [group.prompt_chunks for group in groups] == [1, chunks[1], chunks[1], 1, 2]
    assert prompt_chunk_counter([], len)(items[1]) == 1


@pytest.mark.parametrize(
    ("changes", "compilations"),
    [
        ([{"guidance_interval": (0.3, 5.0)}, {"guidance_interval": (1.0, 2.0)}, {}], 2),
        ([{"guidance_interval": (0.3, 5.0)}, {"guidance_interval": (0.3, 5.0), "num_inference_steps": 9}], 1),
        ([{"cache_interval": 2}, {"cache_interval": 3}, {}], 2),
        ([{"vae_tiling": True}, {}], 2),
    ],
)
def test_the_numbers_of_the_intervals_are_data(changes, compilations):
    item = Request("a goose", width=64, height=64, guidance_scale=3.0)
    made = plan([replace(item, **change) for change in changes], "model", 1)
    assert (len(made), estimate(made).compilations) == (len(changes), compilations)


def test_an_estimate():
    sized = {"width": 64, "height": 64, "clip_skip": 0, "guidance_scale": 3.0}
    items = [Request("a goose", seed=i, **sized) for i in range(10)]
    items += [Request("a goose", seed=i, num_inference_steps=9, **sized) for i in range(3)]
    items += [Request("a goose", seed=i, **sized | {"width": 128}) for i in range(2)]
    found = estimate(plan(items, "model", 4, 8), "png", rate=0.5)
    assert (found.items, found.chunks, found.units, found.compilations) == (15, 3, 5, 2)
    assert found.bytes == pytest.approx((13 * 64 * 64 + 2 * 64 * 128) * BYTES_PER_PIXEL["png"], abs=1)
    assert found.seconds == 30
    assert estimate(plan(items, "model", 4, 8)).seconds is None


@pytest.fixture(scope="module")
def pipe():
    from sdjax import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained()


def test_check_fills_in_what_is_the_models(pipe):
    lines = [{"prompt": "a goose", "width": [None, 32], "seed": "0:2"}, {"prompt": "a duck", "guidance_scale": 2}]
    size = pipe.unet.config.sample_size * pipe.vae.config.factor
    filled = check(read(lines), pipe)
    own = {"negative_prompt": "", "height": size, "clip_skip": 0}
    expected = [Request("a goose", seed=s, guidance_scale=3.0, width=w, **own) for w in (size, 32) for s in (0, 1)]
    assert list(filled) == [*expected, Request("a duck", guidance_scale=2.0, width=size, **own)]
    assert filled[0].id("") == check(read([{"prompt": "a goose", "width": size, "clip_skip": 0}]), pipe)[0].id("")


def test_check_leaves_out_what_sdxl_tells_from_an_empty_text(pipe, monkeypatch):
    monkeypatch.setitem(pipe.config, "force_zeros_for_empty_prompt", True)
    assert [i.negative_prompt for i in check(read([{"prompt": "a", "negative_prompt": [None, ""]}]), pipe)] == [
        None,
        "",
    ]


def test_check_lists_what_the_model_cannot_do(pipe):
    lines = [
        {"prompt": "a goose", "width": 33},
        {"prompt": "a goose"},
        {"prompt": "a goose", "num_inference_steps": [5, 100_000], "scheduler": [None, "ddim"], "height": [32, 31]},
        {"prompt": "a goose", "clip_skip": 99},
    ]
    with pytest.raises(ValueError) as error:
        check(read(lines, {"seed": "0:1000"}), pipe)
    first, *found = str(error.value).splitlines()
    assert first.startswith("job: 4 problems")
    words = [("line 1", "width", "33"), ("line 3", "100000"), ("line 3", "height", "31"), ("line 4", "clip_skip")]
    assert all(word in line for line, of_line in zip(found, words, strict=True) for word in of_line)


def test_check_finds_pictures_that_are_equal_for_this_model(pipe):
    with pytest.raises(ValueError, match="line 2: makes the picture of line 1 again"):
        check(read([{"prompt": "a goose"}, {"prompt": "a goose", "guidance_scale": 3}]), pipe)
    with pytest.raises(ValueError, match=r"line 1: guidance_scale has 3.0 twice"):
        check(read([{"prompt": "a goose", "guidance_scale": [None, 3]}]), pipe)
