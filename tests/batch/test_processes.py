"""Several processes make one job's pictures, to the bytes of one process, and a lost one holds up no other."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sdjax.batch
from sdjax.batch import manifest, record
from sdjax.batch.lock import Lock, LockedError
from sdjax.batch.output import open_target
from sdjax.batch.processes import LOCK, Process, join

COUNT = 4
JOB = ["--prompt", "goose", "--prompt", "blue goose", "--seeds", "0:12", "--steps", "2"]
CUT = ["--batch", "1", "--chunk-size", "2", "--quiet"]
COMMAND = """
from sdjax.batch import processes
from sdjax.commands.main import main
processes.SEEN_SECONDS = 1
main()
"""


@pytest.fixture(scope="module")
def whole(sd1_folder, tmp_path_factory) -> Path:
    """The job's output, made by one process. Read only."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert ended([command(sd1_folder, folder)]) == [(0, "")]
    return folder


def command(model: Path, out: Path, *pod: str) -> subprocess.Popen:
    """The job, on a host that has one device."""
    call = [sys.executable, "-c", COMMAND, "batch", *JOB, *CUT, "--model", str(model), "--out", str(out), *pod]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True)


def start(model: Path, outs: list[Path]) -> list[subprocess.Popen]:
    """As many processes of the job as there are outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pod = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(len(outs))]
    return [command(model, out, *pod, "--index", str(index)) for index, out in enumerate(outs)]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit status, what it said on stderr) of each."""
    said = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def contents(folder: Path) -> dict[str, object]:
    """All files, those of the manifest without what varies."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in [name for name in files if name.startswith(manifest.FOLDER)]:
        files[name] = [row | dict.fromkeys(manifest.VARYING) for row in manifest.load(files[name])]
    return files


def parts(folder: Path) -> set[str]:
    return {path.stem for path in (folder / manifest.FOLDER).glob("*.parquet")}


def test_four_processes_write_the_bytes_of_one(sd1_folder, whole, tmp_path):
    out = tmp_path / "out"
    assert [status for status, _ in ended(start(sd1_folder, [out] * COUNT))] == [0] * COUNT
    assert contents(out) == contents(whole)


def test_a_killed_process_leaves_its_share_to_the_next_run(sd1_folder, whole, tmp_path):
    out = tmp_path / "out"
    processes = start(sd1_folder, [out] * COUNT)
    while not parts(out) and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGKILL)  # the coordinator of all
    processes[2].send_signal(signal.SIGKILL)
    statuses = [status for status, _ in ended(processes)]
    chunks = record.read(open_target(out)).chunks
    assert statuses == [-signal.SIGKILL, 0, -signal.SIGKILL, 0]
    assert parts(out) >= {*chunks[1::COUNT], *chunks[3::COUNT]}
    assert {*chunks} - parts(out)
    [(status, said)] = ended([command(sd1_folder, out)])
    assert status == 0 and "taken over from" in said
    assert contents(out) == contents(whole)


def test_nobody_writes_where_the_first_process_cannot_begin(sd1_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    target = open_target(out)
    with Lock(target.fs, target.path(LOCK)):
        (first, said), (other, heard) = ended(start(sd1_folder, [out] * 2))
    assert (first, other) == (2, 2)
    assert "held by" in said
    assert "process 0 could not begin" in heard
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_folders_that_are_not_shared_are_told(sd1_folder, whole, tmp_path):
    (first, _), (other, said) = ended(start(sd1_folder, [tmp_path / "a", tmp_path / "b"]))
    assert (first, other) == (0, 2)
    assert "b/job.json is not what process 0 wrote" in said
    assert 0 < len(parts(tmp_path / "a")) < len(parts(whole))
    assert not (tmp_path / "b").exists()


def test_a_job_waits_for_all_processes_of_another_run(tmp_path):
    target = open_target(tmp_path)
    other = tmp_path / ".sdjax-lock-2.json"
    with Lock(target.fs, str(other)), pytest.raises(LockedError), Process().locked(target):
        pass
    other.write_text("{}")  # of a dead one
    with Process().locked(target):
        assert {path.name for path in tmp_path.iterdir()} == {LOCK}


def test_the_status_names_every_process(tmp_path):
    target = open_target(tmp_path)
    record.Record("a model", "", 0, 1, 1, "files", "png", ()).write(target)
    assert sdjax.batch.status(tmp_path).running is None
    with Lock(target.fs, target.path(LOCK)), Lock(target.fs, target.path(".sdjax-lock-1.json")):
        assert sdjax.batch.status(tmp_path).running.count(f"pid {os.getpid()}") == 2


def test_every_chunk_is_one_processes():
    shares = [Process(index, 3).share(8) for index in range(3)]
    assert sorted(place for share in shares for place in share) == [*range(8)]


def test_what_is_missing_is_said(sd1_folder, tmp_path):
    with pytest.raises(ValueError, match="give all three"), join("host:1", 4):
        pass
    [(status, said)] = ended([command(sd1_folder, tmp_path, "--pod")])
    assert status == 2
    assert "--coordinator HOST:PORT" in said
