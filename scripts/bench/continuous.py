"""Requests that come at random, sampled by continuous batching, one after the other, and in fixed batches.

    python scripts/bench/continuous.py

The embedded model; samplers, steps, prompts and guidance are mixed. The ways take turns, each in its own process, on
one and on several virtual CPU devices; latency is from when a request comes until its picture is there. The last rows
have all requests at the start, as a job of `sdjax batch` has. A rehearsal: --devices 2 --requests 6 --span 1 --runs 1.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

from processes import Worker
from table import markdown

SAMPLERS = ("dpmpp_2m_karras", "euler", "euler_ancestral", "ddim", "unipc", "heun")
PROMPTS = ("a goose on a blue background", "a red apple", "a star", "a cat")


def _requests(count: int) -> list:
    from sdjax.request import Request

    draw = random.Random(0)
    return [
        Request(
            draw.choice(PROMPTS),
            seed=seed,
            scheduler=draw.choice(SAMPLERS),
            num_inference_steps=draw.randint(8, 30),
            guidance_scale=draw.uniform(2, 5),
        )
        for seed in range(count)
    ]


def _pipe():
    import sdjax

    pipe = sdjax.StableDiffusionPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _in_turn(requests: Sequence, arrivals: Sequence[float], batch: int, sample: Callable) -> tuple[list[float], float]:
    """Latencies and the whole time of taking what has come, so many at most, when the last is done."""
    begun, latencies, at = time.perf_counter(), [], 0
    while at < len(requests):
        time.sleep(max(0.0, begun + arrivals[at] - time.perf_counter()))
        come = sum(arrival <= time.perf_counter() - begun for arrival in arrivals[at:])
        taken = requests[at : at + min(batch, come)]
        sample(taken)
        done = time.perf_counter() - begun
        latencies += [done - arrival for arrival in arrivals[at : at + len(taken)]]
        at += len(taken)
    return latencies, time.perf_counter() - begun


def one_after_the_other(arrivals: list[float], places: int) -> tuple[list[float], float]:
    """Latencies and seconds in all."""
    return fixed_batches(arrivals, 0)


def fixed_batches(arrivals: list[float], places: int) -> tuple[list[float], float]:
    """Latencies and seconds in all; places: pictures of a device at once, 0: a single one of them all."""
    pipe, requests = _pipe(), _requests(len(arrivals))
    batch = places * pipe.mesh.size or 1

    def sample(taken: Sequence) -> None:
        filled = [*taken, *taken[-1:] * (batch - len(taken))]  # one program
        pipe.sample(filled, output_type="np")

    sample(requests[:batch])
    return _in_turn(requests, arrivals, batch, sample)


def continuous(arrivals: list[float], places: int) -> tuple[list[float], float]:
    """Latencies and seconds in all."""
    from sdjax.engine import ContinuousEngine

    requests = _requests(len(arrivals))
    with ContinuousEngine(_pipe(), places=places) as engine:
        _settle(engine, requests)
        begun, done = time.perf_counter(), {}
        for i, (request, arrival) in enumerate(zip(requests, arrivals, strict=True)):
            time.sleep(max(0.0, begun + arrival - time.perf_counter()))
            job = engine.submit(request)
            job.future.add_done_callback(lambda _, i=i: done.__setitem__(i, time.perf_counter() - begun))
    return [done[i] - arrival for i, arrival in enumerate(arrivals)], max(done.values())


def _settle(engine, requests: Sequence) -> None:
    """Compiles: each width, down and up."""
    for count in (1, len(requests), 1):
        for job in [engine.submit(request) for request in requests[:count]]:
            job.future.result()
        time.sleep(0.1)


def job(arrivals: list[float], places: int) -> tuple[list[float], float]:
    """Seconds of the engine of `sdjax batch`, all requests there at the start."""
    from sdjax.engine import Engine, cut, grouped, prompt_chunk_counter, row_counter

    pipe, requests, done = _pipe(), _requests(len(arrivals)), []
    rows = row_counter(pipe)
    groups = grouped(requests, prompt_chunk_counter([*pipe.tokenizers.values()], rows), rows)
    units = [
        unit for group, own in groups.items() for unit in cut(group, [requests[i] for i in own], list(own), places)
    ]
    engine = Engine(pipe)
    engine.run(units[: pipe.mesh.size], lambda sampled: None)
    begun = time.perf_counter()
    engine.run(units, done.extend)
    return [], time.perf_counter() - begun


WAYS = {
    "one after the other": one_after_the_other,
    "fixed batches": fixed_batches,
    "continuous": continuous,
}
AT_ONCE = {"as `sdjax batch`": job, "continuous": continuous}


def main() -> None:
    """Prints medians of pictures a second and of latencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--places", type=int, default=4, help="pictures of a device at once, where it is alone")
    parser.add_argument("--span", type=float, default=10.0, help="seconds in which they come")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    draw = random.Random(1)
    spread = sorted(draw.uniform(0, given.span) for _ in range(given.requests))
    found: dict[tuple[int, str, str], list] = {}
    for _ in range(given.runs):
        for devices in dict.fromkeys((1, given.devices)):
            places = given.places if devices == 1 else 1
            flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
            runs = [(name, "at random", way, spread) for name, way in WAYS.items()]
            runs += [(name, "all at the start", way, [0.0] * given.requests) for name, way in AT_ONCE.items()]
            for name, come, way, arrivals in runs:
                with Worker(**flags) as worker:
                    call = f"continuous:{way.__name__}"
                    found.setdefault((devices, come, name), []).append(
                        worker.call(call, arrivals=arrivals, places=places).value
                    )
    rows = []
    for (devices, come, name), runs in found.items():
        rate = statistics.median(given.requests / seconds for _, seconds in runs)
        latencies = [statistics.quantiles(own, n=100, method="inclusive") for own, _ in runs if own]
        p50, p99 = (statistics.median(own[i] for own in latencies) if latencies else "" for i in (49, 98))
        rows.append([devices, come, name, rate, p50, p99])
    print(markdown(["devices", "requests come", "", "pictures a second", "p50 s", "p99 s"], rows))


if __name__ == "__main__":
    main()
