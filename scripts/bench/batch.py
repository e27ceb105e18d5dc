"""Throughput of a job on one and on several virtual CPU devices at one total batch.

    python scripts/bench/batch.py --pictures 128

The same cores do the same work, so what several devices lose is what sdjax and the runtime cost. Each run is a process
of its own; the runs of the devices take turns, as the machine's speed drifts. A rehearsal: --devices 2 --total-batch 2
--pictures 4 --steps 1 --runs 1.
"""

import argparse
import statistics
import tempfile

from processes import Worker
from table import markdown


def rates(out: str, pictures: int, steps: int, batch: int) -> tuple[float, float]:
    """Pictures a second, and the part of the time in which the devices were idle, of a job of the embedded model."""
    from sdjax.batch import run

    job = [{"prompt": "a goose", "seed": f"0:{pictures}", "num_inference_steps": steps}]
    summary = run(job, out, batch=batch)
    return summary.per_second, summary.idle_share


def main() -> None:
    """Prints medians, and how much of one device's throughput several have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--total-batch", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {1: [], given.devices: []}
    for _ in range(given.runs):
        for devices, done in found.items():
            options = {"pictures": given.pictures, "steps": given.steps, "batch": given.total_batch // devices}
            flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            with tempfile.TemporaryDirectory() as out, Worker(**flags) as worker:
                done.append(worker.call("batch:rates", out=out, **options).value)
    medians = {devices: statistics.median(rate for rate, _ in done) for devices, done in found.items()}
    rows = [
        [devices, medians[devices], f"{max(idle for _, idle in done):.2%}", f"{medians[devices] / medians[1]:.1%}"]
        for devices, done in found.items()
    ]
    print(markdown(["devices", "pictures a second", "most idle", "of one device"], rows))


if __name__ == "__main__":
    main()
