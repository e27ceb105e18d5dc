"""A job's pictures are those of the pipeline, and the same bytes however it was placed, cut short or damaged."""

import errno
import io
import itertools
import json
import shutil
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sdjax.batch
from sdjax.batch import manifest, output, processes
from sdjax.batch.interruption import UnfinishedError
from sdjax.batch.lock import LockedError
from sdjax.batch.output import open_target
from sdjax.batch.report import status
from sdjax.commands.main import main
from sdjax.engine import Engine
from sdjax.inputs import changing
from sdjax.pictures.metadata import read_settings
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime import parallel

STEPS = 2
JOB = [
    {"prompt": ["goose", "blue goose"], "seed": "0:5", "num_inference_steps": STEPS},
    {"prompt": "goose", "negative_prompt": "blue", "guidance_scale": [2, 3], "seed": [7, 2**63], "scheduler": "euler"},
]
PICTURES = 14


def on(devices: int, folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, mesh=parallel.data_mesh(jax.devices()[:devices]))


@pytest.fixture(scope="module")
def pipe(one_level_folder) -> StableDiffusionPipeline:
    return on(2, one_level_folder)


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory) -> Path:
    """The job's output, made without any disturbance. Read only."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    done = run(pipe, folder)
    assert (done.made, done.kept, done.pictures, done.batch, done.devices) == (PICTURES, 0, PICTURES, 2, 2)
    return folder


def run(pipe, out, job=JOB, **options):
    lines = [{"num_inference_steps": STEPS, **line} for line in job]
    return sdjax.batch.run(lines, out, model=pipe, **{"batch": 2, "chunk_size": 4, **options})


def contents(folder: Path) -> dict[str, object]:
    """{name: bytes} of all files but the manifest, and the rows of that without what varies."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    parts = {name: manifest.load(files.pop(name)) for name in list(files) if name.startswith(manifest.FOLDER)}
    rows = [{k: v for k, v in row.items() if k not in manifest.VARYING} for part in parts.values() for row in part]
    return files | {"parts": sorted(parts), "rows": sorted(rows, key=lambda row: row["index"])}


def rows(folder: Path) -> list[dict]:
    return contents(folder)["rows"]


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / row["file"]), np.int16) for row in rows(folder)])


@pytest.mark.parametrize("devices", [1, 2])
def test_bytes_do_not_depend_on_the_number_of_devices(devices, one_level_folder, whole, tmp_path):
    done = run(on(devices, one_level_folder), tmp_path / "out")
    assert done.devices == devices
    assert contents(tmp_path / "out") == contents(whole)


def test_pictures_are_the_pipelines(pipe, whole):
    made = pixels(whole)
    assert len(made) == PICTURES
    for row, picture in zip(rows(whole), made, strict=True):
        said = json.loads(row["settings"])
        scheduler = None if said["sampler"] == pipe.scheduler.config["_class_name"] else said["sampler"]
        [expected] = pipe(
            said["prompt"],
            said["negative_prompt"],
            num_inference_steps=STEPS,
            guidance_scale=said["guidance_scale"],
            seed=said["seed"],
            scheduler=scheduler,
        ).images
        assert np.abs(np.asarray(expected, np.int16) - picture).max() <= 1
        assert read_settings(whole / row["file"]) == said
    seeds = [row["seed"] for row in rows(whole)]
    assert seeds == [0, 1, 2, 3, 4] * 2 + [7, 2**63] * 2
    assert made.std() > 20


def test_samplers_and_steps_share_a_batch(one_level_folder, pipe, tmp_path):
    """To the same bytes on any devices and after an interruption, though a call runs the rows of its longest table."""
    swept = {"scheduler": ["euler_ancestral", "dpm2", "ddim"], "num_inference_steps": [3, 2], "seed": [0, 1]}
    job = [{"prompt": "goose"} | swept]
    run(pipe, tmp_path / "two", job)
    run(on(1, one_level_folder), tmp_path / "one", job)
    made = contents(tmp_path / "two")
    assert len(made["parts"]) == 3 and contents(tmp_path / "one") == made
    for row, picture in zip(rows(tmp_path / "two"), pixels(tmp_path / "two"), strict=True):
        said = json.loads(row["settings"])
        own = {"scheduler": said["sampler"], "num_inference_steps": said["num_inference_steps"], "seed": said["seed"]}
        [expected] = pipe("goose", "", guidance_scale=said["guidance_scale"], **own).images
        assert np.abs(np.asarray(expected, np.int16) - picture).max() <= 1
    for part in made["parts"][1:]:
        (tmp_path / "two" / part).unlink()
        assert run(pipe, tmp_path / "two", job).made == 4
        assert contents(tmp_path / "two") == made


