"""sdjax.compiler_memory: what a compilation freed goes back to the system."""

import ctypes
import subprocess
import sys

import jax
import pytest

from sdjax import compiler_memory

FREED = """
import jax
from sdjax import compiler_memory

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

compiler_memory.enable()
blocks = [b"x" * 2**16 for _ in range(4096)]  # 256 MB in blocks that the C library keeps, under one that stays
last = b"x" * 2**16
del blocks
before = resident()
jax.monitoring.record_event_duration_secs(compiler_memory.COMPILED, 0.1)
after_a_short_one = resident()
jax.monitoring.record_event_duration_secs(compiler_memory.COMPILED, 2.0)
print(before - after_a_short_one, before - resident())
"""


def glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not glibc(), reason="only glibc keeps what was freed and can give it back")
def test_a_long_compilation_gives_its_memory_back():
    run = subprocess.run([sys.executable, "-c", FREED], stdout=subprocess.PIPE, text=True, check=True)
    short, long = map(int, run.stdout.split())
    assert short < 50
    assert long > 200


def test_jax_tells_of_its_compilations():
    heard = []

    def listener(event, seconds, **_):
        heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x + 41)(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiler_memory.COMPILED in heard
