"""sdjax.engine.ContinuousEngine: a request's picture is what the pipeline makes of it alone, whatever is beside it."""

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import jax
import numpy as np
import pytest
from compilations import compilations
from PIL import Image

from sdjax.engine import ContinuousEngine, QueueFull, continuous
from sdjax.engine.groups import Group
from sdjax.engine.job import Job
from sdjax.engine.slots import Slots
from sdjax.engine.waiting import Waiting
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import FIELDS, Request
from sdjax.runtime import parallel
from sdjax.runtime.lowering import DoesNotFit

GOOSE = Request("goose", num_inference_steps=3, guidance_scale=3.0, width=32, height=32)
PICTURE = FIELDS["image"].check(Image.effect_noise((32, 32), 90).convert("RGB"))
MASK = FIELDS["mask_image"].check(Image.fromarray(np.uint8(255 * (np.indices((32, 32))[0] > 15))))


@pytest.fixture(scope="module")
def pipe(one_level_folder) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(one_level_folder, mesh=parallel.data_mesh(jax.devices()[:2]))


def pixels(pipe, request):
    return np.asarray(pipe.sample([request], output_type="jax").images[0]) * 255


def check(pipe, requests, results):
    for request, result in zip(requests, results, strict=True):
        assert np.abs(result.pixels - pixels(pipe, request)).max() <= 1, request


def run(pipe, requests, wait=0.0, **options):
    with ContinuousEngine(pipe, **options) as engine:
        jobs = []
        for request in requests:
            jobs.append(engine.submit(request))
            time.sleep(wait)
        return [job.future.result() for job in jobs]


