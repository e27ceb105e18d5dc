"""Throughput of a job on one and on several virtual CPU devices at one total batch: `python scripts/bench_batch.py`.

The same cores do the same work, so what several devices lose is what sdjax and the runtime cost. Each run is a process
of its own; the runs of the devices take turns, as the machine's speed drifts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

COMMAND = [
    sys.executable,
    "-m",
    "sdjax",
    "batch",
    "--prompt=a goose",
    "--log-json",
]


def summary(devices: int, total_batch: int, pictures: int, steps: int) -> dict[str, float]:
    """What a run says at its end."""
    flags = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    options = [f"--seeds=0:{pictures}", f"--steps={steps}", f"--batch={total_batch // devices}"]
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([*COMMAND, *options, f"--out={out}"], env=flags, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints pictures a second and the devices' idle time: each run, then medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--total-batch", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], given.devices: []}
    for _ in range(given.runs):
        for devices, found in rates.items():
            said = summary(devices, given.total_batch, given.pictures, given.steps)
            found.append(said["per_second"])
            print(f"{devices} devices: {said['per_second']:.1f} a second, idle {said['idle_share']:.2%}", flush=True)
    one, several = (statistics.median(found) for found in rates.values())
    print(f"medians: {one:.1f} and {several:.1f} a second; {given.devices} devices do {several / one:.1%} of one")


if __name__ == "__main__":
    main()
