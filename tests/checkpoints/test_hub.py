"""Paths and Hub ids, without a network."""

import json
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sdjax.checkpoints import hub
from sdjax.checkpoints.errors import CheckpointError

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}
CONFIGS = [
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
]
CHECKER = ["safety_checker/config.json", "safety_checker/model.safetensors"]
WEIGHTS = [
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
OTHERS = [
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/flax_model.msgpack",
    "text_encoder/openvino_model.xml",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "unet/onnx/model.onnx",
    "unet/onnx/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
]


class Repository:
    """In place of the Hub's calls: a repository's files, which what is downloaded goes to a folder of."""

    def __init__(self, path: Path):
        self.path, self.files, self.error, self.calls, self.cached = path, {}, None, [], []

    def add(self, *names: str) -> None:
        self.files |= {name: json.dumps(INDEX) if name == "model_index.json" else "{}" for name in names}

    def _ask(self, call: str, repo_id: str, revision: str | None) -> None:
        self.calls.append((call, repo_id, revision))
        if self.error:
            raise self.error

    def _take(self, name: str) -> str:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.files[name])
        return str(path)

    def list_repo_files(self, repo_id, *, revision=None):
        self._ask("list", repo_id, revision)
        return list(self.files)

    def hf_hub_download(self, repo_id, name, *, revision=None):
        self._ask("file", repo_id, revision)
        if name not in self.files:
            raise RemoteEntryNotFoundError(f"no {name}", response=Mock(headers={}))
        return self._take(name)

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns, local_files_only=False):
        if local_files_only:
            if not self.path.is_dir():
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.path)
        self._ask("snapshot", repo_id, revision)
        for name in self.files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                self._take(name)
        return str(self.path)

    @property
    def taken(self) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file())


@pytest.fixture
def repository(monkeypatch, tmp_path) -> Repository:
    double = Repository(tmp_path / "snapshot")
    double.add("model_index.json", *CONFIGS, *CHECKER, *WEIGHTS, *OTHERS)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: double)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(double, name))
    return double


def test_a_folder_is_itself(tmp_path, repository):
    (tmp_path / "unet").mkdir()
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path), subfolder="unet") == tmp_path / "unet"
    assert repository.calls == []


def test_a_relative_folder_goes_before_a_hub_id(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "goose" / "model").mkdir(parents=True)
    assert hub.resolve("goose/model").samefile(tmp_path / "goose" / "model")
    assert repository.calls == []


def test_of_a_pipeline_comes_what_its_components_need(repository):
    assert hub.resolve("goose/model", revision="v2") == repository.path
    assert repository.taken == sorted(["model_index.json", *CONFIGS, *CHECKER, *WEIGHTS])
    assert {call[1:] for call in repository.calls} == {("goose/model", "v2")}


def test_components_that_are_not_wanted_stay_away(repository):
    hub.resolve("goose/model", ignored=("safety_checker", "vae", "preview_vae"))
    expected = [name for name in (*CONFIGS, *WEIGHTS) if not name.startswith("vae/")]
    assert repository.taken == sorted(["model_index.json", *expected])


def test_a_variant_where_there_is_one(repository):
    hub.resolve("goose/model", variant="fp16")
    assert [name for name in repository.taken if name.endswith(("safetensors", "bin"))] == [
        "safety_checker/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_subfolder_downloads_nothing_else(repository):
    assert hub.resolve("goose/model", subfolder="unet") == repository.path / "unet"
    assert repository.taken == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]


def test_a_repository_of_one_model(repository):
    repository.files.clear()
    repository.add("config.json", "diffusion_pytorch_model.bin", "README.md", "old/diffusion_pytorch_model.bin")
    hub.resolve("goose/vae")
    assert repository.taken == ["config.json", "diffusion_pytorch_model.bin"]


SHARDS = [
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]
FP16_SHARDS = [
    "model.safetensors.index.fp16.json",
    "model.fp16-00001-of-00002.safetensors",
    "model.fp16-00002-of-00002.safetensors",
]
OLD_SHARDS = [
    "model.safetensors.index.fp16.json",
    "model-00001-of-00002.fp16.safetensors",
    "model-00002-of-00002.fp16.safetensors",
]


