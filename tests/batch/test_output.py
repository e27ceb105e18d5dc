"""sdjax.batch.output: chunks whole or not at all, as files or as WebDataset shards, at any fsspec target."""

import errno
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from sd_parsers import ParserManager

import sdjax.batch
from sdjax.batch import manifest, output
from sdjax.batch.output import LAYOUTS, Output, Picture, open_target
from sdjax.files import temporary_name
from sdjax.pictures.metadata import FORMATS, encode, read_settings
from sdjax.pipeline import StableDiffusionPipeline

SIZE = 64


def settings(index):
    return {
        "prompt": f"a goose 🦢, number {index}",
        "negative_prompt": "red",
        "seed": 100 + index,
        "sampler": "euler",
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "width": SIZE,
        "height": SIZE,
    }


def picture(index, format="png", **changed):
    noise = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    data = encode(Image.fromarray(noise), settings(index), format)
    known = {"index": index, "id": f"{index:020x}", "settings": settings(index), "data": data, "nsfw": False}
    return Picture(**known | {"seconds": 0.5} | changed)


PICTURES = [picture(index) for index in (998, 999, 1000)]


@dataclass(frozen=True)
class ChunkOf:
    """Of a plan's chunk what an output asks for."""

    id: str
    size: int

    def __len__(self) -> int:
        return self.size


CHUNK = ChunkOf("0123456789abcdef0123", len(PICTURES))


@pytest.fixture(params=["local", "memory"])
def target(request, tmp_path):
    opened = open_target(tmp_path / "out" if request.param == "local" else f"memory:/{tmp_path}/out")
    opened.probe()
    return opened


@pytest.fixture(params=LAYOUTS)
def out(request, target):
    return Output(target, request.param, "png", "a model")


def contents(target):
    """{name: bytes} of all files below the target."""
    paths = target.fs.find(target.root)
    return {path.removeprefix(f"{target.root}/"): target.fs.cat_file(path) for path in paths}


def test_files_lie_in_folders_of_a_thousand(target):
    names = Output(target, "files", "png", "").commit(CHUNK, PICTURES)
    assert names == [
        "images/000/000998-1098-a-goose-number-998.png",
        "images/000/000999-1099-a-goose-number-999.png",
        "images/001/001000-1100-a-goose-number-1000.png",
    ]
    assert contents(target).keys() == {*names, f"manifest/{CHUNK.id}.parquet"}
    assert [target.read(name) for name in names] == [made.data for made in PICTURES]


@pytest.mark.parametrize("format", FORMATS)
def test_another_tool_reads_what_a_job_wrote(tmp_path, format):
    [name] = Output(open_target(tmp_path), "files", format, "").commit(replace(CHUNK, size=1), [picture(7, format)])
    assert name.endswith(FORMATS[format].suffix)
    found = ParserManager().parse(tmp_path / name)
    assert (found.full_prompt, found.samplers[0].parameters["seed"]) == ("a goose 🦢, number 7", "107")
    assert read_settings(tmp_path / name) == settings(7)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its reader leaves the file open
@pytest.mark.parametrize("format", FORMATS)
def test_webdataset_reads_a_shard(tmp_path, format):
    import webdataset

    made = [picture(index, format) for index in range(3)]
    [name] = Output(open_target(tmp_path), "webdataset", format, "").commit(replace(CHUNK, size=len(made)), made)
    assert name == f"shards/{CHUNK.id}.tar"
    with webdataset.WebDataset(str(tmp_path / name), shardshuffle=False) as samples:
        for sample, expected in zip(samples, made, strict=True):
            assert sample["__key__"] == f"{expected.index:06}-{100 + expected.index}"
            assert sample[FORMATS[format].suffix[1:]] == expected.data
            assert sample["txt"].decode() == expected.settings["prompt"]
            known = {"id": expected.id, "index": expected.index, "nsfw": False}
            assert json.loads(sample["json"]) == expected.settings | known


