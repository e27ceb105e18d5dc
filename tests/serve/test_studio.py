"""What a server does with a request that its parts no longer take."""

import asyncio
from types import SimpleNamespace

import pytest

from sdjax.serve import sizes, warming
from sdjax.serve.gallery import InMemory
from sdjax.serve.limits import Limits
from sdjax.serve.studio import Ending, Failed, Studio


def studio(models=None, orders=None) -> Studio:
    return Studio(models, None, None, InMemory(), orders, None, Limits(), places=1, queue=1)


def test_a_picture_that_is_no_longer_kept_is_no_empty_one():
    with pytest.raises(Failed, match="no longer kept"):
        studio().file(SimpleNamespace(name="goose-7.png"))


@pytest.mark.parametrize(
    "places, devices, queue, counts",
    [(1, 1, 256, [1]), (4, 2, 256, [2, 4, 8]), (6, 1, 256, [1, 2, 4, 6]), (4, 8, 10, [8, 10])],
)
def test_programs_for_each_number_of_places_are_compiled(places, devices, queue, counts):
    assert warming.counts(places, devices, queue) == counts


def test_a_request_that_waits_for_a_model_while_the_server_ends_is_not_made(monkeypatch):
    monkeypatch.setattr(sizes, "check", lambda *given: None)
    ending = studio(orders=SimpleNamespace(cancel_waiting=lambda: None))

    async def get(wanted):
        ending.end()

    ending.models = SimpleNamespace(get=get)
    with pytest.raises(Ending):
        asyncio.run(ending.take(SimpleNamespace(model=None, request=None), "native", SimpleNamespace(client=None)))
