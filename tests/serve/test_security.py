"""Who may ask: hosts, origins, keys, bodies."""

import asyncio
import base64
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sdjax.commands.main import main
from sdjax.serve import security
from sdjax.serve.security import Guard, Rules, host_name

KEY = "0123456789abcdef"


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@dataclass
class Client:
    """Asks an application in this process."""

    app: Any

    def request(self, method, path, **options) -> httpx.Response:
        async def ask():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:7860") as http:
                return await http.request(method, path, **options)

        return asyncio.run(ask())

    def get(self, path, **options) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path, **options) -> httpx.Response:
        return self.request("POST", path, **options)


def client(**rules) -> Client:
    app = Starlette(routes=[Route(path, echo, methods=["GET", "POST"]) for path in ("/", "/health", "/v1/models")])
    return Client(Guard(app, Rules(**rules)))


async def parts():
    """A body that does not say its length."""
    for _ in range(2):
        yield b"1" * 60


def test_host_names():
    names = {"LOCALHOST:7860": "localhost", "[::1]:80": "::1", "127.0.0.1": "127.0.0.1", "a.b.:1": "a.b", "[": ""}
    assert {host: host_name(host) for host in names} == names


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "127.0.0.2:7860", "192.168.1.2", "[::1]:7860"])
def test_this_machine_is_known_by_its_names(host):
    assert client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io", "a@b"])
def test_a_name_that_is_made_to_point_here_is_refused(host):
    answer = client().get("/", headers={"Host": host})
    assert answer.status_code == 403
    assert "host name" in answer.json()["detail"]


