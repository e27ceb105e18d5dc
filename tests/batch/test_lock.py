"""sdjax.batch.lock: one run at a time, whatever became of the one before."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import fsspec
import pytest

from sdjax.batch import lock
from sdjax.batch.lock import Lock, LockedError

HOLD = """
import sys, time, fsspec
from sdjax.batch.lock import Lock, LockedError
try:
    with Lock(fsspec.filesystem("file"), sys.argv[1]) as held:
        print("held", held.note, flush=True)
        time.sleep(60)
except LockedError as error:
    print("refused", flush=True)
"""


def holder(path):
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def other(tmp_path):
    """(path, a process that holds the lock there)"""
    with holder(tmp_path / "lock") as process:
        assert process.stdout.readline() == "held None\n"
        yield str(tmp_path / "lock"), process
        process.kill()


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    fs = fsspec.filesystem(request.param)
    path = f"{tmp_path}/lock"
    fs.makedirs(str(tmp_path), exist_ok=True)
    return fs, path


def record(**changed):
    now = time.time()
    known = {"host": "elsewhere", "pid": 1, "token": "theirs", "started": now - 100, "heartbeat": now}
    return json.dumps(known | changed).encode()


def test_a_lock_is_there_while_it_is_held(place):
    fs, path = place
    with Lock(fs, path) as held:
        said = json.loads(fs.cat_file(path))
        assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid())
        assert held.note is None
    assert not fs.exists(path)
    with pytest.raises(RuntimeError), Lock(fs, path):
        raise RuntimeError
    assert not fs.exists(path)


def test_a_second_run_is_told_who_holds_it(place):
    fs, path = place
    with Lock(fs, path), pytest.raises(LockedError, match=f"held by the run on .*, pid {os.getpid()}"), Lock(fs, path):
        pass
    with Lock(fs, path):
        pass


def test_a_live_process_is_named_and_keeps_its_lock(other):
    path, process = other
    before = Path(path).read_bytes()
    with pytest.raises(LockedError) as refused, Lock(fsspec.filesystem("file"), path):
        pass
    assert f"held by the run on {socket.gethostname()}, pid {process.pid}, since {datetime.now():%Y-}" in str(
        refused.value
    )
    assert Path(path).read_bytes() == before


def test_the_lock_of_a_killed_process_is_taken_over_at_once(other):
    path, process = other
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lock(fsspec.filesystem("file"), path) as held:
        assert f"pid {process.pid}, " in held.note
        assert json.loads(Path(path).read_bytes())["pid"] == os.getpid()
    assert not os.listdir(os.path.dirname(path))


def test_of_many_that_start_at_once_one_gets_the_lock(tmp_path):
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(holder(tmp_path / "lock")) for _ in range(4)]
        said = sorted(racer.stdout.readline().split()[0] for racer in racers)
        for racer in racers:
            racer.kill()
    assert said == ["held", "refused", "refused", "refused"]


@pytest.mark.parametrize(
    ("silent", "is_alive"), [(lock.DEAD_SECONDS - 10, True), (lock.DEAD_SECONDS + 10, False)], ids=["late", "dead"]
)
def test_another_host_is_alive_while_its_heart_beats(place, silent, is_alive):
    fs, path = place
    fs.pipe_file(path, record(heartbeat=time.time() - silent))
    if is_alive:
        with pytest.raises(LockedError, match=r"on elsewhere, pid 1, .*renewed this lock 50 s ago"), Lock(fs, path):
            pass
    else:
        with Lock(fs, path) as held:
            assert held.note.startswith("taken over from the run on elsewhere, pid 1, since ")


def test_the_pid_of_this_very_process_is_no_sign_of_life(place):
    fs, path = place  # a container that was started again has the same host name and the same pids
    fs.pipe_file(path, record(host=socket.gethostname(), pid=os.getpid()))
    with Lock(fs, path) as held:
        assert held.note


ODD = {
    "host": [None, 1, "x" * 301],
    "pid": [None, "1", -1, 0, 1.5, True, 2**31, 10**400],
    "token": [None, []],
    "started": [None, "now", -1, 1e12, float("nan"), float("inf"), 10**400],
    "heartbeat": [None, {}, float("nan"), 10**400],
    "born": [1, [], "x" * 301],
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"\xff",
        b"[" * 10**5,
        b'{"pid": ' + b"9" * 10**4 + b"}",
        b" " * 10**6 + b"{}",
        *(record(**{name: value}) for name, values in ODD.items() for value in values),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_a_broken_lock_is_a_dead_one(place, content):
    fs, path = place
    fs.pipe_file(path, content)
    with Lock(fs, path) as held:
        assert held.note == "taken over from an unknown run, which is dead"


@pytest.mark.skipif(os.name == "nt", reason="pipes and links are files of Unix")
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/nowhere", path)])
def test_what_is_no_file_is_no_lock(tmp_path, make):
    make(tmp_path / "lock")
    with pytest.raises(OSError, match="lock: no regular file"), Lock(fsspec.filesystem("file"), f"{tmp_path}/lock"):
        pass


@pytest.mark.parametrize(("ahead", "is_alive"), [(lock.DEAD_SECONDS - 10, True), (lock.DEAD_SECONDS + 10, False)])
def test_a_heartbeat_from_the_future(ahead, is_alive):
    assert lock.is_alive(lock.parsed(record(heartbeat=time.time() + ahead))) == is_alive


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_process_that_is_too_busy_to_renew_its_lock_keeps_it(other):
    path, _ = other
    silent = {**json.loads(Path(path).read_bytes()), "heartbeat": time.time() - 1000}
    assert lock.is_alive(lock.parsed(json.dumps(silent).encode()))
    another = {**silent, "born": silent["born"] + "1"}  # which has the pid of one that is gone
    assert not lock.is_alive(lock.parsed(json.dumps({**another, "heartbeat": time.time()}).encode()))
    elsewhere = {**silent, "born": "pid:[1] 1"}
    assert not lock.is_alive(lock.parsed(json.dumps(elsewhere).encode()))
    assert lock.is_alive(lock.parsed(json.dumps({**elsewhere, "heartbeat": time.time()}).encode()))


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_heartbeat_goes_on(place, monkeypatch):
    fs, path = place
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with Lock(fs, path):
        first = json.loads(fs.cat_file(path))
        wait_for(lambda: json.loads(fs.cat_file(path))["heartbeat"] > first["heartbeat"])
        last = json.loads(fs.cat_file(path))
        assert first | {"heartbeat": last["heartbeat"]} == last


def test_who_was_thought_dead_leaves_the_lock_of_another_alone(place, monkeypatch):
    fs, path = place
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    with Lock(fs, path):
        theirs = record()
        fs.pipe_file(path, theirs)
        for _ in range(10):
            time.sleep(0.02)
            fs.pipe_file(path, theirs)  # in case a beat was under way
        time.sleep(0.1)
        assert fs.cat_file(path) == theirs
    assert fs.cat_file(path) == theirs


def test_the_heart_beats_on_after_a_failed_write(place, monkeypatch):
    fs, path = place
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    failed = []

    def fail(*_):
        failed.append(None)
        raise OSError(28, "No space left on device")

    with Lock(fs, path):
        with monkeypatch.context() as patch:
            patch.setattr(lock, "write_whole", fail)
            wait_for(lambda: failed)
        before = fs.cat_file(path)
        wait_for(lambda: fs.cat_file(path) != before)
