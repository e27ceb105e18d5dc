"""Fuzzes a server with schemathesis (pip install schemathesis), which makes requests of its OpenAPI description.

    python scripts/fuzz_serve.py --minutes 5 --model DIR

Whatever is asked for, no answer has a status of 500 or more, and afterwards nothing waits or runs. Prints how many
answers of each API had each status, and the memory before and after; exit status 1 where it is not so.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

LIMITS = ("--max-steps", "3", "--max-pixels", str(128 * 128), "--places", "2", "--queue", "16")
CHECKS = "not_a_server_error,content_type_conformance"
REQUEST = re.compile(r'sdjax_requests_total\{api="(\w+)",status="(\d+)"\} (\S+)')
READY = "/ready"  # which says 503 until it is


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--model", help="a small one, such as the tests make [default: the embedded model]")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = ["--model", given.model] if given.model else []
        command = [sys.executable, "-m", "sdjax", "serve", "--port", "0", "--out", folder, *model, *LIMITS]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = server.stdout.readline().strip()
            wait(lambda: status(url + READY) == 200)
            before = metrics(url)
            fuzz(url, given.minutes, given.seed)
            wait(lambda: idle(metrics(url)))
            return report(before, metrics(url), len(list(Path(folder).iterdir())))
        finally:
            server.send_signal(signal.SIGTERM)
            print("exit status of the server:", server.wait(60))


def fuzz(url: str, minutes: float, seed: int) -> None:
    """Asks for all that the description has, for so long."""
    options = ["--checks", CHECKS, "--phases", "coverage,fuzzing", "--continue-on-failure", "--seed", str(seed)]
    options += ["--max-time", str(int(minutes * 60)), "--workers", "4", "--request-timeout", "60", "--warnings", "off"]
    options += ["--suppress-health-check", "all", "--exclude-path", READY]
    subprocess.run(["schemathesis", "run", f"{url}/openapi.json", *options], check=False)


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return answer.read().decode()


def value(text: str, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def idle(text: str) -> bool:
    return value(text, "sdjax_waiting") + value(text, "sdjax_running") == 0


def wait(is_so, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not become ready, or idle")
        time.sleep(0.2)


def report(before: str, after: str, pictures: int) -> int:
    """Prints what was found; 1 where an answer had a status of 500 or more."""
    counts = Counter({(api, code): int(float(n)) for api, code, n in REQUEST.findall(after)})
    counts.subtract({(api, code): int(float(n)) for api, code, n in REQUEST.findall(before)})
    for (api, code), count in sorted(counts.items()):
        print(f"{api:<8}{code:>5}{count:>8,}")
    memory = [value(text, "process_resident_memory_bytes") / 2**30 for text in (before, after)]
    print(f"{sum(counts.values()):,} answers, {pictures} pictures, {memory[0]:.2f} to {memory[1]:.2f} GiB of memory")
    return int(any(count and int(code) >= 500 for (_, code), count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
