"""Processes beside a notebook."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sdjax.notebooks.child import Child

SAYS = """
import signal, sys, time
print("loading", flush=True)
print("http://127.0.0.1:1234 is where", flush=True)
print("a warning", file=sys.stderr, flush=True)
time.sleep(60)
"""


def child(code: str) -> Child:
    return Child([sys.executable, "-c", code], r"http://\S+")


def until(is_so) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_it_is_found_and_its_words_are_kept():
    found = child(SAYS)
    try:
        assert found.address == "http://127.0.0.1:1234"
        until(lambda: [*found.log] == ["loading", "a warning"])
    finally:
        found.stop()
    found.stop()


def test_one_that_ends_says_why():
    with pytest.raises(RuntimeError, match="one\nerror: two"):
        child("import sys; print('one'); sys.exit('error: two')")


def test_there_is_no_such_command():
    with pytest.raises(FileNotFoundError):
        Child(["nowhere-to-be-found"], "x")


def test_a_cell_that_is_stopped_does_not_stop_it():
    found = child(SAYS.replace("print(", "print(__import__('os').getpid(), ", 1))
    try:
        pid = int(found.log[0].split()[0])
        os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        assert is_alive(pid)
    finally:
        found.stop()
    assert not is_alive(pid)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_it_ends_with_the_kernel():
    sleeps = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = [sys.executable, "-c", sleeps]
    code = f"from sdjax.notebooks.child import Child; print(Child({command!r}, '[0-9]+').address)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert not is_alive(int(done.stdout))
