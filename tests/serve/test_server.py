"""A server's start and end, alone."""

import asyncio
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from conftest import start, stop
from fastapi import FastAPI
from uvicorn.lifespan.off import LifespanOff

from sdjax.serve import server

GOOSE = {"prompt": "goose", "num_inference_steps": 100, "seed": 1, "guidance_scale": 3.0}


def until(is_so):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(one_level_folder, number, capfd):
    served = start("--model", one_level_folder, "--places", "1", "--max-steps", "1000000")
    until(lambda: served.http.get("/ready").status_code == 200)
    assert served.http.get("/ready").json() == {"ready": True, "warmed": True}
    served.http.post("/requests", json={**GOOSE, "num_inference_steps": 900})
    until(lambda: any(order["state"] == "running" for order in served.http.get("/requests").json()))
    served.http.close()
    served.process.send_signal(number)
    time.sleep(0.5)
    assert served.process.poll() is None
    assert "a second signal does not wait" in capfd.readouterr().err
    started = time.monotonic()
    served.process.send_signal(number)
    try:
        assert served.process.wait(10) == 1
        assert time.monotonic() - started < 5
    finally:
        served.process.kill()
        served.process.stdout.close()


@pytest.mark.parametrize(
    ("is_idle", "is_warm", "expected"), [(False, True, False), (True, True, False), (True, False, True)]
)
def test_what_is_not_done_in_time_is_given_up_and_what_nobody_asked_for_is_not_waited_for(
    monkeypatch, is_idle, is_warm, expected
):
    monkeypatch.setattr(server, "GRACE", 0.2)
    left = []
    slow = SimpleNamespace(end=lambda: None, close=lambda: time.sleep(0.5), is_idle=is_idle, is_warm=is_warm)
    running = server.Server(FastAPI(), slow, lambda: None, lambda is_done: left.append((is_done, time.monotonic())))

    async def run():
        running.should_exit = True
        running.servers, running.lifespan = [], LifespanOff(running.config)
        await running.shutdown()

    started = time.monotonic()
    asyncio.run(run())
    is_done, ended = left[0]
    assert is_done == expected
    assert ended - started < (0.15 if is_done else 0.45)


@pytest.mark.parametrize("key", [None, "0123456789abcdef"])
def test_a_signal_lets_what_runs_be_done_and_cancels_what_waits(one_level_folder, tmp_path, key):
    options = ["--model", one_level_folder, "--out", tmp_path, "--places", "1"]
    if key:
        (tmp_path / "key").write_text(key)
        options += ["--listen", "--api-key-file", tmp_path / "key"]
    served = start(*options)
    if key:
        assert served.http.get("/capabilities").status_code == 401
        served.http.headers["Authorization"] = f"Bearer {key}"
    given = {"prompt": "goose", "steps": 100, "seed": 1, "width": 32, "height": 32, "cfg_scale": 3}
    answers = []

    def ask():
        with httpx.Client(timeout=120, headers=served.http.headers) as client:
            answers.append(client.post(f"{served.url}/sdapi/v1/txt2img", json=given))

    until(lambda: served.http.get("/ready").status_code == 200)
    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: any(order["state"] == "running" for order in served.http.get("/requests").json()))
    waiting = served.http.post("/requests", json={**GOOSE, "count": 16})
    assert waiting.status_code == 202
    assert stop(served) == 0
    thread.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["images"]) == 1
    assert 1 <= len(list(tmp_path.glob("*.png"))) < 17
