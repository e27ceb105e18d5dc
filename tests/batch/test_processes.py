"""Several processes make one job's pictures, to the bytes of one process, and a lost one holds up no other."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from processes_of_a_job import begin, contents, ended, parts

import sdjax.batch
from sdjax.batch import record
from sdjax.batch.lock import Lock, LockedError
from sdjax.batch.output import open_target
from sdjax.batch.processes import LOCK, Process, join


def start(model: Path, *outs: Path) -> list[subprocess.Popen]:
    """As many processes of the job as there are outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pod = ["--quiet", "--coordinator", f"127.0.0.1:{port}", "--processes", str(len(outs))]
    return [begin(model, out, *pod, "--index", str(index)) for index, out in enumerate(outs)]


def test_two_processes_write_the_bytes_of_one(one_level_folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert ended(*start(one_level_folder, out, out)) == [(0, "")] * 2
    assert contents(out) == contents(undisturbed)


def test_a_killed_process_leaves_its_share_to_the_next_run(one_level_folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    processes = start(one_level_folder, out, out, out)
    while not parts(out) and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGKILL)  # the coordinator of all
    processes[2].send_signal(signal.SIGKILL)
    statuses = [status for status, _ in ended(*processes)]
    chunks = record.read(open_target(out)).chunks
    assert statuses == [-signal.SIGKILL, 0, -signal.SIGKILL]
    assert parts(out) >= {*chunks[1::3]}
    assert {*chunks} - parts(out)
    [(status, said)] = ended(begin(one_level_folder, out, "--quiet"))
    assert status == 0 and "taken over from" in said
    assert contents(out) == contents(undisturbed)


def test_nobody_writes_where_the_first_process_cannot_begin(one_level_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    target = open_target(out)
    with Lock(target.fs, target.path(LOCK)):
        (first, said), (other, heard) = ended(*start(one_level_folder, out, out))
    assert (first, other) == (2, 2)
    assert "held by" in said
    assert "process 0 could not begin" in heard
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_folders_that_are_not_shared_are_told(one_level_folder, undisturbed, tmp_path):
    (first, _), (other, said) = ended(*start(one_level_folder, tmp_path / "a", tmp_path / "b"))
    assert (first, other) == (0, 2)
    assert "b/job.json is not what process 0 wrote" in said
    assert 0 < len(parts(tmp_path / "a")) < len(parts(undisturbed))
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
    record.Record("a model", "", 1, 1, 1, "files", "png", ()).write(target)
    assert sdjax.batch.status(tmp_path).running is None
    with Lock(target.fs, target.path(LOCK)), Lock(target.fs, target.path(".sdjax-lock-1.json")):
        assert sdjax.batch.status(tmp_path).running.count(f"pid {os.getpid()}") == 2


def test_every_chunk_is_one_processes():
    shares = [Process(index, 3).share(8) for index in range(3)]
    assert sorted(place for share in shares for place in share) == [*range(8)]


def test_what_is_missing_is_said(one_level_folder, tmp_path):
    with pytest.raises(ValueError, match="give all three"), join("host:1", 4):
        pass
    [(status, said)] = ended(begin(one_level_folder, tmp_path, "--pod"))
    assert status == 2
    assert "--coordinator HOST:PORT" in said
