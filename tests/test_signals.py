"""Ctrl-C, SIGTERM and SIGKILL at every file operation of a command, and while it starts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sdjax.files import TEMPORARY

BATCH = """
from types import SimpleNamespace

from sdjax.batch import output, plan, prepare, progress, record, runner


class Sampler:
    def __init__(self, pipe, target, shared, emit):
        self.output, self.emit, self.usage = target, emit, runner.Usage()

    def run(self, chunks, stop):
        for chunk in chunks:
            if stop.is_set():
                return
            known = zip(chunk.indices, chunk.ids, chunk.items)
            pictures = [output.Picture(i, id, item.settings(), b"picture", None, 0.1) for i, id, item in known]
            self.emit(progress.Written(chunk.id, self.output.commit(chunk, pictures), len(pictures), 0, []))


def prepared(items, out, **_):
    made = output.Output(output.open_target(out), "files", "png", "f")
    return prepare.Prepared(items, SimpleNamespace(mesh=SimpleNamespace(size=1)), made, {"model": "m"})


record.versions = lambda: {}
runner.Sampler, runner.prepare = Sampler, prepared
runner.lay_out = lambda ready, *_: plan.plan(ready.items, "f", 1, 1)
"""
"""A job whose pictures are bytes: all but the devices"""

EVERY_OPERATION = """
import io, json, os, shutil, signal, sys, time, types
from pathlib import Path

import numpy as np
from PIL import Image

import sdjax.commands.compile, sdjax.commands.convert, sdjax.commands.main, sdjax.files, sdjax.pictures.grids
import sdjax.pictures.metadata
from sdjax import files
from sdjax.commands import signals
from sdjax.commands.main import main
from sdjax.sampling import from_config

OPERATIONS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")
folder, every, seconds, arguments = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]


class Pipeline:
    guidance_scale = 7.5
    scheduler = from_config("ddim")
    unet = types.SimpleNamespace(conv_in=types.SimpleNamespace(kernel=np.zeros(1)))
    from_pretrained = classmethod(lambda cls, *_, **__: cls())
    set_progress_bar_config = __call__ = lambda self, *_, **__: None

    def sample(self, requests):
        pictures = [Image.new("RGB", (8, 8), (request.seed, 0, 0)) for request in requests]
        return types.SimpleNamespace(images=pictures, nsfw_content_detected=None, not_finite=[False] * len(requests))

    def save_pretrained(self, path):
        for part in ("unet", "vae"):
            (path / part).mkdir()
            for name in ("config.json", "weights"):
                with files.replacing(path / part / name) as temporary:
                    temporary.write_text(name)


def write(out, executables):
    with files.replacing(out) as temporary:
        temporary.write_text("compiled")


recording = sdjax.files.suppress
inputs = types.SimpleNamespace(scheduler_of=lambda pipe, *_: pipe.scheduler)
inputs.guidance_scale = lambda pipe, **_: pipe.guidance_scale
inputs.request_size, inputs.takes_pictures = lambda *_: (8, 8), lambda pipe: False
sys.modules["sdjax.pipeline"] = types.SimpleNamespace(StableDiffusionPipeline=Pipeline)
sys.modules["sdjax.runtime.ahead"] = sdjax.runtime.ahead = types.SimpleNamespace(recording=recording, write=write)
sys.modules["sdjax.inputs"] = sdjax.inputs = inputs


def is_inside(path):
    return isinstance(path, (str, Path)) and (folder in Path(path).parents or not os.path.isabs(path))


def run(signum=None, at=-1):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(folder)
        left = at

        def hook(event, args):
            nonlocal left
            if armed and event in OPERATIONS and is_inside(args[0]):
                left -= 1
                if left == -1:
                    os.kill(os.getpid(), signum)
                    time.sleep(seconds)

        armed = False
        sys.addaudithook(hook)
        signals.leave_at_signals()
        armed = at >= 0
        try:
            main(arguments)
        except SystemExit as done:
            os._exit(done.code)
        finally:
            os._exit(77)  # never on with the parent's loop
    os.close(writer)
    with open(reader) as said:
        said = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def imported():
    folder.mkdir()
    os.chdir(folder)
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        main(arguments)
    except SystemExit:
        sys.stdout = stdout
        os.chdir("/")
        shutil.rmtree(folder)


if arguments[0] != "batch":  # which begins threads
    imported()
