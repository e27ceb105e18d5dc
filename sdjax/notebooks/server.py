"""`sdjax serve` beside a notebook: in a process of its own, as a TPU belongs to one process at a time."""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from sdjax.notebooks.cell import Markup, Place
from sdjax.notebooks.child import Child

COLAB = (".prod.colab.dev", ".googleusercontent.com", "colab.research.google.com")
"""Where Colab has the pages of ports, and what is around them where they are in a cell"""
TUNNEL = ".trycloudflare.com"
HEIGHT = "900"  # pixels of the page in a cell


class Server:
    """A server of this machine, until `stop`, or until the kernel ends.

    options: of `sdjax serve`. share: also at a public address, by Cloudflare's `cloudflared`, which must be installed;
    then everything needs the `key`, which is made for it. Raises RuntimeError, with what was said, where it does not
    start.
    """

    def __init__(self, *options: str, share: bool = False):
        if share and shutil.which("cloudflared") is None:
            raise FileNotFoundError(
                "cloudflared, which shares a server, is not installed: see developers.cloudflare.com"
            )
        self.key = secrets.token_urlsafe(24) if share else None
        hosts = (TUNNEL,) * share + COLAB * _is_colab()
        with _file(self.key) as keys:
            command = [sys.executable, "-m", "sdjax", "serve", "--port=0", *(f"--allow-host={name}" for name in hosts)]
            self._children = [Child([*command, *keys, *options], r"^http://127\S+")]
        if share:
            tunnel = ["cloudflared", "tunnel", "--no-autoupdate", "--url", self.address]
            try:
                self._children.append(Child(tunnel, rf"https://[\w-]+{TUNNEL}"))
            except BaseException:
                self.stop()
                raise

    @property
    def address(self) -> str:
        """On this machine, such as http://127.0.0.1:41233"""
        return self._children[0].address

    @property
    def log(self) -> list[str]:
        """The last lines of what the server has said."""
        return [*self._children[0].log]

    def show(self) -> None:
        """Shows the page in a cell of Colab, and a link to it; elsewhere the link."""
        if not _is_colab():
            _show_links([child.address for child in self._children], self.key)
            return
        from google.colab import output

        port = int(self.address.rpartition(":")[2])
        own = output.eval_js(f"google.colab.kernel.proxyPort({port})")
        _show_links([own, *(child.address for child in self._children[1:])], self.key)
        output.serve_kernel_port_as_iframe(port, height=HEIGHT)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What it answers, of JSON, to a POST of a body, else to a GET. Raises RuntimeError with what is wrong."""
        connection = http.client.HTTPConnection(self.address.partition("//")[2])
        headers = {"X-API-Key": self.key} if self.key else {}
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body, allow_nan=False))
        with contextlib.closing(connection):
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            said = answer.read().decode()
        if answer.status >= 400:
            raise RuntimeError(f"{answer.status}: {said}")
        return json.loads(said)

    def stop(self) -> None:
        """Lets it finish the pictures under way, and waits for its end."""
        for child in reversed(self._children):
            child.stop()


def _is_colab() -> bool:
    return "google.colab" in sys.modules


def _show_links(addresses: list[str], key: str | None) -> None:
    of_key = f" key: {key}" if key else ""
    links = (f'<a href="{escape(each)}" target="_blank">{escape(each)}</a>' for each in addresses)
    Place().show(Markup("<br>".join(links) + escape(of_key), " ".join(addresses) + of_key))


@contextlib.contextmanager
def _file(key: str | None) -> Iterator[list[str]]:
    """The option that names a file with the key, which nobody else can read."""
    if key is None:
        yield []
        return
    handle, path = tempfile.mkstemp()
    try:
        with os.fdopen(handle, "w") as file:
            file.write(key)
        yield [f"--api-key-file={path}"]
    finally:
        os.unlink(path)
