"""sdjax.runtime.compiler_memory: what a compilation freed goes back to the system."""

import ctypes
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from compilations import compilations

SCRIPTS = Path(__file__).parents[1] / "scripts" / "bench"
FREED = """
import jax
from processes import resident_bytes
from sdjax.runtime import compiler_memory

def resident():
    return resident_bytes("VmRSS") // 2**20

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
    run = subprocess.run([sys.executable, "-c", FREED], cwd=SCRIPTS, stdout=subprocess.PIPE, text=True, check=True)
    short, long = map(int, run.stdout.split())
    assert short < 50
    assert long > 200


def test_jax_tells_of_its_compilations():
    with compilations() as names:
        jax.jit(lambda x: x + 41)(1.0)
    assert names
