"""What a server does with a request that its parts no longer take."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from sdjax.request import Request
from sdjax.serve import settings, sizes, warming
from sdjax.serve.catalog import Catalog
from sdjax.serve.fields import Asked
from sdjax.serve.forms import Forms
from sdjax.serve.gallery import InMemory
from sdjax.serve.held import Held, Share
from sdjax.serve.limits import Limits
from sdjax.serve.networks import Choice
from sdjax.serve.orders import Orders
from sdjax.serve.studio import Ending, Failed, Studio


def studio(models=None, orders=None) -> Studio:
    return Studio(models, *[None] * 4, InMemory(), orders, None, Limits(), places=1, queue=1)


def test_a_picture_that_is_no_longer_kept_is_no_empty_one():
    with pytest.raises(Failed, match="no longer kept"):
        studio().file(SimpleNamespace(name="goose-7.png"))


@pytest.mark.parametrize("is_ended", [False, True])
def test_what_becomes_of_a_picture_whose_folder_is_full(is_ended):
    """Its error has no path; where the server has ended, it is cancelled, and nobody waits for it."""

    class Full(InMemory):
        def add(self, *given):
            raise OSError(28, "No space left on device", "/secret/goose.png")

    job = SimpleNamespace(
        future=Future(), request=Request("goose"), group=SimpleNamespace(shape=()), rows=1, begun=1.0, row=1
    )
    loaded = SimpleNamespace(name="one", engine=SimpleNamespace(submit=lambda *given, **more: job))
    share = Share(Held(9), 9)
    share.take("image", 9)

    async def run(orders):
        order = await orders.take(Asked(job.request, [7], None, share, Choice()), loaded, None, "native", None)
        if is_ended:
            orders.close()
        job.future.set_result(SimpleNamespace(pixels=np.zeros((8, 8, 3), np.uint8), nsfw=False))
        await asyncio.wait_for(order.ended.wait(), 10)
        return order.drawings[0].json()

    orders = Orders(Full(), Catalog("LoRA", None), SimpleNamespace(picture=lambda *given: None), Forms(9))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(settings, "of_request", lambda *given: {"prompt": "goose", "seed": 7})
        found = asyncio.run(run(orders))
    assert found["state"] == ("cancelled" if is_ended else "failed")
    assert found.get("error") == (None if is_ended else "No space left on device")
    if not is_ended:
        share.take("image", 9)  # it was given back


@pytest.mark.parametrize(
    "places, devices, queue, counts",
    [(1, 1, 256, [1]), (4, 2, 256, [2, 4, 8]), (6, 1, 256, [1, 2, 4, 6]), (4, 8, 10, [8, 10])],
)
def test_programs_for_each_number_of_places_are_compiled(places, devices, queue, counts):
    assert warming.counts(places, devices, queue) == counts


def test_a_request_that_waits_for_a_model_while_the_server_ends_is_not_made(monkeypatch):
    monkeypatch.setattr(sizes, "check", lambda *given: None)
    monkeypatch.setattr(Studio, "_view", lambda *given: None)
    ending = studio(orders=SimpleNamespace(cancel_waiting=lambda: None))

    async def get(wanted):
        ending.end()

    ending.models = SimpleNamespace(get=get)
    with pytest.raises(Ending):
        asyncio.run(ending.take(Asked(None, [], None, None), "native", SimpleNamespace(client=None)))
