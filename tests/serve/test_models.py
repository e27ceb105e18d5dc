"""sdjax.serve.models and catalogs: what is chosen by name, loaded, kept and freed."""

import asyncio
from pathlib import Path

import pytest

from sdjax.serve import catalog, loading
from sdjax.serve.catalog import Catalog, Unknown
from sdjax.serve.loading import CannotLoad
from sdjax.serve.models import Models


class Engine:
    """In place of one that makes pictures."""

    def __init__(self, pipe):
        self.pipe, self.is_closed = pipe, False

    def close(self, *, finish=True):
        self.is_closed = True


@pytest.fixture
def folder(tmp_path):
    for name in ("a.safetensors", "b.ckpt", "more/a.safetensors", "more/b.txt", ".hidden.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0" * 10)
    (tmp_path / "whole" / "unet").mkdir(parents=True)
    (tmp_path / "whole" / "model_index.json").write_text("{}")
    (tmp_path / "whole" / "unet" / "model.safetensors").write_bytes(b"0" * 50)
    return tmp_path


def test_models_are_files_and_folders(folder):
    assert list(Catalog("model", folder, catalog.models).paths) == ["a", "b", "more/a", "whole"]
    assert list(Catalog("LoRA", folder).paths) == ["a", "b", "more/a", "whole/unet/model"]
    assert not Catalog("LoRA", None).paths


def test_networks_that_are_no_models_are_in_folders_of_their_own(folder):
    for name in (
        "ControlNet/a.safetensors",
        "ESRGAN/more/x4.pth",
        "RealESRGAN/x4.pth",
        "RealESRGAN/x2.pth",
        "Lora/b.pt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "ControlNet" / "canny").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / "ControlNet" / "canny" / name).touch()
    assert list(Catalog("model", folder, catalog.models).paths) == ["a", "b", "more/a", "whole"]
    controlnets = Catalog("ControlNet", folder, catalog.networks, catalog.CONTROLNETS)
    assert list(controlnets.paths) == ["a", "canny"]
    assert controlnets.path(controlnets.name("a")) == folder / "ControlNet" / "a.safetensors"
    upscalers = Catalog("upscaler", folder, catalog.networks, catalog.UPSCALERS)
    assert list(upscalers.paths) == ["more/x4", "x2", "x4"]


def test_what_is_called_so_is_found(folder):
    listed = Catalog("model", folder, catalog.models)
    names = {"a": "a", "a.safetensors": "a", "b.ckpt": "b", "more/a": "more/a", "whole": "whole"}
    assert {wanted: listed.name(wanted) for wanted in names} == names
    for wanted in ("c", "../a", str(folder / "a.safetensors"), "", None, 3, ["a"], {"a": 1}, "more", "\ud800"):
        with pytest.raises(Unknown, match="there is no model"):
            listed.name(wanted)


def test_names_that_differ_by_their_suffix_alone_have_it(folder):
    (folder / "a.ckpt").touch()
    assert {"a.ckpt", "a.safetensors"} <= Catalog("model", folder, catalog.models).paths.keys()


def test_what_has_gone_is_unknown(folder, monkeypatch):
    monkeypatch.setattr(catalog, "FRESH", -1.0)
    listed = Catalog("LoRA", folder)
    assert listed.path("a") == folder / "a.safetensors"
    (folder / "a.safetensors").unlink()
    with pytest.raises(Unknown, match="there is no LoRA 'a'"):
        listed.path("a")


def opened(folder, load=lambda source: (source, {}, [])) -> Models:
    return Models(("first", None), Catalog("model", folder, catalog.models), load, Engine)


def test_what_is_loaded_stays_while_there_is_memory(folder, monkeypatch):
    monkeypatch.setattr(loading, "_free", lambda: 1000.0)
    held = opened(folder)
    first, whole = (asyncio.run(held.get(name)) for name in (None, "whole"))
    assert (first.pipe, Path(whole.pipe)) == (None, folder / "whole")
    assert asyncio.run(held.get("first")) is first
    assert [engine.is_closed for engine in held.engines] == [False, False]
    assert held.names == ["first", "a", "b", "more/a", "whole"]


def test_what_was_used_the_longest_ago_is_freed(folder, monkeypatch):
    held = opened(folder)
    monkeypatch.setattr(loading, "_free", lambda: 60.0)
    a, b = (asyncio.run(held.get(name)) for name in ("a", "b"))
    assert asyncio.run(held.get("a")) is a
    monkeypatch.setattr(loading, "_free", lambda: 60.0 + 60.0 * b.engine.is_closed)
    whole = asyncio.run(held.get("whole"))
    assert (a.engine.is_closed, b.engine.is_closed) == (False, True)
    assert held.has(whole)
    assert not held.has(b)


def test_where_loading_runs_out_of_memory_others_are_freed(folder):
    held = opened(folder)
    first = asyncio.run(held.get())

    def load(source):
        if not first.engine.is_closed:
            raise MemoryError
        return source, {}, []

    held.load_pipe = load
    asyncio.run(held.get("a"))
    assert first.engine.is_closed


@pytest.mark.parametrize(
    "error, said",
    [
        (lambda source: ValueError(f"{source}: is damaged"), "a: is damaged"),
        (lambda source: PermissionError(13, "Permission denied", "/elsewhere/a"), "Permission denied"),
    ],
)
def test_what_cannot_be_loaded_is_said_without_its_place(folder, error, said):
    def load(source):
        raise error(source)

    held = opened(folder, load)
    with pytest.raises(CannotLoad, match=f"^a: cannot be loaded: {said}$"):
        asyncio.run(held.get("a"))


def test_several_that_wait_for_a_model_load_it_once(folder):
    loaded = []
    held = opened(folder, lambda source: (loaded.append(source), {}, []))

    async def ask():
        return await asyncio.gather(*(held.get("a") for _ in range(5)))

    assert len(set(map(id, asyncio.run(ask())))) == 1
    assert len(loaded) == 1
