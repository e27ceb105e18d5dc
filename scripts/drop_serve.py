"""Connections to a server that are dropped: in the middle of a head, of a body, while a picture is waited for, in a
stream of events, and after a request that is cancelled.

    python scripts/drop_serve.py --count 1000 --model DIR

Afterwards nothing waits or runs, and no more files are open than before. Prints what was measured; exit status 1 where
it is not so.
"""

import argparse
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

GOOSE = {"prompt": "goose", "width": 32, "height": 32}
PAUSES = (0.0, 0.002, 0.01, 0.05)  # seconds before a connection is dropped
SPARE = 8  # files: connections of others who look
MEASURED = {"waiting": "sdjax_waiting", "running": "sdjax_running", "files": "process_open_fds"}
MEASURED |= {"memory": "process_resident_memory_bytes"}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--model", help="a small one, such as the tests make [default: the embedded model]")
    given = parser.parse_args()
    model = ["--model", given.model] if given.model else []
    command = [sys.executable, "-m", "sdjax", "serve", "--port", "0", "--places", "2", *model]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        while "sdjax_ready 1" not in metrics(url):
            time.sleep(0.2)
        before, started = measured(url), time.monotonic()
        drop(url, given.count)
        after = settled(url, before)
        seconds = time.monotonic() - started
        print(f"{given.count:,} connections dropped in {seconds:.0f} s: {shown(before)}; afterwards {shown(after)}")
        return int(not is_settled(before, after))
    finally:
        server.send_signal(signal.SIGTERM)
        print("exit status of the server:", server.wait(60))


def drop(url: str, count: int) -> None:
    """Makes so many connections, of each kind in turn, and drops them."""
    chance = random.Random(0)
    for i in range(count):
        KINDS[i % len(KINDS)](url, chance.choice(PAUSES))


def in_head(url: str, pause: float) -> None:
    """Before the head of a request is whole."""
    with _connected(url) as sent:
        sent.sendall(b"POST /requests HTTP/1.1\r\nHost: loc")
        time.sleep(pause)


def in_body(url: str, pause: float) -> None:
    """Before its body is whole."""
    with _connected(url) as sent:
        sent.sendall(_head("/requests", 10**6) + b'{"prompt": "' + b"g" * 10_000)
        time.sleep(pause)


def in_answer(url: str, pause: float) -> None:
    """While a picture is made."""
    body = json.dumps({**GOOSE, "steps": 150}, allow_nan=False).encode()
    with _connected(url) as sent:
        sent.sendall(_head("/sdapi/v1/txt2img", len(body)) + body)
        time.sleep(pause)


def in_stream(url: str, pause: float) -> None:
    """While pictures are streamed."""
    body = json.dumps(
        {"prompt": "goose", "size": "32x32", "num_inference_steps": 150, "stream": True}, allow_nan=False
    ).encode()
    with _connected(url) as sent:
        sent.sendall(_head("/v1/images/generations", len(body)) + body)
        time.sleep(pause)


def in_events(url: str, pause: float) -> None:
    """While the events of a request come, which is cancelled then."""
    body = json.dumps({**GOOSE, "num_inference_steps": 150}, allow_nan=False).encode()
    asked = urllib.request.Request(f"{url}/requests", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked) as answer:
            place = f"/requests/{json.load(answer)['id']}"
    except urllib.error.HTTPError:  # the queue is full
        return
    with _connected(url) as sent:
        sent.sendall(f"GET {place}/events?previews=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        time.sleep(pause)
    with urllib.request.urlopen(urllib.request.Request(url + place, method="DELETE")):
        pass


KINDS: tuple[Callable[[str, float], None], ...] = (in_head, in_body, in_answer, in_stream, in_events)


def _connected(url: str) -> socket.socket:
    place = urlsplit(url)
    return socket.create_connection((place.hostname, place.port), timeout=60)


def _head(path: str, length: int) -> bytes:
    kind = "Content-Type: application/json\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{kind}Content-Length: {length}\r\n\r\n".encode()


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return answer.read().decode()


def measured(url: str) -> dict[str, float]:
    text = metrics(url)
    return {name: float(re.search(rf"^{key} (\S+)$", text, re.MULTILINE)[1]) for name, key in MEASURED.items()}


def is_settled(before: dict[str, float], after: dict[str, float]) -> bool:
    """Whether nothing waits, runs, or is open."""
    return after["waiting"] + after["running"] == 0 and after["files"] <= before["files"] + SPARE


def settled(url: str, before: dict[str, float], seconds: float = 120) -> dict[str, float]:
    """What is measured when it is so, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_settled(before, found := measured(url)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def shown(found: dict[str, float]) -> str:
    """In words."""
    counts = ", ".join(f"{found[name]:.0f} {name}" for name in ("waiting", "running", "files"))
    return f"{counts}, {found['memory'] / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