def test_a_shard_says_nothing_of_the_machine(target):
    [name] = Output(target, "webdataset", "png", "").commit(CHUNK, PICTURES)
    with tarfile.open(fileobj=io.BytesIO(target.read(name))) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_the_manifest_says_where_each_picture_is(out):
    names = out.commit(CHUNK, PICTURES)
    rows = manifest.read(out.target.fs, out.target.root).to_pylist()
    assert [row["index"] for row in rows] == [998, 999, 1000]
    assert {row["file"] for row in rows} == set(names)
    for row, made in zip(rows, PICTURES, strict=True):
        assert row["id"] == made.id and json.loads(row["settings"]) == made.settings
        assert (row["fingerprint"], row["nsfw"], row["seconds"]) == ("a model", False, 0.5)
        assert row["bytes"] == len(out.target.read(row["file"]))
        assert row["sdjax"] and row["jax"]


def test_two_runs_differ_in_their_seconds_alone(tmp_path, out):
    out.commit(CHUNK, PICTURES)
    first = contents(out.target)
    out.commit(CHUNK, PICTURES)
    assert contents(out.target) == first
    out.commit(CHUNK, [Picture(**{**vars(made), "seconds": 0.7}) for made in PICTURES])
    second = contents(out.target)
    part = manifest.part(CHUNK.id)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == [part]
    old, new = (pyarrow.parquet.read_table(io.BytesIO(found[part])) for found in (first, second))
    assert old != new and old.drop_columns(manifest.VARYING) == new.drop_columns(manifest.VARYING)


def test_a_chunk_is_finished_when_all_of_it_is_there(out):
    assert not out.finished(CHUNK) and out.committed() == set()
    out.commit(CHUNK, PICTURES)
    assert out.finished(CHUNK) and out.committed() == {CHUNK.id}
    assert not out.finished(replace(CHUNK, id="another"))


@pytest.mark.parametrize("harm", ["truncated", "altered", "emptied", "removed"])
@pytest.mark.parametrize("which", ["images", "manifest"])
def test_a_harmed_chunk_is_found_and_made_again(out, which, harm):
    names = out.commit(CHUNK, PICTURES)
    whole = contents(out.target)
    name = names[-1] if which == "images" else manifest.part(CHUNK.id)
    path, data = out.target.path(name), whole[name]
    if harm == "removed":
        out.target.fs.rm_file(path)
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        out.target.fs.pipe_file(path, {"truncated": data[:-1], "altered": flipped, "emptied": b""}[harm])
    assert not out.finished(CHUNK, verify=True)
    assert out.finished(CHUNK) == ((which, harm) == ("images", "altered"))
    out.commit(CHUNK, PICTURES)
    assert out.finished(CHUNK, verify=True) and contents(out.target) == whole