def test_who_listens_to_the_network_has_addresses_and_names():
    listening = client(is_local=False, hosts=("pictures.example", ".lan"))
    for host in ("192.168.1.2:7860", "[fe80::1]:7860", "pictures.example", "box.lan"):
        assert listening.get("/", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "lan", "other.pictures.example"):
        assert listening.get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9999"},
        {"Origin": "http://[evil"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_sites_are_refused(method, headers):
    assert client().request(method, "/", headers=headers).status_code == 403


def test_the_own_page_and_links_are_answered():
    assert client().post("/", headers={"Origin": "http://localhost:7860"}).status_code == 200
    visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client().get("/", headers=visit).status_code == 200
    assert client().post("/", headers=visit).status_code == 403


def test_a_proxy_may_have_another_name():
    behind = client(hosts=("pictures.example",))
    assert behind.post("/", headers={"Origin": "https://pictures.example"}).status_code == 200
    assert behind.post("/", headers={"Origin": "https://other.example"}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:7860", "7860-m-s-1a2b3c-a.us-west4-1.prod.colab.dev"])
def test_the_name_of_a_proxy_of_colab_is_enough(host):
    """Whether it passes its own name on or not; that of another notebook is not enough."""
    name = "7860-m-s-1a2b3c-a.us-west4-1.prod.colab.dev"
    behind = client(hosts=(name,))
    headers = {"Host": host, "Origin": f"https://{name}", "Sec-Fetch-Site": "same-origin"}
    assert behind.post("/", headers=headers).status_code == 200
    visit = {"Host": host, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert behind.get("/", headers=visit).status_code == 200
    other = headers | {"Origin": "https://7860-m-s-9z9z9z-b.us-west4-1.prod.colab.dev"}
    assert behind.post("/", headers=other).status_code == 403


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": basic(KEY)},
        {"X-API-Key": KEY},
        {"Authorization": "Bearer of a proxy", "X-API-Key": KEY},
    ],
)
def test_the_key_is_taken_in_the_ways_that_clients_send_it(headers):
    assert client(key=KEY).get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer wrong", basic("wrong"), "Basic !", "Basic /w==", f"Digest {KEY}", "Bearer é"]
)
def test_without_the_key_nothing_is_answered(value):
    answer = client(key=KEY).get("/", headers={"Authorization": value.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic")
    assert client(key=KEY).get("/v1/models").json()["error"]["message"] == "the key is missing or wrong"
    assert client(key=KEY, open=frozenset(["/health"])).get("/health").status_code == 200
    script = client(key=KEY).get("/", headers={"Sec-Fetch-Mode": "cors", "Sec-Fetch-Site": "same-origin"})
    assert (script.status_code, script.headers.get("www-authenticate")) == (401, None)


def test_bodies_are_bounded_whether_they_say_their_length_or_not():
    bounded = client(body=100)
    assert bounded.post("/", content=b"1" * 100).text == "100"
    assert bounded.post("/", content=b"1" * 101).status_code == 413
    assert bounded.post("/", content=parts()).status_code == 413
    assert bounded.post("/", content=b"", headers={"Content-Length": "x"}).status_code == 413


def test_bodies_of_all_requests_are_bounded():
    """Until they are answered; whether they say their length or not."""
    held = asyncio.Event()

    async def slow(request: Request) -> PlainTextResponse:
        await request.body()
        await held.wait()
        return PlainTextResponse("")

    app = Guard(Starlette(routes=[Route("/", slow, methods=["POST"])]), Rules(body=100, bodies=250))

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:7860") as http:
            first = [asyncio.create_task(http.post("/", content=b"1" * 100)) for _ in range(2)]
            while app.bodies.count < 200:
                await asyncio.sleep(0.01)
            refused = await http.post("/", content=(part async for part in parts()))
            fits = asyncio.create_task(http.post("/", content=b"1" * 50))
            held.set()
            return refused, [answer.status_code for answer in await asyncio.gather(*first, fits)]

    refused, others = asyncio.run(ask())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert others == [200, 200, 200]
    assert app.bodies.count == 0


def test_a_body_that_does_not_come_is_waited_for_no_longer(monkeypatch):
    monkeypatch.setattr(security, "SLOWEST", 0.05)

    async def stalled():
        yield b"1"
        await asyncio.sleep(1)

    assert client().post("/", content=stalled()).status_code == 408


def test_answers_say_that_nothing_is_to_be_guessed():
    assert client().get("/").headers["x-content-type-options"] == "nosniff"


def test_the_server_has_these_rules(served):
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = served.http.post("/requests", json={"prompt": "goose"}, headers=headers)
        assert answer.status_code == 403
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as sent:
        sent.sendall(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sent.makefile("rb").readline().startswith(b"HTTP/1.1 4")
    head = f"POST /requests HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**26 + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as sent:
        sent.sendall(head.encode())
        assert sent.makefile("rb").readline().startswith(b"HTTP/1.1 413")


REFUSED = {
    "--listen": (["--listen"], "--listen: whoever reaches this machine could use it"),
    "a host": (["--host", "0.0.0.0"], "--host 0.0.0.0: whoever reaches this machine could use it"),
    "a short key": (["--api-key-file", "key"], "--api-key-file key: must have a key of 16 characters or more"),
    "a key that no header has": (
        ["--api-key-file", "umlaut"],
        "--api-key-file umlaut: must have a key of 16 characters",
    ),
    "a key that is no text": (["--api-key-file", "bytes"], "--api-key-file bytes: must have a key of 16 characters"),
    "no key": (["--api-key-file", "none"], "--api-key-file none: cannot be read: No such file"),
    "no folder": (["--models", "nowhere"], "--models nowhere: there is no such folder"),
    "no place": (["--out", "nowhere/out"], "--out nowhere/out: there is no folder "),
}


@pytest.mark.parametrize("options, said", REFUSED.values(), ids=REFUSED)
def test_what_is_not_safe_is_not_started(options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("key").write_text("short\n")
    Path("umlaut").write_text("ä" * 20, "utf-8")
    Path("bytes").write_bytes(bytes(range(128, 160)))
    with pytest.raises(SystemExit) as ended:
        main(["serve", *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_port_that_is_taken_is_one_line(served, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", str(served.port)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"error: 127.0.0.1:{served.port}: cannot be listened to: Address already in use; choose another by --port\n"
    )


def test_a_missing_package_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sdjax.commands.serve.PACKAGES", ("fastapi", "nowhere_to_be_found"))
    with pytest.raises(SystemExit):
        main(["serve"])
    assert 'pip install "sdjax[serve]"' in capsys.readouterr().err
