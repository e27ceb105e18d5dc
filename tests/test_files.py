"""sdjax.files: whatever ends the writer, a name stands for a whole file or for none."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sdjax import files
from sdjax.files import TEMPORARY, creating, replacing

NEW = b"new " * 50_000

KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path

name, folder = sys.argv[1], Path(sys.argv[2])
new = b"new " * 100


def without_links(*_):
    raise PermissionError(1, "Operation not permitted")


def replacing(path):
    from sdjax.files import replacing
    with replacing(path) as temporary:
        temporary.write_bytes(new)


def creating(path):
    from sdjax.files import creating
    with creating(path) as temporary:
        temporary.write_bytes(new)


def creating_without_links(path):
    os.link = without_links
    creating(path)


def save_png(path):
    from sdjax.pictures import metadata
    metadata.encode = lambda *_: new
    metadata.save_png(path, None, {})


write = globals()[name]
folder.mkdir()
write(folder / "first")  # imports
shutil.rmtree(folder)
found = []
for at in range(100_000):
    folder.mkdir()
    if name == "replacing":
        (folder / "file").write_bytes(b"old")
    child = os.fork()
    if child == 0:
        left = at

        def profile(frame, event, _):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= event in ("call", "c_call")

        sys.setprofile(profile)
        write(folder / "file")
        sys.setprofile(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found.append({path.name: path.read_bytes().hex() for path in folder.iterdir()})
    shutil.rmtree(folder)
    if not os.WIFSIGNALED(status):
        break
json.dump([os.waitstatus_to_exitcode(status), found], sys.stdout)
"""


def killed_everywhere(name: str, folder: Path) -> list[dict[str, bytes]]:
    """What a writer leaves in a folder, killed before each call that it makes, of Python or C; last, undisturbed."""
    command = [sys.executable, "-c", KILLED, name, str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, found = json.loads(done.stdout)
    assert status == 0
    return [{name: bytes.fromhex(data) for name, data in left.items()} for left in found]


@pytest.mark.parametrize("name", ["replacing", "creating", "creating_without_links", "save_png"])
def test_a_killed_writer_leaves_a_whole_file_or_none(tmp_path, name):
    *killed, undisturbed = killed_everywhere(name, tmp_path)
    assert set(undisturbed) == {"file"}
    before = {b"old"} if name == "replacing" else {None}
    assert {left.get("file") for left in killed} == before | {undisturbed["file"]}
    beside = {name for left in killed for name in left} - {"file"}
    assert beside and all(TEMPORARY.fullmatch(name) for name in beside)


@pytest.fixture(params=["links", "no links", "no such function"])
def links(request, monkeypatch):
    """File systems and systems with and without hard links."""
    error = {
        "no links": PermissionError(errno.EPERM, "Operation not permitted"),
        "no such function": NotImplementedError,
    }

    def refuse(*_):
        raise error[request.param]

    if request.param in error:
        monkeypatch.setattr(os, "link", refuse)


def test_a_new_file_refuses_an_existing_one(tmp_path, links):
    path = tmp_path / "file"
    with creating(path) as temporary:
        temporary.write_bytes(NEW)
    with pytest.raises(FileExistsError, match="file"), creating(path) as temporary:
        raise AssertionError("before anything is written")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="link"), creating(tmp_path / "link"):
        raise AssertionError("before anything is written")
    assert path.read_bytes() == NEW and len(list(tmp_path.iterdir())) == 2


def test_a_new_file_refuses_one_that_appears_meanwhile(tmp_path, links):
    path = tmp_path / "file"
    with pytest.raises(FileExistsError, match="file"), creating(path) as temporary:
        temporary.write_bytes(NEW)
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and list(tmp_path.iterdir()) == [path]


def test_of_writers_at_once_one_wins(tmp_path, links):
    path, won, start = tmp_path / "file", [], threading.Barrier(8)

    def write(number):
        try:
            with creating(path) as temporary:
                temporary.write_text(str(number))
                start.wait()
        except FileExistsError:
            return
        won.append(str(number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_text()] == won and list(tmp_path.iterdir()) == [path]


def test_without_locks_either(tmp_path, monkeypatch):
    """Windows."""
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.delattr(os, "link")
    with creating(tmp_path / "file") as temporary:
        temporary.write_bytes(NEW)
    with pytest.raises(FileExistsError), creating(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_bytes() == NEW


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("where", ["block", "fsync", "replace", "link"])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, error, where):
    path = tmp_path / "file"

    def interrupt(*_):
        raise error

    def write(way):
        with way(path) as temporary:
            temporary.write_bytes(NEW)
            if where == "block":
                interrupt()

    if where != "block":
        monkeypatch.setattr(os, where, interrupt)
    if where not in ("replace", "link" if isinstance(error, OSError) else None):  # another way is found then
        with pytest.raises(type(error)):
            write(creating)
        assert not list(tmp_path.iterdir())
    if where != "link":
        path.write_bytes(b"old")
        with pytest.raises(type(error)):
            write(replacing)
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_data_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def watching(handle):
        seen.append((os.fstat(handle).st_size, [path.name for path in tmp_path.iterdir() if path.name == "file"]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watching)
    for way in (creating, replacing):
        with way(tmp_path / "file") as temporary:
            temporary.write_bytes(NEW)
    assert seen == [(len(NEW), []), (len(NEW), ["file"])]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for way in (creating, replacing):
        with pytest.raises(FileNotFoundError, match="nowhere"), way(tmp_path / "nowhere" / "file") as temporary:
            temporary.write_bytes(NEW)


def test_a_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    for way in (creating, replacing):
        with way(tmp_path / way.__name__) as temporary:
            temporary.touch()
        assert (tmp_path / way.__name__).stat().st_mode == (tmp_path / "plain").stat().st_mode
