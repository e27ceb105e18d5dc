"""Networks beside a model: which stay loaded, and what requests do without."""

import itertools
from types import SimpleNamespace

import pytest

from sdjax import components
from sdjax.request import Request
from sdjax.serve import networks
from sdjax.serve.loading import CannotLoad
from sdjax.serve.networks import KEPT, VIEWS, Choice, Networks


class Pipe:
    """In place of a pipeline."""

    controls, controlnets, ip_adapters = ("controlnet", "adapter"), ("controlnet",), ("ip_adapter",)
    unet = SimpleNamespace(conv_in=SimpleNamespace(dtype=None))
    controlnet, ip_adapter = "own", SimpleNamespace(config=SimpleNamespace(kind="plain"))

    def with_networks(self, **given):
        return given


@pytest.fixture
def loaded(monkeypatch):
    """What is loaded, as it is."""
    found = []
    monkeypatch.setattr(components, "load_model", lambda kind, path, **more: found.append(path) or path)
    return found


CATALOG = SimpleNamespace(path=lambda name: f"/{name}")
GOOSE = Request("goose")
WITHOUT = {"controlnet": None, "adapter": None, "ip_adapter": None}


def view(held, *names, request=GOOSE):
    return held.view(request, Choice(names or None), CATALOG, CATALOG)


def test_what_a_request_shows_no_picture_is_left_out(loaded):
    held = Networks(pipe := Pipe())
    assert view(held) == WITHOUT
    shown = Request("goose", control_image=("picture",))
    assert view(held, request=shown) == {"ip_adapter": None}
    assert view(held, "a", request=shown) == WITHOUT | {"controlnet": "/a"}
    assert view(held, "a", "controlnet", request=shown) == WITHOUT | {"controlnet": "/a", "controlnet_1": "own"}
    both = Request("goose", control_image=("picture",), ip_adapter_image=(("picture",),))
    assert view(held, request=both) is pipe
    assert loaded == ["/a"]


def test_those_that_were_used_last_stay(loaded):
    held = Networks(Pipe())
    names = [str(i) for i in range(KEPT)]
    for name in (*names, "0", "more", "0"):
        view(held, name)
    assert loaded == [f"/{name}" for name in (*names, "more")]
    view(held, "1")
    assert loaded[-1] == "/1"
    many = [str(i) for i in range(2 * KEPT)]
    view(held, *many)
    count = len(loaded)
    view(held, *many)
    assert len(loaded) == count


def test_where_memory_is_short_others_are_freed(loaded, monkeypatch):
    held = Networks(Pipe())
    view(held, "a")
    view(held, "b")
    monkeypatch.setattr(networks, "fits", lambda path: False)
    for name in ("c", "c", "a"):
        view(held, name)
    assert loaded == ["/a", "/b", "/c", "/a"]


@pytest.mark.parametrize(
    "error, said",
    [(MemoryError(), "a: does not fit into the memory"), (ValueError("/a: is damaged"), "a: cannot be loaded: a: is")],
)
def test_what_cannot_be_loaded_is_said_without_its_place(monkeypatch, error, said):
    def load(*given, **more):
        raise error

    monkeypatch.setattr(components, "load_model", load)
    with pytest.raises(CannotLoad, match=f"^{said}"):
        view(Networks(Pipe()), "a")


def test_views_are_few(loaded):
    held = Networks(Pipe())
    every = [(names, view(held, *names)) for names in itertools.product("ab", repeat=5)]
    again = [view(held, *names) is seen for names, seen in reversed(every)]
    assert again == [True] * VIEWS + [False] * (len(every) - VIEWS)