TALL = {"height": 272, "width": 16}  # more than the 64 latents of a tile
TRADES = [
    ({}, {}),
    ({"guidance_interval": "0.4:4"}, {"guidance_interval": (0.4, 4.0)}),
    ({"cache_interval": 3}, {"cache_interval": 3}),
    (TALL, TALL),
    ({"vae_tiling": True} | TALL, {"vae_tiling": True} | TALL),
]


def test_work_is_traded_for_time_as_by_the_pipeline(pipe, tmp_path):
    same = {"guidance_scale": 5, "num_inference_steps": 4}
    run(pipe, tmp_path / "out", [{"prompt": "goose", "seed": "0:3"} | same | said for said, _ in TRADES])
    made = [np.asarray(Image.open(tmp_path / "out" / row["file"]), np.int16) for row in rows(tmp_path / "out")]
    for number, (said, call) in enumerate(TRADES):
        own = slice(3 * number, 3 * number + 3)
        expected = pipe("goose", "", num_images_per_prompt=3, **same, **call).images
        assert np.abs(np.asarray(list(map(np.asarray, expected)), np.int16) - made[own]).max() <= 1
        known = {"guidance_interval": None, "cache_interval": None, "vae_tiling": None} | said
        known["guidance_interval"] = known["guidance_interval"] and "0.4:4.0"
        for row in rows(tmp_path / "out")[own]:
            assert known.items() <= row.items()
            settings = json.loads(row["settings"])
            assert {name: settings.get(name) for name in known} == known
    plain, interval, cached, whole, tiled = made[::3]
    assert min(np.abs(plain - interval).max(), np.abs(plain - cached).max(), np.abs(whole - tiled).max()) > 1


def test_unconnected_shares_are_the_whole(pipe, whole, tmp_path):
    parts = [run(pipe, tmp_path / "out", process=processes.share(f"{i}/3")) for i in (3, 1, 2)]
    assert sum(done.made for done in parts) == PICTURES and not any(done.kept for done in parts)
    assert all(done.made for done in parts)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_share_at_work_refuses_its_twin_and_the_whole(pipe, tmp_path):
    with processes.share("2/3").locked(open_target(tmp_path)):
        for twin in (processes.share("2/3"), processes.ALONE):
            with pytest.raises(LockedError), twin.locked(open_target(tmp_path)):
                pass
        with processes.share("1/3").locked(open_target(tmp_path)):
            pass


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", ""])
def test_what_is_no_share(text):
    with pytest.raises(ValueError, match="not a share such as 3/16"):
        processes.share(text)


def test_another_batch_differs_by_rounding_at_most(pipe, whole, tmp_path):
    run(pipe, tmp_path / "out", batch=4)
    assert np.abs(pixels(tmp_path / "out") - pixels(whole)).max() <= 1


def test_a_finished_job_is_left_alone(pipe, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(StableDiffusionPipeline, "sample", None)
    done = run(pipe, out)
    assert (done.made, done.kept) == (0, PICTURES)
    assert contents(out) == contents(whole)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, altered, Path.unlink])
