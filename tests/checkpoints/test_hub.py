"""Paths and Hub ids, without a network."""

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from sdjax.checkpoints import hub


class Snapshot:
    """In place of snapshot_download: gives the path, or raises the error; calls are its arguments."""

    def __init__(self, path: Path):
        self.path, self.error, self.calls = path, None, []

    def __call__(self, *args, **kw):
        self.calls.append((args, kw))
        if self.error:
            raise self.error
        return str(self.path)


@pytest.fixture
def snapshot(monkeypatch, tmp_path):
    double = Snapshot(tmp_path / "snapshot")
    (double.path / "unet").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", double)
    return double


def test_a_folder_is_itself(tmp_path, snapshot):
    (tmp_path / "unet").mkdir()
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path), subfolder="unet") == tmp_path / "unet"
    assert snapshot.calls == []


def test_a_relative_folder_goes_before_a_hub_id(tmp_path, monkeypatch, snapshot):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "goose" / "model").mkdir(parents=True)
    assert hub.resolve("goose/model").samefile(tmp_path / "goose" / "model")
    assert snapshot.calls == []


def test_a_hub_id_downloads_the_files_of_its_models_only(snapshot):
    assert hub.resolve("goose/model", revision="v2") == snapshot.path
    [(args, kw)] = snapshot.calls
    assert args == ("goose/model",)
    assert kw["revision"] == "v2"

    files = [
        "model_index.json",
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "README.md",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
    ]
    assert list(filter_repo_objects(files, **{k: v for k, v in kw.items() if "patterns" in k})) == [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
    ]


def test_a_subfolder_downloads_nothing_else(snapshot):
    assert hub.resolve("goose/model", subfolder="unet") == snapshot.path / "unet"
    [(_, kw)] = snapshot.calls
    assert all(pattern.startswith("unet/") for pattern in kw["allow_patterns"])


def test_a_subfolder_that_is_not_there(tmp_path, snapshot):
    for place in (tmp_path, "goose/model"):
        with pytest.raises(FileNotFoundError, match=f"{place}: has no folder 'nest'"):
            hub.resolve(place, subfolder="nest")


@pytest.mark.parametrize("path", ["/no/such/folder", "./goose", "../goose", "a/b/c", "goose model", "goose/"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(path, snapshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hub.resolve(path)
    assert snapshot.calls == []


def test_a_file_is_no_folder(tmp_path, snapshot, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for path in ("model.safetensors", tmp_path / "model.safetensors"):
        with pytest.raises(NotADirectoryError, match=r"model.safetensors: a file, where a checkpoint folder is needed"):
            hub.resolve(path)
    assert snapshot.calls == []


@pytest.mark.parametrize(
    "error",
    [
        RepositoryNotFoundError("404 Client Error.\nMore", response=Mock(headers={})),
        LocalEntryNotFoundError("404 Client Error.\nMore"),
    ],
    ids=["not found", "no network"],
)
def test_what_the_hub_says_is_passed_on(snapshot, error):
    snapshot.error = error
    with pytest.raises(FileNotFoundError, match=r"^goose/model: .* the Hub did not give it: 404 Client Error\.$"):
        hub.resolve("goose/model")


def test_offline_without_a_cache(tmp_path, monkeypatch):
    """conftest sets HF_HUB_OFFLINE=1: the real snapshot_download looks into its cache only."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="goose/model: no such folder, and the Hub did not give it: "):
        hub.resolve("goose/model")