@pytest.mark.parametrize(
    ("files", "variant", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], None, ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], None, ["pytorch_model.bin"]),
        (["flax_model.msgpack", "tf_model.h5"], None, ["flax_model.msgpack"]),
        (["model.safetensors", "pytorch_model.fp16.bin"], "fp16", ["pytorch_model.fp16.bin"]),
        (["model.safetensors", "pytorch_model.fp16.bin"], "bf16", ["model.safetensors"]),
        ([*SHARDS, *FP16_SHARDS, "pytorch_model.bin"], None, SHARDS),
        ([*SHARDS, *FP16_SHARDS, "pytorch_model.bin"], "fp16", FP16_SHARDS),
        ([*SHARDS, *OLD_SHARDS], "fp16", OLD_SHARDS),
        ([*SHARDS, *OLD_SHARDS], None, SHARDS),
        (["model.safetensors", *SHARDS], None, ["model.safetensors"]),
        (["model_fp16.safetensors", "some.bin"], None, []),
    ],
)
def test_one_set_of_weights_is_chosen(files, variant, chosen):
    assert sorted(hub.needed(["config.json", *files], ["."], variant)) == sorted(["config.json", *chosen])
    inside = [f"text_encoder/{name}" for name in files]
    assert sorted(hub.needed(inside, ["text_encoder", "unet"], variant)) == sorted(f"text_encoder/{n}" for n in chosen)


def test_weights_in_other_variants_only(repository):
    repository.files.pop("unet/diffusion_pytorch_model.safetensors")
    repository.files.pop("unet/diffusion_pytorch_model.bin")
    repository.files.pop("unet/diffusion_flax_model.msgpack")
    message = "goose/model: unet: its weights are there as variant='fp16' or variant='non_ema' only"
    with pytest.raises(CheckpointError, match=message):
        hub.resolve("goose/model")
    hub.resolve("goose/model", variant="non_ema")


def test_a_subfolder_that_is_not_there(tmp_path, repository):
    for place in (tmp_path, "goose/model"):
        with pytest.raises(FileNotFoundError, match=f"{place}: has no folder 'nest'"):
            hub.resolve(place, subfolder="nest")


