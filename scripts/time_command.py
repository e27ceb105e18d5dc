"""Times the command with the embedded model, each run a process of its own: `python scripts/time_command.py`.

Prints wall-clock seconds: cold (no compiled program cached), warm, and sixteen seeds, first and again.
"""

import os
import subprocess
import sys
import tempfile
import time

RUNS = (
    ("one picture, nothing cached", ["--seeds", "0"]),
    ("one picture", ["--seeds", "1"]),
    ("one picture, another prompt and sampler", ["--seeds", "2", "--sampler", "euler", "--negative", "red"]),
    ("sixteen seeds, not yet compiled", ["--seeds", "0:16"]),
    ("sixteen seeds", ["--seeds", "16:32"]),
)


def seconds(arguments: list[str], folder: str) -> float:
    """How long `sdjax generate` takes, with pictures and compiled programs in the folder."""
    command = [sys.executable, "-c", "from sdjax.cli import main; main()", "generate", "a goose on a blue background"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "cache")}
    start = time.perf_counter()
    subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Prints a line a run."""
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in RUNS:
            print(f"{name:<42}{seconds(arguments, folder):6.1f} s", flush=True)


if __name__ == "__main__":
    main()
