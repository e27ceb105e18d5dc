"""Kills a training run at random moments, and checks that its result is bit for bit that of one that was let alone.

    python scripts/train_killed.py PICTURES FOLDER --kills 20 -- --max-train-steps 40 --train-batch-size 1

What is after -- goes to `sdjax train lora`, which makes FOLDER/whole.safetensors and FOLDER/killed.safetensors.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    options, rest = parser.parse_args(own), sys.argv[len(own) + 2 :]
    options.folder.mkdir(parents=True, exist_ok=True)

    def command(name: str) -> list[str]:
        out = options.folder / f"{name}.safetensors"
        return [sys.executable, "-m", "sdjax", "train", "lora", str(options.pictures), "--out", str(out), *rest]

    subprocess.run(command("warm"), check=True)  # compiles
    began = time.monotonic()
    subprocess.run(command("whole"), check=True)
    seconds = time.monotonic() - began
    chance, kills, runs = random.Random(options.seed), 0, 0
    while kills < options.kills:
        process = subprocess.Popen(command("killed"))
        moment = chance.uniform(0, seconds)
        try:
            if status := process.wait(moment):
                sys.exit(f"status {status}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            print(f"kill {kills}: after {moment:.1f} s, {logged(options.folder)} steps in the log", flush=True)
        if (options.folder / "killed.safetensors").exists():
            runs += 1
            compare(options.folder)
            shutil.rmtree(options.folder / "killed.training")
            (options.folder / "killed.safetensors").unlink()
    subprocess.run(command("killed"), check=True)
    compare(options.folder)
    print(f"{kills} kills in {runs + 1} runs: the same bit for bit: the LoRA, the log")


def logged(folder: Path) -> int:
    """How many steps are in the log of the run that is killed."""
    log = folder / "killed.training" / "log.csv"
    return max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0


def compare(folder: Path) -> None:
    """Ends the script where the two runs differ."""
    if differ := differences(folder):
        sys.exit("not the same: " + "; ".join(differ))


def differences(folder: Path) -> list[str]:
    """What of the two runs is not the same."""
    found = []
    whole, killed = (content(folder / f"{name}.safetensors") for name in ("whole", "killed"))
    found += [
        f"tensor {name}" for name in whole[0].keys() | killed[0].keys() if whole[0].get(name) != killed[0].get(name)
    ]
    if whole[1] != killed[1]:
        found.append(f"header: {json.dumps(whole[1], allow_nan=False)} and {json.dumps(killed[1], allow_nan=False)}")
    logs = [(folder / f"{name}.training" / "log.csv").read_text() for name in ("whole", "killed")]
    return found + (["log.csv"] if logs[0] != logs[1] else [])


def content(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """(bytes of each tensor, header without the name) of a file."""
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
        header = {key: value for key, value in (file.metadata() or {}).items() if key != "ss_output_name"}
    return tensors, header


if __name__ == "__main__":
    main()
