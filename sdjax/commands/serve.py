"""`sdjax serve`: the command's options. What it needs is imported when it runs."""

import asyncio
import functools
import gc
import importlib.util
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sdjax.commands.generate import loaded
from sdjax.commands.model_options import SETTINGS, model_options
from sdjax.commands.options import check_writable, print_warning

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline
    from sdjax.serve.catalog import Catalog
    from sdjax.serve.limits import Limits
    from sdjax.serve.studio import Studio

LOCAL = "127.0.0.1"
EMBEDDED = "embedded"
PLACES = ("model", "vae", "controlnet", "adapter", "upscaler", "ip_adapters", "image_encoder_folder", "embeddings")
"""SETTINGS that are paths of this machine, which no picture that is sent carries"""
KEY_LENGTH = 16  # characters, at least
PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


@model_options
def serve(
    of_model: Mapping[str, Any],
    host: Annotated[str, typer.Option(help="The address to listen on")] = LOCAL,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 7860,
    models: Annotated[Path | None, typer.Option(help="A folder of models to choose from", show_default=False)] = None,
    loras: Annotated[
        Path | None, typer.Option(help="A folder of LoRAs, for <lora:NAME:0.8> in prompts", show_default=False)
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="A folder of textual inversions, which prompts call by name", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the pictures [default: the last ones in memory]")
    ] = None,
    listen: Annotated[bool, typer.Option("--listen", help="On all addresses: 0.0.0.0")] = False,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that every request must have", show_default=False)
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let whoever reaches it use it without a key")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name of this server; .example.com: all below; repeatable")
    ] = None,
    places: Annotated[int, typer.Option(min=1, max=256, help="Pictures of a kind that a device makes at once")] = 4,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that may wait")] = 256,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture")] = 2048 * 2048,
    max_steps: Annotated[int, typer.Option(min=1, help="Of a picture")] = 150,
) -> None:
    """Serve a model over HTTP: a page, sdjax's own API, that of the web UI, and OpenAI's."""
    address = "0.0.0.0" if listen and host == LOCAL else host
    rules = {"is_local": _is_loopback(address), "hosts": tuple(name.lower() for name in allow_host or ())}
    rules |= {"own": address.lower(), "key": _key(api_key_file)}
    if not rules["is_local"] and rules["key"] is None:
        if not no_auth:
            wanted = "--listen" if listen else f"--host {host}"
            raise ValueError(f"{wanted}: whoever reaches this machine could use it; give --api-key-file, or --no-auth")
        print_warning("--no-auth: WHOEVER REACHES THIS MACHINE CAN USE IT, AND SEES ALL PICTURES")
    for option, folder in (("--models", models), ("--loras", loras), ("--embeddings", embeddings)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} {folder}: there is no such folder")
    if out is not None:
        _make(out)
    _check_installed()
    gc.enable()

    from sdjax.serve import app, server
    from sdjax.serve.limits import Limits
    from sdjax.serve.security import Rules

    listening = server.bound(address, port)
    limits = Limits(pixels=max_pixels, steps=max_steps)
    folders = {"models": models, "loras": loras, "embeddings": embeddings, "out": out}
    studio = _studio(of_model, folders, limits, places, queue)
    place = server.address(listening)
    serving = app.create(studio, Rules(**rules, body=limits.body, bodies=limits.bodies))
    asyncio.run(server.Server(serving, studio, lambda: _say(place), _leave).serve([listening]))


def _say(place: str) -> None:
    print(place, flush=True)


def _leave(is_done: bool) -> NoReturn:
    """Also within a signal, and while threads wait for a compiler."""
    if not is_done:
        os.write(2, b"warning: ended before all that ran was done\n")
    os._exit(0 if is_done else 1)


def _studio(
    of_model: Mapping[str, Any], folders: Mapping[str, Path | None], limits: "Limits", places: int, queue: int
) -> "Studio":
    """The parts of the server, its first model loaded."""
    from sdjax.engine import ContinuousEngine
    from sdjax.serve import catalog
    from sdjax.serve.catalog import Catalog
    from sdjax.serve.forms import Forms
    from sdjax.serve.gallery import InFolder, InMemory
    from sdjax.serve.metrics import Metrics
    from sdjax.serve.models import Models
    from sdjax.serve.orders import Orders
    from sdjax.serve.studio import Studio
    from sdjax.serve.upscaling import Upscalers

    listed = Catalog("model", folders["models"], catalog.models)
    loras, embeddings = Catalog("LoRA", folders["loras"]), Catalog("embedding", folders["embeddings"])
    controlnets, upscalers = (
        Catalog(kind, folders["models"], catalog.networks, names)
        for kind, names in (("ControlNet", catalog.CONTROLNETS), ("upscaler", catalog.UPSCALERS))
    )

    def load(source: str | None) -> tuple["StableDiffusionPipeline", dict[str, Any], list[str]]:
        pipe = loaded(of_model | {"model": source})
        words = _learn(pipe, embeddings.paths)
        kept = {**of_model, "dtype": str(pipe.unet.conv_in.kernel.dtype)}
        return pipe, {name: value for name, value in kept.items() if name in SETTINGS and name not in PLACES}, words

    first = _first(of_model.get("model"), listed)
    engines = functools.partial(ContinuousEngine, places=places, waiting=queue)
    held, metrics = Models(first, listed, load, engines), Metrics()
    gallery = InMemory() if folders["out"] is None else InFolder(folders["out"])
    held.load(first[0])
    orders = Orders(gallery, loras, metrics, Forms(limits.forms))
    larger = Upscalers(upscalers, limits.source_pixels)
    return Studio(held, loras, embeddings, controlnets, larger, gallery, orders, metrics, limits, places, queue)


def _first(model: str | None, listed: "Catalog") -> tuple[str, str | None]:
    """The name and the source of the model that is used at first: the one that is given, else the first of the folder,
    else the embedded one."""
    if model is None and listed.paths:
        name, path = next(iter(listed.paths.items()))
        return name, str(path)
    if model is None:
        return EMBEDDED, None
    return (Path(model).name if Path(model).exists() else model), model


def _learn(pipe: "StableDiffusionPipeline", paths: Mapping[str, Path]) -> list[str]:
    """Teaches a model the words of a folder that fit it, each by its name, and returns them."""
    from sdjax.checkpoints.errors import CheckpointError

    learned = []
    for name, path in paths.items():
        try:
            learned.append(pipe.load_textual_inversion(path, name))
        except CheckpointError:  # of another family
            continue
        except ValueError as error:
            print_warning(f"--embeddings: {name}: {error}")
    return learned


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text("utf-8", errors="replace").strip()
    except OSError as error:
        raise ValueError(f"--api-key-file {path}: cannot be read: {error.strerror}") from None
    if len(key) < KEY_LENGTH or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"--api-key-file {path}: must have a key of {KEY_LENGTH} characters or more, of ASCII, in one line"
        )
    return key


def _make(out: Path) -> None:
    """Makes the folder of the pictures where there is none. Raises OSError where nothing can be written to it."""
    if not out.exists():
        check_writable(out.absolute().parent, f"--out {out}")
        out.mkdir()
    check_writable(out, f"--out {out}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_installed() -> None:
    """Raises ValueError where the extra is missing."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'{name} is not installed, which the server needs: pip install "sdjax[serve]"')
