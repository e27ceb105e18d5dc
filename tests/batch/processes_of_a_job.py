"""The batch command in processes of their own, which all run the same programs: of one device and two pictures."""

import os
import subprocess
import sys
from pathlib import Path

from sdjax.batch import manifest

ENVIRONMENT = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # programs that draw a few tiny pictures are not worth compiling well
}
JOB = ["--prompt", "goose", "--prompt", "blue goose", "--seeds", "0:24", "--steps", "2"]
PICTURES = 48
CUT = ["--batch", "2", "--chunk-size", "2"]
COMMAND = """
from sdjax.batch import processes
from sdjax.commands.main import main
processes.SEEN_SECONDS = 1
main()
"""
WAIT_SECONDS = 240.0


def begin(model: Path, out: Path | str, *options: str, job: list[str] = JOB, **environment: str) -> subprocess.Popen:
    """The job, sampled by a process of its own."""
    call = [sys.executable, "-c", COMMAND, "batch", *job, *CUT, "--model", str(model), "--out", str(out), *options]
    environment = {**os.environ, **ENVIRONMENT, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(call, env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """(exit status, what it wrote on stderr) of each."""
    said = [process.communicate(timeout=WAIT_SECONDS)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def contents(folder: Path) -> dict[str, object]:
    """All files, those of the manifest without what varies."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in [name for name in files if name.startswith(manifest.FOLDER)]:
        files[name] = [row | dict.fromkeys(manifest.VARYING) for row in manifest.load(files[name])]
    return files


def parts(folder: Path) -> set[str]:
    """The ids of the chunks that are finished."""
    return {path.stem for path in (folder / manifest.FOLDER).glob("*.parquet")}