def test_the_manifest_is_written_last(out, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(manifest, "dump", killed)
    with pytest.raises(Killed):
        out.commit(CHUNK, PICTURES)
    assert not out.finished(CHUNK)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_fills_up_is_named_and_leaves_no_half_file(tmp_path, layout):
    out = Output(open_target(tmp_path), layout, "png", "")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # a picture has about 12 KB
    try:
        with pytest.raises(OSError, match=r"cannot be written: File too large: '.*/(images|shards)/"):
            out.commit(CHUNK, PICTURES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    out.commit(CHUNK, PICTURES)
    assert out.finished(CHUNK)


def test_a_write_that_fails_keeps_what_was_there(tmp_path, monkeypatch):
    target = open_target(tmp_path)
    target.write("a/b.json", b"old")
    with monkeypatch.context() as patch:

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*b\.json'") as raised:
            target.write("a/b.json", b"new")
    assert raised.value.errno == errno.ENOSPC
    assert contents(target) == {"a/b.json": b"old"}


def test_what_killed_writers_left_is_swept(tmp_path):
    out = Output(open_target(tmp_path), "files", "png", "")
    out.commit(CHUNK, PICTURES)
    kept = contents(out.target)
    (tmp_path / "notes.tmp").write_text("mine")
    for folder in (".", "images/000", "manifest"):
        (tmp_path / folder / temporary_name()).write_bytes(b"half a pict")
    assert out.target.sweep() == 3
    assert contents(out.target) == kept | {"notes.tmp": b"mine"}


@pytest.fixture
def unprivileged():
    """Root may write everywhere; nobody may not."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_read_only_target_is_named_before_anything_starts(unprivileged):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        for place in (folder, f"{folder}/new/deep"):
            with pytest.raises(PermissionError, match=f"cannot be written: .*'{place}'"):
                open_target(place).probe()
        os.chmod(folder, 0o755)
        open_target(f"{folder}/new/deep").probe()
        assert os.listdir(f"{folder}/new/deep") == []


def test_a_target_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written: File exists: '.*file'"):
        open_target(tmp_path / "file").probe()


def test_an_error_of_an_object_store_is_one_line_with_its_name(monkeypatch):
    class ClientError(Exception):
        pass

    def refuse(*_, **__):
        raise ClientError("Access\nDenied")

    target = open_target("memory://bucket/job")
    for method in ("pipe_file", "pipe"):
        monkeypatch.setattr(target.fs, method, refuse)
    with pytest.raises(OSError, match=r"^memory://bucket/job: cannot be written: Access Denied$"):
        target.probe()
    with pytest.raises(OSError, match=r"^memory://bucket/job: cannot be written: Access Denied$"):
        Output(target, "files", "png", "").commit(CHUNK, PICTURES)
    with pytest.raises(OSError, match=r"bucket/job/job\.json: cannot be written: Access Denied$"):
        target.write("job.json", b"")


def test_a_target_of_no_known_kind_is_named():
    with pytest.raises(ValueError, match=r"nosuch://bucket/job: not a path or URL .*Protocol not known: nosuch"):
        open_target("nosuch://bucket/job")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "a target without a name"),
        (" ", "a target without a name"),
        ("file://localhost/tmp/out", "three slashes"),
        ("file://out", "three slashes"),
        ("a::b", "a chain of URLs"),
        ("simplecache::memory://out", "a chain of URLs"),
        ("zip:///nowhere.zip", "not a path or URL"),
        ("dir://out", "not a path or URL"),
        ("reference://out", "not a path or URL"),
    ],
)
def test_what_is_no_target_is_named(url, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        open_target(url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["data:text/plain,x", "file/out", "/dev/null/out", "x" * 300])
def test_where_nothing_can_be_written_is_known_before_the_model_is_loaded(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    with pytest.raises(OSError, match="cannot be written"):
        sdjax.batch.run([{"prompt": "goose"}], out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    open_target(tmp_path / "new/deep").check()
    assert not (tmp_path / "new").exists()


def test_what_is_no_file_is_not_read(tmp_path):
    target = open_target(tmp_path)
    os.mkfifo(tmp_path / "job.json")
    with pytest.raises(OSError, match=r"job\.json: cannot be read: no regular file"):
        target.read("job.json")


def test_an_error_of_an_object_store_when_it_is_read(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no credentials")

    target = open_target("memory://bucket/job")
    for method in ("cat_file", "info", "ls"):
        monkeypatch.setattr(target.fs, method, refuse)
    out = Output(target, "files", "png", "")
    for read in (lambda: target.read("a"), lambda: target.size("a"), target.names, out.committed):
        with pytest.raises(OSError, match=r"memory://bucket/job.*: cannot be read: no credentials"):
            read()


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/job", "s3fs"), ("gs://bucket/job", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=f"{url}: this kind of target needs .*{package}"):
        open_target(url)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'a batch job needs pyarrow: pip install "sdjax\[batch\]"'):
        Output(open_target("memory://x"), "files", "png", "")
    with pytest.raises(ValueError, match="needs pyarrow and webdataset"):
        Output(open_target("memory://x"), "webdataset", "png", "")


@pytest.mark.parametrize(("layout", "format", "problem"), [("zip", "png", "layout"), ("files", "gif", "format")])
def test_an_unknown_choice_is_refused(layout, format, problem):
    with pytest.raises(ValueError, match=f"{problem} must be one of"):
        Output(open_target("memory://x"), layout, format, "")


def test_paths_and_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("out", Path("out"), tmp_path / "out", f"file://{tmp_path}/out/"):
        target = open_target(place)
        assert target.path("job.json") == f"{tmp_path}/out/job.json"
        assert target.shown("job.json").endswith("out/job.json")
    target.write("job.json", b"{}")
    assert (target.size("job.json"), target.read("none"), target.size("none")) == (2, None, None)


def test_files_have_the_permissions_of_new_files(tmp_path):
    target = open_target(tmp_path)
    target.write("a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
