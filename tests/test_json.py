"""What sdjax writes as JSON is JSON: no Infinity and no NaN, which other readers refuse."""

import ast
import io
import json
import tarfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

import sdjax.batch
from sdjax.batch import manifest
from sdjax.checkpoints import folder
from sdjax.pictures.metadata import EXIF_SDJAX, encode, read_settings
from sdjax.sampling import from_config

ROOT = Path(sdjax.__file__).parents[1]
SOLVERS = ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"]

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under NumPy 2


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON: {text}")

    return json.loads(text, parse_constant=refuse)


def carried(data: bytes) -> str:
    """The JSON in a picture file, as any other tool finds it."""
    image = Image.open(io.BytesIO(data))
    note = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote, b"")
    return image.text["sdjax"] if image.format == "PNG" else note.removeprefix(EXIF_SDJAX).decode()


def test_every_writer_is_strict():
    calls = [
        (path.name, node.lineno, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for part in ("sdjax", "scripts")
        for path in (ROOT / part).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps", "json.JSONEncoder")
    ]
    assert len(calls) > 10
    others = [
        call for call in calls if call[0] not in ("fuzz.py", "fuzz_serve.py")
    ]  # which write what readers are to refuse
    assert not [call for call in others if call[2].get("allow_nan") != "False"]


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder, scheduler="dpmpp_2m")


def test_a_saved_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    written = [strict(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert len(written) == 7


@pytest.mark.parametrize(("layout", "format"), [("files", "png"), ("files", "webp"), ("webdataset", "jpeg")])
def test_a_job(pipe, tmp_path, layout, format):
    job = [{"prompt": "goose", "num_inference_steps": 2, "guidance_interval": "0.3:inf", "width": 16, "height": 16}]
    sdjax.batch.run(job, tmp_path, model=pipe, batch=1, format=layout, image_format=format)
    found = [strict(path.read_text()) for path in tmp_path.rglob("*.json")]
    found += [strict(carried(path.read_bytes())) for path in tmp_path.glob("images/*/*")]
    for shard in tmp_path.glob("shards/*"):
        with tarfile.open(shard) as tar:
            files = {Path(member.name).suffix: tar.extractfile(member).read() for member in tar}
        found += [strict(files[".json"]), strict(carried(files[".jpeg" if ".jpeg" in files else ".jpg"]))]
    rows = [row for path in tmp_path.glob("manifest/*") for row in manifest.load(path.read_bytes())]
    found += [strict(row["settings"]) for row in rows]
    settings = [said for said in found if "scheduler" in said]
    assert len(settings) == {"files": 2, "webdataset": 3}[layout]
    assert all(said["scheduler"]["_class_name"] == SOLVERS[0] for said in settings)
    assert all(said["guidance_interval"] == "0.3:inf" for said in settings)


@pytest.mark.parametrize("class_name", SOLVERS)
@pytest.mark.parametrize("clipped", [None, -5.1])
def test_pytorch_reads_the_scheduler_that_it_saved(tmp_path, class_name, clipped):
    """What diffusers saves, infinity and all, goes through sdjax to the same scheduler."""
    cls = getattr(diffusers, class_name)
    theirs = cls(beta_start=0.001, solver_order=3, **({} if clipped is None else {"lambda_min_clipped": clipped}))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    assert ("-Infinity" in path.read_text()) == (clipped is None)
    ours = from_config(folder.read_json(path))
    folder.write_json(path, dict(ours.config))
    strict(path.read_text())
    again = cls.from_pretrained(tmp_path)
    assert all(again.config[name] == value for name, value in theirs.config.items() if not name.startswith("_"))
    assert again.config.lambda_min_clipped == (-np.inf if clipped is None else clipped)
    for scheduler in (theirs, again):
        scheduler.set_timesteps(10)
    assert again.timesteps.tolist() == theirs.timesteps.tolist() == from_config(ours.config).timesteps(10).tolist()


@pytest.mark.parametrize("name", ["ddim", "euler", "unipc", "dpmpp_2s"])
def test_another_sampler_drops_the_infinity_of_the_first(name):
    config = {**from_config("dpmpp_2m").config, "lambda_min_clipped": -np.inf, "_use_default_values": []}
    strict(json.dumps(dict(from_config(config, name).config)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lambda_min_clipped", np.inf),
        ("lambda_min_clipped", np.nan),
        ("beta_start", np.nan),
        ("sigma_max", np.inf),
        ("trained_betas", [0.1, np.nan]),
        ("sample_max_value", -np.inf),
    ],
)
def test_a_number_that_cannot_be_saved_is_refused_at_once(option, value):
    name = "euler" if option == "sigma_max" else "dpmpp_2m"
    with pytest.raises(ValueError, match=f"{option}=.* is not a finite number"):
        from_config({**from_config(name).config, "_use_default_values": [], option: value})


SETTINGS = {"prompt": "goose", "width": 8, "height": 8, "scheduler": {"_class_name": SOLVERS[0], "solver_order": 2}}


def test_pictures_of_older_versions_are_read_and_can_be_saved_again(tmp_path):
    old = {**SETTINGS, "scheduler": SETTINGS["scheduler"] | {"lambda_min_clipped": -np.inf}}
    text, path = PngImagePlugin.PngInfo(), tmp_path / "old.png"
    text.add_text("sdjax", json.dumps(old))
    image = Image.new("RGB", (8, 8))
    image.save(path, pnginfo=text)
    assert "-Infinity" in carried(path.read_bytes())
    assert read_settings(path) == SETTINGS
    assert from_config(read_settings(path)["scheduler"]).options.lambda_min_clipped == -np.inf
    assert strict(carried(encode(image, read_settings(path), "png"))) == SETTINGS


def test_a_file_that_cannot_be_json_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: cannot be written"):
        folder.write_json(tmp_path / "config.json", {"scaling_factor": np.nan})
    assert not list(tmp_path.iterdir())