for at in range(0, 1000, every):
    ended = False
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        folder.mkdir()
        code, said = run(signum, at)
        left = sorted(path.name for path in folder.iterdir())
        whole = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        if code == 0:
            ended = True
        again = run() if signum == signal.SIGKILL and code != 0 else None
        after = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        print(json.dumps([signum, at, code, said, left, whole, again, after]))
        shutil.rmtree(folder)
    if ended:
        break
"""

COMMANDS = {
    "generate": (["generate", "x", "--seeds", "0:2", "--model", "m"], {"x-0.png", "x-1.png"}),
    "convert": (["convert", "m", "new"], {"new"}),
    "compile": (["compile", "--out", "new"], {"new"}),
}


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_signal_at_file_operations_of_a_job_loses_nothing(tmp_path):
    """At every fifth operation, from the first look at the target to the last part of the manifest."""
    arguments = ["batch", "--prompt", "x", "--seeds", "0:2", "--out", "new", "--quiet"]
    script = [sys.executable, "-c", BATCH + EVERY_OPERATION, str(tmp_path / "out"), "5", "0.4", *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    whole = next(sizes for _, _, code, _, _, sizes, *_ in found if code == 0)  # of a run that was not stopped
    assert len(found) > 3 * 5 and len(whole) == len(["job.json"]) + 2 * len(["picture", "part"])
    for signum, at, code, said, _, sizes, again, after in found:
        files = {name: size for name, size in sizes.items() if not name.endswith(("lock.json", ".tmp"))}
        assert files.items() <= whole.items(), (signum, at)
        if signum == signal.SIGKILL:
            assert code in (0, -signal.SIGKILL)
            assert again is None or (again[0] == 0 and {*whole} == {*after} & {*whole, *sizes}), (at, again, after)
            assert not [name for name in after if TEMPORARY.search(name)], (at, after)
        else:
            assert code in (0, 128 + signum) and len(said.splitlines()) == (code != 0), (at, said)
            assert files.keys() == sizes.keys(), at
            assert code or files == whole, at


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_at_any_file_operation_leaves_nothing_half_written(command, tmp_path):
    arguments, names = COMMANDS[command]
    script = [sys.executable, "-c", EVERY_OPERATION, str(tmp_path / "out"), "1", "60", *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 3 * 5
    wholes = found[-1][5]  # of a run that was not stopped
    assert {name.partition("/")[0] for name in wholes} == names
    for signum, at, code, said, left, sizes, again, after in found:
        temporary = [name for name in left if TEMPORARY.fullmatch(name)]
        assert {name: size for name, size in sizes.items() if not TEMPORARY.match(name)}.items() <= wholes.items(), at
        if code == 0:
            assert (said, set(left)) == ("", names)
        elif signum == signal.SIGKILL:
            assert code == -signal.SIGKILL
            ended_well = again[0] == 0 or "exists already" in again[1]
            assert ended_well and not [name for name in after if TEMPORARY.search(name)], (at, again, after)
        else:
            assert (code, said, temporary) == (128 + signum, "interrupted\n", []), at


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads which signals a process handles")
@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("command", ["generate", "batch"])
def test_ctrl_c_while_a_command_starts_is_one_line(command, seconds, tmp_path):
    """Imports, the first programs: where an exception would be lost, or end in a traceback."""
    arguments = {
        "generate": ["generate", "x", "--seeds", "0:64"],
        "batch": ["batch", "--prompt", "x", "--steps", "999", "--out", "out"],
    }
    begun = [sys.executable, "-m", "sdjax", *arguments[command]]
    with subprocess.Popen(begun, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not handles(process.pid, signal.SIGTERM):
            time.sleep(0.002)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (130, "", 1), err
    assert not [name for name in os.listdir(tmp_path) if name != "out"]


def handles(pid, signum):
    with open(f"/proc/{pid}/status") as status:
        [caught] = [line for line in status if line.startswith("SigCgt:")]
    return int(caught.split()[1], 16) >> (signum - 1) & 1


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """A shell that starts a command in the background, and nohup, have it ignore Ctrl-C."""
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from sdjax.commands import signals; "
    ignoring += "signals.leave_at_signals(); signal.raise_signal(signal.SIGINT); import time; time.sleep(0.2)"
    assert subprocess.run([sys.executable, "-c", ignoring]).returncode == 0