@pytest.mark.parametrize("kind", ["images", "manifest"])
def test_what_is_damaged_is_made_again(damage, kind, pipe, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    damage(sorted(path for path in (out / kind).rglob("*") if path.is_file())[1])
    if damage is altered and kind == "images":
        assert run(pipe, out).made == 0  # its size is trusted
    done = run(pipe, out, verify=True)
    assert done.made in (2, 4) and done.made + done.kept == PICTURES
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch": 4}, "batch 2, not 4"),
        ({"chunk_size": 8}, "chunk_size 4, not 8"),
        ({"format": "webdataset"}, "layout 'files', not 'webdataset'"),
        ({"image_format": "webp"}, "format 'png', not 'webp'"),
        ({"job": JOB[:1]}, "pictures 14, not 10"),
        ({"job": [JOB[0] | {"seed": "1:6"}, JOB[1]]}, "other pictures"),
    ],
)
def test_another_job_is_refused(change, named, pipe, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(ValueError, match=named):
        run(pipe, out, **change)
    assert contents(out) == contents(whole)


def test_another_model_is_refused(sd2_folder, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(ValueError, match=r"has another job: another model, .* fingerprint"):
        run(on(2, sd2_folder), out)


def test_the_batch_of_an_earlier_run_is_kept(pipe, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    assert run(pipe, out, batch=None, chunk_size=None).batch == 2


@pytest.mark.parametrize("line", [{"seed": -1}, {"steps": 3}, {"width": 30}, {"scheduler": "none"}, {"clip_skip": 9}])
def test_a_bad_line_starts_nothing(line, pipe, tmp_path):
    with pytest.raises(ValueError, match="line 2"):
        run(pipe, tmp_path / "out", [{"prompt": "goose"}, {"prompt": "blue"} | line])
    assert not list(tmp_path.iterdir())


def exhausted(most: int):
    """The pipeline on devices that have no memory for more than `most` pictures."""
    sample = StableDiffusionPipeline.sample

    def limited(self, requests, **options):
        if len(requests) > most * self.mesh.size:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        return sample(self, requests, **options)

    return limited


def test_out_of_memory_halves_the_batch(pipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "sample", exhausted(2))
    with pytest.warns(UserWarning, match="a device ran out of memory"):
        done = run(pipe, tmp_path / "out", batch=8, chunk_size=8)
    assert (done.made, done.batch) == (PICTURES, 2)
    assert np.abs(pixels(tmp_path / "out") - pixels(whole)).max() <= 1
    assert run(pipe, tmp_path / "out", batch=8, chunk_size=8).made == 0


def test_out_of_memory_while_the_device_computes(pipe, whole, tmp_path, monkeypatch):
    failures = ["RESOURCE_EXHAUSTED: Out of memory"]
    fetch = Engine._fetch

    def failing(self, units, *rest):
        open, place = units[0].tags[0]
        if open.chunk.indices[place] >= 4 and failures:
            raise jax.errors.JaxRuntimeError(failures.pop())
        return fetch(self, units, *rest)

    monkeypatch.setattr(Engine, "_fetch", failing)
    with pytest.warns(UserWarning, match="batches of 1 from now on"):
        done = run(pipe, tmp_path / "out")
    assert done.made == PICTURES
    assert np.abs(pixels(tmp_path / "out") - pixels(whole)).max() <= 1


def test_a_picture_too_large_by_itself(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "sample", exhausted(0))
    with (
        pytest.warns(UserWarning, match="ran out of memory"),
        pytest.raises(ValueError, match="32x32 does not fit into the memory of a device"),
    ):
        run(pipe, tmp_path / "out")


def test_a_full_disk_loses_nothing(pipe, whole, tmp_path, monkeypatch):
    write, left = output.replacing, iter(range(12))

    def full(path):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(output, "replacing", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(pipe, tmp_path / "out")
    done = run(pipe, tmp_path / "out")
    assert 0 < done.kept < PICTURES
    assert contents(tmp_path / "out") == contents(whole)


@pytest.fixture
def overflowing(monkeypatch):
    """Within it, what the UNet reads of prompts that say blue is NaN."""
    branches = changing.branches_of

    def poisoned(pipe, requests, *rest):
        told = branches(pipe, requests, *rest)
        factors = np.float32([[["blue" in request.prompt and np.nan]] for request in requests])
        return *told[:-1], jax.tree.map(lambda x: x + factors, told[-1])

    @contextmanager
    def within():
        with monkeypatch.context() as patch:
            patch.setattr(changing, "branches_of", poisoned)
            yield

    return within


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_pictures_that_are_not_finite_are_not_done(layout, pipe, whole, overflowing, tmp_path):
    """Of their chunks the others are written; a further run makes these chunks again, to the same bytes."""
    out = tmp_path / "out"
    with overflowing():
        done = run(pipe, out, format=layout, grid=True)
    failed = range(5, 10)
    assert (done.made, done.failed, done.pictures, done.sheets) == (PICTURES - 5, [*failed], PICTURES, [])
    if layout == "files":
        there = {int(path.name[:6]): path.read_bytes() for path in (out / "images").rglob("*.png")}
        assert sorted(there) == [i for i in range(PICTURES) if i not in failed]
        known = contents(whole)
        assert all(data in known.values() for data in there.values())
    assert status(out).missing == [(4, 9)]  # what the finished chunks lack
    done = run(pipe, out, format=layout)
    assert (done.made, done.kept, done.failed) == (6, PICTURES - 6, [])
    run(pipe, tmp_path / "straight", format=layout)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("out", ["/proc/sdjax", "file/out"])
def test_a_target_that_cannot_be_written(out, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        run(pipe, out)


def removed(out: Path) -> None:
    shutil.rmtree(out)


def without_pictures(out: Path) -> None:
    shutil.rmtree(out / "images")


def without_a_picture(out: Path) -> None:
    min((out / "images").rglob("*.png")).unlink()


def a_file(out: Path) -> None:
    shutil.rmtree(out)
    out.touch()


@pytest.fixture
def disturbed(monkeypatch):
    """Makes a function change the output once two chunks are there, and none is being written."""

    def disturb(change, out):
        commit, count, one = output.Output.commit, itertools.count(1), threading.Lock()

        def disturbing(self, chunk, pictures):
            with one:
                files = commit(self, chunk, pictures)
                if next(count) == 2:
                    change(out)
                return files

        monkeypatch.setattr(output.Output, "commit", disturbing)

    return disturb


@pytest.mark.parametrize("change", [removed, without_pictures, without_a_picture])
def test_pictures_that_are_removed_while_the_job_runs(change, pipe, whole, disturbed, tmp_path):
    disturbed(change, tmp_path / "out")
    with pytest.raises(UnfinishedError, match=r"out: \d+ of 14 pictures were removed while the job ran"):
        run(pipe, tmp_path / "out")
    assert 0 < run(pipe, tmp_path / "out").made < PICTURES
    assert contents(tmp_path / "out") == contents(whole)


def test_a_target_that_becomes_a_file(pipe, disturbed, tmp_path):
    disturbed(a_file, tmp_path / "out")
    with pytest.raises(UnfinishedError, match=r"cannot be written: .* of 14 pictures were at the target"):
        run(pipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_record_that_is_removed_is_written_again(pipe, whole, disturbed, tmp_path):
    disturbed(lambda out: (out / "job.json").unlink(), tmp_path / "out")
    run(pipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    "change", [{"pictures": "x"}, {"batch": 0}, {"chunks": [1]}, {"made_with": []}, {"model": None}, {"chunks": None}]
)
def test_a_damaged_record_is_named(change, whole, tmp_path):
    record = json.loads((whole / "job.json").read_bytes())
    for content in (json.dumps(record | change), "[" * 10**5, "5"):
        (tmp_path / "job.json").write_text(content)
        with pytest.raises(ValueError, match=r"job\.json: damaged"):
            status(tmp_path)


def test_one_run_at_a_time(pipe, tmp_path):
    refused = []

    def again(progress):
        if not refused:
            with pytest.raises(LockedError, match="held by the run on"):
                run(pipe, tmp_path / "out")
            refused.append(progress)

    run(pipe, tmp_path / "out", on_progress=again)
    assert refused


def test_progress(pipe, tmp_path):
    seen = []
    run(pipe, tmp_path / "out", on_progress=seen.append)
    assert all(a.done <= b.done for a, b in itertools.pairwise(seen))
    last = seen[-1]
    assert (last.total, last.done, last.waiting, last.devices) == (PICTURES, PICTURES, 0, 2)
    assert last.per_second > 0 and last.seconds_left == 0
    assert Path(last.last).is_file()


def test_loras_and_other_shapes(sd1_folder, tmp_path):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ones = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    save_file(ones, tmp_path / "style.safetensors")
    loras = [None, {str(tmp_path / "style.safetensors"): 0.5}]
    long = " ".join(["goose"] * 100)
    job = [
        {"prompt": "goose", "guidance_scale": 1, "loras": loras, "seed": [1, 2]},
        {"prompt": [long, "blue"], "width": 48, "clip_skip": 1},
    ]
    pipe = on(2, sd1_folder)
    run(pipe, tmp_path / "out", job)
    assert not pipe.loras.weights[str(tmp_path / "style.safetensors")]
    *plain, styled, again = [np.asarray(Image.open(tmp_path / "out" / row["file"])) for row in rows(tmp_path / "out")][
        :4
    ]
    other = on(2, sd1_folder)
    other.load_lora(tmp_path / "style.safetensors", 0.5)
    expected = np.stack(
        list(
            map(
                np.asarray,
                other("goose", guidance_scale=1, num_images_per_prompt=2, seed=[1, 2], num_inference_steps=2).images,
            )
        )
    )
    assert np.abs(expected.astype(int) - np.stack([styled, again])).max() <= 1
    assert np.abs(np.stack(plain).astype(int) - expected).max() > 3
    wide = other
    wide.unload_loras()
    for row in rows(tmp_path / "out")[4:]:
        said = json.loads(row["settings"])
        [expected] = wide(said["prompt"], "", width=48, clip_skip=1, num_inference_steps=2).images
        assert np.abs(np.asarray(expected, int) - np.asarray(Image.open(tmp_path / "out" / row["file"]))).max() <= 1


def test_shards_in_memory(pipe, whole):
    run(pipe, "memory://shards/out", format="webdataset")
    target = output.open_target("memory://shards/out")
    table = manifest.read(target.fs, target.root).to_pylist()
    assert len(table) == PICTURES
    for row, expected in zip(table, rows(whole), strict=True):
        assert row["id"] == expected["id"]
        with tarfile.open(fileobj=io.BytesIO(target.read(row["file"]))) as tar:
            data = tar.extractfile(f"{row['index']:06}-{row['seed']}.png").read()
        assert np.array_equal(Image.open(io.BytesIO(data)), Image.open(whole / expected["file"]))


def test_contact_sheets(pipe, tmp_path):
    job = [{"prompt": ["goose", "blue"], "guidance_scale": [1, 2, 3], "seed": [4, 5]}, {"prompt": "goose", "seed": 9}]
    done = run(pipe, tmp_path / "out", job, grid=True)
    assert [Path(sheet).name for sheet in done.sheets] == ["000001-001.png", "000001-002.png"]
    sheet = np.asarray(Image.open(done.sheets[1]))
    own = [np.asarray(Image.open(tmp_path / "out" / row["file"])) for row in rows(tmp_path / "out")]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, own[0].shape).reshape(-1, *own[0].shape)
    there = [bool((windows == picture).all(axis=(1, 2, 3)).any()) for picture in own]
    assert there == [False] * 6 + [True] * 6 + [False]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (
            {"prompt": ["a", "b"], "seed": [1, 2], "guidance_scale": [1, 2], "scheduler": ["ddim", "euler"]},
            "X, Y and Z",
        ),
        ({"prompt": "a", "seed": "0:3000"}, "on a sheet"),
    ],
)
def test_a_sweep_that_no_sheet_shows(line, named, pipe, tmp_path):
    with pytest.raises(ValueError, match=named):
        run(pipe, tmp_path / "out", [line], grid=True)
    assert not list(tmp_path.iterdir())


def command(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as error:
        main(["batch", *args])
    return error.value.code, *capsys.readouterr()


def test_the_command(one_level_folder, tmp_path, capsys):
    (tmp_path / "job.csv").write_text("prompt,seed,guidance_scale\ngoose,0:3,\nblue,1,3\n")
    out, given = str(tmp_path / "out"), [str(tmp_path / "job.csv"), "--model", str(one_level_folder), "--steps", "2"]
    code, planned, _ = command(capsys, *given, "--out", out, "--batch", "1", "--dry-run")
    assert code == 0 and not (tmp_path / "out").exists()
    assert "pictures      4" in planned and "batches       4 of 1, 2 at a time" in planned
    code, said, _ = command(capsys, *given, "--out", out, "--batch", "1", "--log-json")
    lines = [json.loads(line) for line in said.splitlines()]
    assert code == 0 and {line["event"] for line in lines} == {"written", "summary"}
    assert lines[-1]["made"] == 4
    code, _, said = command(capsys, *given, "--out", out, "--batch", "2", "--dry-run")
    assert code == 2 and "has another job: batch 1, not 2" in said
    code, said, _ = command(capsys, *given, "--out", out)
    assert code == 0 and "4 pictures" in said and "0 made, 4 there before" in said
    assert command(capsys, *given, "--out", out, "--quiet")[1:] == ("", "")
    code, said, _ = command(capsys, "--status", out)
    assert code == 0 and "4 of 4 pictures (100.0%)" in said and "nothing" in said
    [part] = (tmp_path / "out" / "manifest").iterdir()
    part.unlink()
    code, said, _ = command(capsys, "--status", out, "--log-json")
    assert json.loads(said)["missing"] == [[0, 3]] and json.loads(said)["done"] == 0


def test_the_command_fails_for_pictures_that_are_gone(one_level_folder, disturbed, tmp_path, capsys):
    disturbed(removed, tmp_path / "out")
    options = ["--prompt", "goose", "--seeds", "0:6", "--steps", "2", "--batch", "1", "--chunk-size", "1", "--quiet"]
    code, said, error = command(capsys, *options, "--model", str(one_level_folder), "--out", str(tmp_path / "out"))
    assert (code, said) == (1, "") and error.count("\n") == 1
    assert error.startswith(f"error: {tmp_path}/out: ") and "of 6 pictures were removed" in error


def test_the_command_fails_for_pictures_that_are_not_finite(one_level_folder, overflowing, tmp_path, capsys):
    options = ["--prompt", "goose", "--prompt", "blue", "--seeds", "0:3", "--steps", "2", "--batch", "1", "--quiet"]
    given = [*options, "--model", str(one_level_folder), "--out", str(tmp_path / "out")]
    with overflowing():
        code, said, error = command(capsys, *given)
    assert (code, said) == (1, "") and error.count("\n") == 1
    assert error.startswith("error: 3 of 6 pictures not finite, and not at") and ": 3-5; " in error
    assert command(capsys, *given) == (0, "", "")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prompt", "x"], "--out"),
        (["--status", "nowhere"], "there is no job here"),
        (["job.jsonl", "--out", "out"], "line 1: has no prompt; line 3: seed"),
        (["--prompt", "x", "--out", "out", "--batch", "3"], "power of two"),
        (
            ["--prompt", "x", "--out", "out", "--guidance-interval", "5:1"],
            "--guidance-interval must be two noise levels",
        ),
    ],
)
def test_the_command_refuses(args, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.jsonl").write_text('{"seed": 1}\n{"prompt": "x"}\n{"prompt": "x", "seed": -1}\n')
    code, _, error = command(capsys, *args)
    assert code == 2 and said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["job.jsonl"]


def test_the_options_are_a_job(tmp_path, capsys, monkeypatch):
    made = []

    def run(items, out, **_):
        made.extend(items)
        return SimpleNamespace(failed=())

    monkeypatch.setattr(sdjax.batch.runner, "run", run)
    (tmp_path / "style.safetensors").touch()
    options = "--prompt goose --guidance-interval 0.3:5 --guidance-interval 0:inf --cache-interval 3 --vae-tiling"
    options += f" --lora {tmp_path / 'style.safetensors'}:0.5 --size 32x16 --original-size 8x9"
    assert command(capsys, *options.split(), "--out", str(tmp_path / "out"), "--quiet") == (0, "", "")
    assert [(i.guidance_interval, i.cache_interval, i.vae_tiling) for i in made] == [
        ((0.3, 5.0), 3, True), ((0.0, np.inf), 3, True)
    ]  # fmt: skip
    assert {(i.loras, i.width, i.height, i.original_size) for i in made} == {
        (((str(tmp_path / "style.safetensors"), 0.5),), 32, 16, (8, 9))
    }
