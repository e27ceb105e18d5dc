"""`sdjax serve` beside a notebook, in Colab and shared: both are stood in for."""

import http.client
import sys
from types import ModuleType, SimpleNamespace

import pytest

import sdjax
from sdjax.notebooks import server as beside

CLOUDFLARED = """#!/bin/sh
echo "$@" > "$0.arguments"
echo "INF |  https://a-few-words.trycloudflare.com  |" >&2
exec sleep 60
"""
COLABS = "7860-tpu-v5e.europe-west4-0.prod.colab.dev"
SHARED = "a-few-words.trycloudflare.com"


@pytest.fixture(scope="module")
def colab():
    """Its `framed` has the ports that are shown in cells."""
    colab, output = ModuleType("google.colab"), ModuleType("google.colab.output")
    colab.output, colab.framed = output, []
    output.eval_js = lambda code: f"https://{COLABS}/?{code}"
    output.serve_kernel_port_as_iframe = lambda port, height: colab.framed.append(port)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in (
            ("google", ModuleType("google")),
            ("google.colab", colab),
            ("google.colab.output", output),
        ):
            patch.setitem(sys.modules, name, module)
        yield colab


@pytest.fixture(scope="module")
def cloudflared(tmp_path_factory):
    """The file of the arguments that it was started with."""
    program = tmp_path_factory.mktemp("bin") / "cloudflared"
    program.write_text(CLOUDFLARED)
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(program.parent), prepend=":")
        yield program.with_suffix(".arguments")


@pytest.fixture(scope="module")
def server(colab, cloudflared):
    server = sdjax.notebooks.Server(share=True)
    yield server
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        server.ask("/health")


@pytest.fixture
def links(monkeypatch):
    """What is shown."""
    shown = []
    monkeypatch.setattr(beside, "Place", lambda: SimpleNamespace(show=lambda thing: shown.append(repr(thing))))
    return shown


def get(server, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(server.address.partition("//")[2])
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


def test_it_answers_and_says_what_is_wrong(server):
    assert server.ask("/capabilities")["model"] == "embedded"
    with pytest.raises(RuntimeError, match=r"^422: .*no_field"):
        server.ask("/requests", {"prompt": "goose", "no_field": 1})
    with pytest.raises(RuntimeError, match=r"^422: .*prompt: is missing"):
        server.ask("/requests", {})


def test_it_says_why_it_does_not_start():
    with pytest.raises(RuntimeError, match="error: --models nowhere: there is no such folder"):
        sdjax.notebooks.Server("--models=nowhere")


def test_it_is_shown_in_the_cell_and_by_links(server, colab, links):
    server.show()
    port = int(server.address.rpartition(":")[2])
    [shown] = links
    own = f"https://{COLABS}/?google.colab.kernel.proxyPort({port})"
    assert shown == f"{own} https://{SHARED} key: {server.key}"
    assert colab.framed == [port]


def test_elsewhere_it_is_a_link(server, monkeypatch, links):
    monkeypatch.delitem(sys.modules, "google.colab")
    server.show()
    assert links == [f"{server.address} https://{SHARED} key: {server.key}"]


def test_colab_reaches_it_and_may_have_it_in_a_frame(server):
    policy = get(server, "/", Host=COLABS).headers["Content-Security-Policy"]
    assert policy.endswith(
        "frame-ancestors 'self' *.trycloudflare.com "
        + " ".join(("*.prod.colab.dev", "*.googleusercontent.com", "colab.research.google.com"))
    )
    key = {"X_API_Key": server.key}
    assert get(server, "/capabilities", Host=COLABS, Sec_Fetch_Site="same-origin", **key).status == 200
    assert get(server, "/capabilities", Origin=f"https://{COLABS}", **key).status == 200
    assert get(server, "/capabilities", Origin="https://elsewhere.example", **key).status == 403


def test_a_shared_one_needs_its_key(server, cloudflared):
    assert cloudflared.read_text().endswith(f"--url {server.address}\n")
    assert len(server.key) >= 32
    assert get(server, "/capabilities", Host=SHARED).status == 401
    assert get(server, "/capabilities", Host=SHARED, X_API_Key=server.key).status == 200


def test_sharing_needs_cloudflared(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cloudflared"):
        sdjax.notebooks.Server(share=True)