@pytest.mark.parametrize("path", ["/no/such/folder", "./goose", "../goose", "a/b/c", "goose model", "goose/"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(path, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hub.resolve(path)
    assert repository.calls == []


def test_a_file_is_no_folder(tmp_path, repository, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for path in ("model.safetensors", tmp_path / "model.safetensors"):
        with pytest.raises(NotADirectoryError, match=r"model.safetensors: a file, where a checkpoint folder is needed"):
            hub.resolve(path)
    assert repository.calls == []


NOT_THERE = [
    RepositoryNotFoundError("404 Client Error.\nMore", response=Mock(headers={})),
    RevisionNotFoundError("404 Client Error.\nMore", response=Mock(headers={})),
]
NO_CONNECTION = [ConnectionError("404 Client Error.\nMore"), LocalEntryNotFoundError("404 Client Error.\nMore")]


@pytest.mark.parametrize("error", [*NOT_THERE, *NO_CONNECTION], ids=lambda error: type(error).__name__)
def test_what_the_hub_says_is_passed_on(repository, error):
    repository.error = error
    with pytest.raises(FileNotFoundError, match=r"^goose/model: .* the Hub did not give it: 404 Client Error\.$"):
        hub.resolve("goose/model")


def test_without_a_connection_the_cache_is_taken(repository):
    hub.resolve("goose/model")
    repository.error = ConnectionError()
    assert hub.resolve("goose/model", subfolder="unet") == repository.path / "unet"


def test_a_repository_that_is_gone_is_not_taken_from_the_cache(repository):
    hub.resolve("goose/model")
    repository.error = NOT_THERE[0]
    with pytest.raises(FileNotFoundError):
        hub.resolve("goose/model")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The real cache of huggingface_hub, with a repository; conftest sets HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--goose--model"
    snapshot = repository / "snapshots" / ("1" * 40)
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "unet" / "config.json").write_text("{}")
    for name in ("main", "flax"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text("1" * 40)
    return snapshot


def test_offline_with_a_cache(cache):
    assert hub.resolve("goose/model") == cache
    assert hub.resolve("goose/model", subfolder="unet", revision="flax") == cache / "unet"
    assert hub.resolve_file("goose/model", ["lora.bin", "model_index.json"]) == cache / "model_index.json"
    assert hub.resolve_file("goose/model/unet/config.json", []) == cache / "unet" / "config.json"


@pytest.mark.parametrize("repo_id", ["goose/other", "other"])
def test_offline_without_a_cache(cache, repo_id):
    with pytest.raises(FileNotFoundError, match=f"{repo_id}: no such folder, and the Hub did not give it: "):
        hub.resolve(repo_id)
    with pytest.raises(
        FileNotFoundError, match=rf"{repo_id}: no such file, nor a repository with a\.bin or b\.bin, and"
    ):
        hub.resolve_file(repo_id, ["a.bin", "b.bin"])


def test_offline_without_that_revision(cache):
    with pytest.raises(FileNotFoundError):
        hub.resolve("goose/model", revision="bf16")


NAMES = ["lora.safetensors", "lora.bin"]


def test_a_file_is_itself(tmp_path, repository):
    (tmp_path / "any.ckpt").touch()
    assert hub.resolve_file(tmp_path / "any.ckpt", NAMES) == tmp_path / "any.ckpt"
    assert hub.resolve_file(str(tmp_path / "any.ckpt"), ()) == tmp_path / "any.ckpt"
    assert repository.calls == []


def test_a_folder_gives_the_first_of_the_names(tmp_path, repository):
    (tmp_path / "lora.bin").touch()
    assert hub.resolve_file(tmp_path, NAMES) == tmp_path / "lora.bin"
    (tmp_path / "lora.safetensors").touch()
    assert hub.resolve_file(tmp_path, NAMES) == tmp_path / "lora.safetensors"
    for names, told in ((["a.bin"], r"without a\.bin"), ((), "without a name of a file in it")):
        with pytest.raises(FileNotFoundError, match=told):
            hub.resolve_file(tmp_path, names)
    assert repository.calls == []


def test_a_repository_gives_the_first_of_the_names(repository):
    repository.add("lora.bin")
    assert hub.resolve_file("goose/model", NAMES, revision="v2") == repository.path / "lora.bin"
    assert set(repository.calls) == {("file", "goose/model", "v2")}
    assert repository.taken == ["lora.bin"]


@pytest.mark.parametrize(
    ("given", "revision"),
    [
        ("goose/model/sub/some%20file.ckpt", "v2"),
        ("https://huggingface.co/goose/model/blob/v1/sub/some%2520file.ckpt", "v1"),
        ("https://huggingface.co/goose/model/resolve/refs%2Fpr%2F7/sub/some%2520file.ckpt?download=true", "refs/pr/7"),
        ("https://hf.co/goose/model/resolve/main/sub/some%2520file.ckpt", "main"),
    ],
)
def test_a_file_on_the_hub(repository, given, revision):
    repository.add("sub/some%20file.ckpt")
    assert hub.resolve_file(given, (), revision="v2") == repository.path / "sub" / "some%20file.ckpt"
    assert repository.calls == [("file", "goose/model", revision)]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/no/such/file.ckpt", "no such file$"),
        ("./file.ckpt", "no such file$"),
        ("file.ckpt", "no such file$"),
        ("https://civitai.com/api/download/models/1", "no address of a file on huggingface.co; download it"),
        ("https://huggingface.co/goose/model", "no address of a file on huggingface.co"),
    ],
)
def test_what_is_no_file_on_the_hub_is_not_asked_for(repository, given, told):
    with pytest.raises(FileNotFoundError, match=told):
        hub.resolve_file(given, ())
    assert repository.calls == []


def test_a_file_that_the_hub_does_not_have(repository):
    with pytest.raises(
        FileNotFoundError, match=r"^goose/model/a\.ckpt: no such file, and the Hub did not give it: no a"
    ):
        hub.resolve_file("goose/model/a.ckpt", ())
    with pytest.raises(FileNotFoundError, match=r"nor a repository with lora\.safetensors or lora\.bin"):
        hub.resolve_file("goose/model", NAMES)


def test_an_empty_text_is_no_path():
    """Not the folder of the process."""
    for find in (hub.resolve, lambda text: hub.resolve_file(text, ("a.safetensors",))):
        with pytest.raises(FileNotFoundError, match="an empty text, where a path or a Hub id is needed"):
            find("")