MIXED = [
    GOOSE,
    replace(GOOSE, prompt="a duck", seed=1, num_inference_steps=6, scheduler="euler_ancestral"),
    replace(GOOSE, seed=2, num_inference_steps=4, scheduler="heun", guidance_rescale=0.5),
    replace(GOOSE, prompt="swan", seed=3, num_inference_steps=12, scheduler="dpmpp_2m_karras", guidance_scale=9.0),
    replace(GOOSE, seed=4, num_inference_steps=5, scheduler="dpm2", guidance_interval=(0.3, 5.0)),
    replace(GOOSE, seed=5, num_inference_steps=9, scheduler="lcm"),
    replace(GOOSE, seed=6, num_inference_steps=20, scheduler="ddpm"),
    replace(GOOSE, seed=7, num_inference_steps=2, scheduler="pndm"),
]
KINDS = {
    "mixed samplers, steps and guidance": MIXED,
    "without guidance, and with it": [replace(GOOSE, guidance_scale=1.0, seed=8), GOOSE],
    "from pictures": [
        replace(GOOSE, image=PICTURE, strength=0.9, num_inference_steps=9),
        replace(GOOSE, image=PICTURE, strength=0.3, num_inference_steps=9, seed=1, scheduler="euler_ancestral"),
    ],
    "masks": [
        replace(GOOSE, image=PICTURE, mask_image=MASK, num_inference_steps=4),
        replace(GOOSE, image=PICTURE, mask_image=MASK, num_inference_steps=9, seed=1, strength=0.7),
        replace(GOOSE, image=PICTURE, mask_image=MASK, num_inference_steps=7, soft_mask=True, mask_blur=3.0),
    ],
    "PyTorch's noise": [
        replace(GOOSE, noise="torch", scheduler="euler_ancestral", num_inference_steps=7),
        replace(GOOSE, noise="torch", scheduler="ddim", num_inference_steps=2),
    ],
    "changing prompts": [
        replace(GOOSE, prompt="[goose|duck] swan", num_inference_steps=5),
        replace(GOOSE, prompt="[goose:duck:0.5]", num_inference_steps=8),
        replace(GOOSE, prompt="goose AND duck", num_inference_steps=3),
        replace(GOOSE, prompt=f"goose [x:{'duck ' * 90}:5]", num_inference_steps=4, scheduler="heun"),  # of 7 rows
        GOOSE,
    ],
    "long prompts and sizes": [replace(GOOSE, prompt="goose " * 90), replace(GOOSE, width=16), GOOSE],
    "a second pass, kept features, tiles": [
        replace(GOOSE, hires_scale=2.0),
        replace(GOOSE, cache_interval=2, num_inference_steps=4),
        replace(GOOSE, vae_tiling=True),
    ],
    "more of guidance": [
        replace(GOOSE, cfg_plus_plus=True, guidance_scale=0.6, scheduler="ddim"),
        replace(GOOSE, perp_neg_scale=1.0, negative_prompt="duck"),
        replace(GOOSE, mimic_scale=3.0),
        replace(GOOSE, pag_scale=2.0, freeu=(0.9, 0.2, 1.2, 1.4), num_inference_steps=5),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_that_of_the_request_alone(pipe, kind):
    check(pipe, KINDS[kind], run(pipe, KINDS[kind]))


def test_requests_that_come_while_others_run(pipe):
    check(pipe, MIXED, run(pipe, MIXED, wait=0.05, places=2))


def test_nothing_compiles_for_other_samplers_steps_and_guidance(pipe):
    with ContinuousEngine(pipe, places=2) as engine:
        [job.future.result() for job in [engine.submit(request) for request in MIXED[:4]]]
        with compilations() as names:
            [job.future.result() for job in [engine.submit(request) for request in reversed(MIXED[4:])]]
    assert not names


def test_a_picture_that_is_wanted_no_more_frees_its_place(pipe):
    with ContinuousEngine(pipe, places=1) as engine:
        endless = [engine.submit(replace(GOOSE, num_inference_steps=900, seed=seed)) for seed in range(2)]
        waiting = engine.submit(replace(GOOSE, num_inference_steps=999))
        begun = threading.Event()
        endless[0].preview().add_done_callback(lambda _: begun.set())
        assert begun.wait(60) and 0 < endless[0].row < 900
        last = engine.submit(GOOSE)
        assert all(job.future.cancel() for job in (*endless, waiting))
        check(pipe, [GOOSE], [last.future.result(60)])
    assert all(job.row < 900 for job in endless) and not waiting.row


def test_previews_are_pictures_on_the_way(pipe):
    with ContinuousEngine(pipe, places=1) as engine:
        job = engine.submit(replace(GOOSE, num_inference_steps=50))
        found = [job.preview().result(60) for _ in range(2)]
        done = job.future.result(60)
        late = job.preview()
        assert late.cancelled()
    assert [picture.size for picture in found] == [(32, 32)] * 2
    assert done.pixels.shape == (32, 32, 3)


def test_whoever_asks_for_the_next_preview_at_once_holds_nothing_up(pipe):
    with ContinuousEngine(pipe, places=1) as engine:
        job = engine.submit(replace(GOOSE, num_inference_steps=30))
        seen = []

        def again(preview):
            if not preview.cancelled():
                seen.append(preview.result())
                job.preview().add_done_callback(again)

        job.preview().add_done_callback(again)
        assert job.future.result(60)
    assert 0 < len(seen) <= 30


def test_a_request_that_is_cancelled_while_it_waits_ends_its_previews(pipe):
    with ContinuousEngine(pipe, places=1) as engine:
        endless = [engine.submit(replace(GOOSE, num_inference_steps=900, seed=seed)) for seed in range(2)]
        waiting = engine.submit(GOOSE)
        preview = waiting.preview()
        waiting.future.cancel()
        with pytest.raises(CancelledError):
            preview.result(60)
        assert all(job.future.cancel() for job in endless)


def test_pictures_that_are_made_in_one_call_let_others_go_on(pipe):
    with ContinuousEngine(pipe, places=1) as engine:
        endless = engine.submit(replace(GOOSE, num_inference_steps=900))
        rows = []
        whole = [engine.submit(replace(GOOSE, cache_interval=2, seed=seed)) for seed in range(4)]
        for job in whole:
            job.future.result(60)
            rows.append(endless.row)
        endless.future.cancel()
    assert 0 < rows[-1] < 900 and rows[1] < rows[-1]


def test_programs_may_be_dropped_while_others_run(pipe):
    """As a server does where there are too many."""
    requests = [replace(GOOSE, seed=seed, num_inference_steps=100) for seed in range(2)]
    with ContinuousEngine(pipe) as engine:
        jobs = [engine.submit(request) for request in requests]
        for row in (1, 40):
            while not any(job.row >= row or job.future.done() for job in jobs):
                time.sleep(0.001)
            jax.clear_caches()
        results = [job.future.result() for job in jobs]
    check(pipe, requests, results)


def test_networks_of_a_view_are_beside_others(one_level_folder, tmp_path):
    """Each picture is what a pipeline with its networks makes, with the LoRA of its request."""
    import diffusers
    import lora_files
    import oracle
    import safetensors.torch
    import test_controlnet

    network = test_controlnet.controlnet(oracle.ONE_LEVEL, 5, **test_controlnet.HINT)
    network.save_pretrained(tmp_path / "net")
    unet = diffusers.UNet2DConditionModel.from_pretrained(one_level_folder, subfolder="unet")
    lora = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(lora_files.kohya(lora_files.factors({"unet": unet}, 2)), lora)
    options = {"mesh": parallel.data_mesh(jax.devices()[:2])}
    plain, other = (StableDiffusionPipeline.from_pretrained(one_level_folder, **options) for _ in range(2))
    whole = StableDiffusionPipeline.from_pretrained(one_level_folder, controlnet=tmp_path / "net", **options)
    view = plain.with_networks(controlnet=whole.controlnet)
    assert (plain.controls, view.controls) == ((), ("controlnet",))
    shown = replace(GOOSE, control_image=(PICTURE,), controlnet_conditioning_scale=(2.0,))
    with ContinuousEngine(plain) as engine:
        wanted = [(GOOSE, None), (shown, view), (replace(GOOSE, seed=1), None), (replace(shown, seed=1), view)]
        wanted += [(replace(request, loras=((str(lora), 1.0),)), own) for request, own in wanted[:2]]
        jobs = [engine.submit(request, pipe=own) for request, own in wanted]
        results = [job.future.result() for job in jobs]
        with pytest.raises(ValueError, match="only with a ControlNet or a T2I-Adapter"):
            engine.submit(shown)
    check(other, [GOOSE, replace(GOOSE, seed=1)], results[:3:2])
    check(whole, [shown, replace(shown, seed=1)], results[1:4:2])
    for made in (other, whole):
        made.load_lora(lora)
    check(other, [GOOSE], results[4:5])
    check(whole, [shown], results[5:])


def test_groups_that_find_no_room_wait_for_one(pipe, monkeypatch):
    monkeypatch.setattr(continuous, "ROOMS", 1)
    requests = [replace(GOOSE, width=16, seed=1), GOOSE, replace(GOOSE, width=16, seed=2), replace(GOOSE, seed=3)]
    check(pipe, requests, run(pipe, requests))


def test_a_picture_that_cannot_be_decoded_fails_its_request(pipe, monkeypatch):
    def output(*_, **__):
        raise OutOfMemory

    with ContinuousEngine(pipe) as engine:
        monkeypatch.setattr(pipe, "output", output)
        job = engine.submit(GOOSE)
        with pytest.raises(DoesNotFit):
            job.future.result(60)
        monkeypatch.undo()
        check(pipe, [GOOSE], [engine.submit(GOOSE).future.result(60)])


def test_what_is_ahead_is_by_turns_and_priority():
    waiting, group = Waiting(9), Group.of(GOOSE, 1)
    jobs = [Job(GOOSE, None, group, 1, owner, priority) for owner, priority in [(1, 0), (1, 0), (1, 0), (2, 0), (3, 1)]]
    for job in jobs:
        waiting.push(job)
    assert [waiting.ahead([job]) for job in jobs] == [1, 3, 4, 2, 0]
    assert waiting.ahead(jobs[1:3]) == 3
    jobs[4].future.cancel()
    assert waiting.ahead(jobs[1:3]) == 2
    assert waiting.ahead([]) == 0


def test_an_owner_of_many_waits_for_others_in_turn_and_priority_goes_first(pipe):
    order = []
    with ContinuousEngine(pipe, places=1, waiting=9) as engine:
        first = [engine.submit(replace(GOOSE, num_inference_steps=60, seed=seed), owner="a") for seed in range(2)]
        while not all(job.row for job in first):
            time.sleep(0.01)

        def submit(name, **options):
            engine.submit(replace(GOOSE, seed=len(order)), **options).future.add_done_callback(
                lambda _: order.append(name)
            )

        for _ in range(5):
            submit("a", owner="a")
        submit("b", owner="b")
        submit("urgent", owner="c", priority=1)
        for _ in range(2):
            submit("a", owner="a")
        with pytest.raises(QueueFull, match="9 requests are waiting"):
            submit("one too many")
    assert order.index("urgent") < 2 and order.index("b") < 4 and len(order) == 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scheduler": "nonsense"}, "unknown sampler"),
        ({"width": 33}, "width must be a positive multiple"),
        ({"strength": 0.5}, "strength: only with image"),
        ({"hires_strength": 0.5}, "hires_strength: only with hires_scale"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_at_once(pipe, wrong, message):
    with ContinuousEngine(pipe) as engine, pytest.raises(ValueError, match=message):
        engine.submit(replace(GOOSE, **wrong))


class OutOfMemory(jax.errors.JaxRuntimeError):
    def __init__(self):
        super().__init__("RESOURCE_EXHAUSTED: Out of memory allocating 9999 bytes.")


def test_a_device_out_of_memory_has_fewer_pictures_at_once(pipe, monkeypatch):
    run_rows = Slots.run

    def limited(self, rows):
        if self.width > 1:
            raise OutOfMemory
        return run_rows(self, rows)

    monkeypatch.setattr(Slots, "run", limited)
    check(pipe, MIXED, run(pipe, MIXED))


def test_a_request_that_fails_fails_alone(pipe, monkeypatch):
    run_rows, admit = Slots.run, Slots.admit

    def limited(self, rows):
        if self.group.width == 64:
            raise OutOfMemory
        return run_rows(self, rows)

    def refusing(self, jobs, devices):
        if any(job.request.prompt == "duck" for job in jobs):
            raise ValueError("prompt: no ducks")
        return admit(self, jobs, devices)

    monkeypatch.setattr(Slots, "run", limited)
    monkeypatch.setattr(Slots, "admit", refusing)
    with ContinuousEngine(pipe) as engine:
        large, duck, goose = map(engine.submit, (replace(GOOSE, width=64), replace(GOOSE, prompt="duck"), GOOSE))
        with pytest.raises(DoesNotFit, match="64x32 does not fit"):
            large.future.result()
        with pytest.raises(ValueError, match="no ducks"):
            duck.future.result()
        check(pipe, [GOOSE], [goose.future.result()])


def test_closing_finishes_or_cancels(pipe):
    engine = ContinuousEngine(pipe, places=1)
    jobs = [engine.submit(replace(GOOSE, num_inference_steps=900)) for _ in range(4)]
    engine.close(finish=False)
    for job in jobs:
        with pytest.raises(CancelledError):
            job.future.result(0)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(GOOSE)
    assert pipe.shows_progress
