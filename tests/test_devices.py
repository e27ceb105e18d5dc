"""Pictures and programs do not depend on the number of devices."""

import os
import subprocess
import sys
from pathlib import Path

COUNT = "--xla_force_host_platform_device_count"


def test_on_eight_devices(sd1_folder):
    """In another process: the tests' own has two, for a picture is computed on each."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(COUNT)]
    env = os.environ | {"XLA_FLAGS": " ".join([*flags, f"{COUNT}=8"])}
    script = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run([sys.executable, script, sd1_folder], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
