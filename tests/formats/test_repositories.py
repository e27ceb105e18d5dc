"""Repositories of the Hub, without a network."""

import os
import shutil
from pathlib import Path

import huggingface_hub
import ml_dtypes
import oracle
import original_layout as layout
import pytest
from references import UNET_FILE, VAE_FILE, assert_pictures, load, load_file_of, with_component
from saved_formats import save_flax

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers


def cache(root: Path, repository: str, folder: Path, commit: str, branch: str) -> None:
    """What the Hub's client leaves behind of a download: snapshots of links to blobs."""
    top = root / f"models--{repository.replace('/', '--')}"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        link = top / "snapshots" / commit / path.relative_to(folder)
        blob = top / "blobs" / f"{abs(hash(str(link))):x}"
        for directory in (link.parent, blob.parent):
            directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (top / "refs").mkdir(exist_ok=True)
    (top / "refs" / branch).write_text(commit)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path) -> Path:
    """conftest.py says HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_offline_from_the_cache_of_the_hub(references, folders, singles, hub_cache, tmp_path):
    reference, (single, _, tensors) = references("sd1"), singles("sd1")
    save_flax(reference.pipe, tmp_path / "flax", ml_dtypes.bfloat16)
    other = oracle.vae(oracle.SD1.vae, 12)
    other.save_pretrained(tmp_path / "vae")
    cache(hub_cache, "goose/model", folders("sd1"), "1" * 40, "main")
    cache(hub_cache, "goose/model", tmp_path / "flax", "2" * 40, "bf16")
    cache(hub_cache, "goose/vae", tmp_path / "vae", "3" * 40, "main")
    cache(hub_cache, "goose/file", layout.written(tmp_path / "file", tensors).parent, "4" * 40, "main")
    assert_pictures(load("goose/model"), reference)
    for revision in ("bf16", "2" * 40):
        assert_pictures(load("goose/model", revision=revision), reference)
    assert_pictures(load("goose/model", vae="goose/vae"), with_component(reference, vae=other))
    for file in ("goose/file/model.safetensors", "https://huggingface.co/goose/file/blob/main/model.safetensors"):
        assert_pictures(load_file_of(file), single)
    assert_pictures(load("goose/file/model.safetensors"), single)
    for absent in ({"path_or_hub_id": "goose/nothing"}, {"path_or_hub_id": "goose/model", "revision": "v9"}):
        with pytest.raises(FileNotFoundError, match=absent["path_or_hub_id"]):
            load(absent["path_or_hub_id"], revision=absent.get("revision"))


def test_a_hub_repository_tells_the_scaling_factor_of_a_vae_that_is_not_fetched(folders, monkeypatch, tmp_path):
    """A Hub of one repository, of which a download takes the files that it is asked for."""
    source, here = folders("sdxl"), tmp_path / "here"
    files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]

    def fetch(name: str) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, here / name)

    def snapshot_download(repo_id, *, revision, allow_patterns):
        for name in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            fetch(name)
        return str(here)

    def hf_hub_download(repo_id, name, *, revision):
        fetch(name)
        return str(here / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **kw: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    module = oracle.randomised(layout.model("vae", layout.TINY["sd1"]["vae"]), 30)
    pipe = load("goose/xl", vae=layout.written(tmp_path / "vae", layout.state(module)))
    assert pipe.vae.config.scaling_factor == 0.13025
    assert (here / UNET_FILE).is_file()
    assert not (here / VAE_FILE).exists()
