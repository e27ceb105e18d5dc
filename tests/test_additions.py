"""What people add to a checkpoint, through the pipeline: LoRAs and learned words."""

import json
import shutil
from pathlib import Path

import diffusers
import jax
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from lora_files import EVERYTHING, factors, kohya, load_theirs, save
from safetensors.torch import save_file

import sdjax
from sdjax.checkpoints import hub
from sdjax.runtime import parallel
from sdjax.sampling.noise import seed_keys

SIZE = {"height": 32, "width": 48}
CALL = {**SIZE, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
TOLERANCE = 1e-4
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]


def load(folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(folder, mesh=parallel.data_mesh(jax.devices()[:1]))


def load_pytorch(folder, **kw):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **kw)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def ours(sd1_folder):
    return load(sd1_folder)


@pytest.fixture
def theirs(sd1_folder):
    return load_pytorch(sd1_folder, safety_checker=None)


@pytest.fixture(scope="module")
def latents():
    return oracle.normal(1, 8, 12, 4)


@pytest.fixture
def lora_files(theirs, tmp_path):
    """Two LoRAs of kohya's spelling: of everything in the UNet and the text encoder, and of the UNet's attention."""
    models = {"unet": theirs.unet, "text_encoder": theirs.text_encoder}
    files = {"style.safetensors": factors(models, 4, 1, EVERYTHING), "detail.safetensors": factors(models, 2, 2)}
    for name, components in files.items():
        save(tmp_path / name, kohya(components))
    return [tmp_path / name for name in files]


def assert_same(pictures, expected):
    oracle.assert_close(pictures, expected, TOLERANCE)
    assert np.std(expected) > 0.05


def test_loras_give_pytorchs_pictures_and_leave_no_trace(ours, theirs, latents, lora_files):
    before = ours("a blue goose", latents=latents, **CALL).images
    for path, name in zip(lora_files, ("style", "detail"), strict=True):
        load_theirs(theirs, path, name)
    assert ours.load_lora(lora_files[0], 0.7) == "style"
    theirs.set_adapters(["style"], [0.7])
    expected = theirs("a blue goose", latents=oracle.nchw(latents), **CALL).images
    assert_same(ours("a blue goose", latents=latents, **CALL).images, expected)
    assert np.abs(expected - before).max() > 1e-2

    ours.load_lora(lora_files[1], -0.4, name="detail")
    theirs.set_adapters(["style", "detail"], [0.7, -0.4])
    expected = theirs("a blue goose", latents=oracle.nchw(latents), **CALL).images
    with compilations() as compiled:
        both = ours("a blue goose", latents=latents, **CALL).images
        ours.set_loras({"detail": 1.5})
        ours("a blue goose", latents=latents, **CALL)
        ours.set_loras({"style": 0.7, "detail": -0.4})
        again = ours("a blue goose", latents=latents, **CALL).images
        ours.unload_loras()
        after = ours("a blue goose", latents=latents, **CALL).images
    assert compiled == []
    assert_same(both, expected)
    assert np.array_equal(again, both)
    assert np.array_equal(after, before)


def test_a_lora_that_does_not_fit_changes_nothing(ours, latents, lora_files, tmp_path):
    before = ours("a blue goose", latents=latents, **CALL).images
    ours.load_lora(lora_files[0], 0.0)
    save(tmp_path / "other.safetensors", {"lora_unet_nothing.lora_down.weight": torch.zeros(2, 2)})
    with pytest.raises(sdjax.CheckpointError, match=r"other\.safetensors"):
        ours.load_lora(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'style' is loaded already"):
        ours.load_lora(lora_files[0])
    with pytest.raises(ValueError, match="no LoRA 'stile' is loaded; loaded: style"):
        ours.set_loras({"stile": 1.0})
    with pytest.raises(ValueError, match="finite"):
        ours.load_lora(lora_files[1], float("nan"))
    assert np.array_equal(ours("a blue goose", latents=latents, **CALL).images, before)
    ours.load_lora(lora_files[1])


def test_a_repository_of_peft_comes_with_its_config(ours, tmp_path, monkeypatch):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    for folder in (remote, cache):
        folder.mkdir()
    name = "base_model.model.conv_in"
    down, up = torch.zeros(2, 4, 3, 3), torch.zeros(16, 2, 1, 1)
    save(remote / "adapter_model.safetensors", {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    (remote / "adapter_config.json").write_text('{"lora_alpha": 4}')

    def download(repository, names, **_):
        [found] = [name for name in names if (remote / name).is_file()]
        return Path(shutil.copy(remote / found, cache))

    monkeypatch.setattr(hub, "resolve_file", download)
    assert ours.load_lora("owner/style-v1.5") == "style-v1.5"


def test_a_model_replaced_under_a_lora_is_named(ours, sd1_folder, lora_files):
    ours.load_lora(lora_files[0])
    ours.unet = sdjax.UNet2DConditionModel.from_pretrained(sd1_folder, "unet")
    with pytest.raises(ValueError, match="unet: replaced after LoRAs were loaded"):
        ours.set_loras({"style": 0.5})
    ours.unload_loras()
    ours.load_lora(lora_files[0])


def test_saved_with_a_lora_it_is_merged(ours, theirs, latents, lora_files, tmp_path):
    ours.load_lora(lora_files[0], 0.7)
    ours.save_pretrained(tmp_path / "merged")
    merged = load_pytorch(tmp_path / "merged", safety_checker=None)
    expected = merged("a blue goose", latents=oracle.nchw(latents), **CALL).images
    assert_same(ours("a blue goose", latents=latents, **CALL).images, expected)


@pytest.mark.parametrize("vectors", [1, 3])
def test_learned_words_in_prompt_and_negative_prompt(ours, theirs, latents, tmp_path, vectors):
    embedding = torch.randn(vectors, 24, generator=torch.Generator().manual_seed(vectors)) * 0.5
    save_file({"<zebra>": embedding if vectors > 1 else embedding[0]}, tmp_path / "zebra.safetensors")
    blur = torch.randn(2, 24, generator=torch.Generator().manual_seed(9)) * 0.5
    torch.save({"string_to_param": {"*": blur}, "name": "blurry"}, tmp_path / "blurry.pt")
    for path, word in ((tmp_path / "zebra.safetensors", "<zebra>"), (tmp_path / "blurry.pt", "blurry")):
        assert ours.load_textual_inversion(path) == word
        theirs.load_textual_inversion(str(path.parent), weight_name=path.name, token=word)
    call = {"prompt": "a blue <zebra> goose", "negative_prompt": "blurry goose", **CALL}
    expected = theirs(**call, latents=oracle.nchw(latents)).images
    pictures = ours(**call, latents=latents).images
    assert_same(pictures, expected)
    assert np.abs(ours(**call | {"negative_prompt": "goose"}, latents=latents).images - pictures).max() > 1e-3
    with compilations() as compiled:
        ours(**call | {"prompt": "<zebra> blurry"}, latents=latents)
    assert compiled == []


def test_a_learned_word_for_sdxls_pair(tmp_path):
    folder = oracle.save_pipeline(tmp_path / "xl", oracle.XL_ONE_LEVEL)
    generator = torch.Generator().manual_seed(1)
    pair = {"clip_l": torch.randn(2, 24, generator=generator), "clip_g": torch.randn(2, 32, generator=generator)}
    save_file(pair, tmp_path / "style.safetensors")
    ours, pytorch = load(folder), load_pytorch(folder)
    assert ours.load_textual_inversion(tmp_path / "style.safetensors", token="<style>") == "<style>"
    encoders = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
    for name, (encoder, tokenizer) in encoders.items():
        pytorch.load_textual_inversion(
            pair[name], "<style>", text_encoder=getattr(pytorch, encoder), tokenizer=getattr(pytorch, tokenizer)
        )
    latents = oracle.normal(1, 8, 12, 4)
    call = {**CALL, "height": 16, "width": 24, "negative_prompt": "blue"}
    expected = pytorch("goose <style>", latents=oracle.nchw(latents), **call).images
    assert_same(ours("goose <style>", latents=latents, **call).images, expected)


def test_words_of_another_width_are_refused(ours, tmp_path):
    save_file({"<zebra>": torch.zeros(2, 32)}, tmp_path / "zebra.safetensors")
    with pytest.raises(sdjax.CheckpointError, match=r"zebra.safetensors: .* 32 .* 24 \(text_encoder\)"):
        ours.load_textual_inversion(tmp_path / "zebra.safetensors")
    with pytest.raises(ValueError, match="goose"):
        save_file({"goose": torch.zeros(2, 24)}, tmp_path / "goose.safetensors")
        ours.load_textual_inversion(tmp_path / "goose.safetensors")


def taught(pytorch, words):
    """Teaches each of a PyTorch pipeline's text encoders these words, as a training of textual inversion does."""
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if (model := getattr(pytorch, encoder, None)) is not None:
            getattr(pytorch, tokenizer).add_tokens(words)
            model.resize_token_embeddings(len(getattr(pytorch, tokenizer)))
            table = model.get_input_embeddings().weight.data
            generator = torch.Generator().manual_seed(5)
            table[-len(words) :] = torch.randn(len(words), table.shape[1], generator=generator) / 4
    return pytorch


WORDS = ["<cat>", "<cat>_1", "<cat>_2", "zebra"]


def with_legacy_eos(folder):
    """The configs of published models, from before transformers 4.31, have another end token than the tokenizer."""
    for path in folder.glob("text_encoder*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    return folder


@pytest.mark.parametrize("family", [oracle.ONE_LEVEL, oracle.XL_ONE_LEVEL], ids=["sd1", "sdxl"])
def test_a_saved_pipeline_with_learned_words(tmp_path, family):
    """Read, taught another word, saved, and read by PyTorch again. The pooled text is that of the real end token."""
    pytorch = taught(oracle.pipeline(tmp_path, family), WORDS)
    pytorch.save_pretrained(tmp_path / "model")
    ours, latents = load(with_legacy_eos(tmp_path / "model")), oracle.normal(1, 8, 8, 4)
    size = 8 * pytorch.vae_scale_factor
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np", "height": size, "width": size}
    call |= {"prompt": "a blue <cat> goose", "negative_prompt": "zebra <cat>_1"}
    pictures = ours(**call, latents=latents).images
    assert_same(pictures, pytorch(**call, latents=oracle.nchw(latents)).images)
    assert np.abs(ours(**call | {"prompt": "a blue goose"}, latents=latents).images - pictures).max() > 1e-3

    call["prompt"] = "a <cat> dog"
    pair = {"clip_l": torch.randn(2, 24) / 4, "clip_g": torch.randn(2, 32) / 4}
    save_file(pair if family is oracle.XL_ONE_LEVEL else {"*": pair["clip_l"]}, tmp_path / "dog.safetensors")
    assert ours.load_textual_inversion(tmp_path / "dog.safetensors") == "dog"
    ours.save_pretrained(tmp_path / "saved")
    pytorch = load_pytorch(tmp_path / "saved")
    if family is oracle.XL_ONE_LEVEL:
        pytorch.text_encoder_2.text_model.eos_token_id = oracle.TEXT["eos_token_id"]
    pictures = ours(**call, latents=latents).images
    assert_same(pictures, pytorch(**call, latents=oracle.nchw(latents)).images)
    again = load(tmp_path / "saved")
    assert {len(tokenizer) for tokenizer in again.tokenizers.values()} == {oracle.TEXT["vocab_size"] + 6}
    oracle.assert_close(again(**call, latents=latents).images, pictures)


def test_words_and_embeddings_that_do_not_belong_together(sd1_folder, tmp_path):
    pytorch = taught(load_pytorch(sd1_folder, safety_checker=None), ["<cat>"])
    pytorch.save_pretrained(tmp_path / "model")
    size = oracle.TEXT["vocab_size"]
    with pytest.raises(sdjax.CheckpointError, match=rf"has embeddings of {size} tokens, .* {size + 1} .*<cat>"):
        load(tmp_path / "model").from_pretrained(tmp_path / "model", text_encoder=sd1_folder)
    with pytest.raises(sdjax.CheckpointError, match=rf"has embeddings of {size + 1} tokens, .* {size} .*none"):
        load(sd1_folder).from_pretrained(sd1_folder, text_encoder=tmp_path / "model")


def test_a_word_that_one_of_sdxls_tokenizers_has_changes_neither(tmp_path):
    folder = oracle.save_pipeline(tmp_path / "xl", oracle.XL_ONE_LEVEL)
    ours = load(folder)
    ours.tokenizer_2.add_token("cat", 1)
    ours.text_encoder_2 = ours.text_encoder_2.with_embeddings(np.zeros((1, 32)))
    save_file({"clip_l": torch.zeros(1, 24), "clip_g": torch.zeros(1, 32)}, tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match="'cat' is a token of the tokenizer already"):
        ours.load_textual_inversion(tmp_path / "cat.safetensors")
    assert len(ours.tokenizer) == oracle.TEXT["vocab_size"]


def test_the_pure_function_reads_learned_words(ours, tmp_path):
    save_file({"<cat>": torch.randn(3, 24) / 4}, tmp_path / "cat.safetensors")
    ours.load_textual_inversion(tmp_path / "cat.safetensors")
    ours.scheduler = "ddim"
    tokens = ours.tokenizer(["goose", "a <cat>"])[None]
    keys, scale = seed_keys([7]), np.full(1, 3.0, np.float32)
    sample = jax.jit(ours.text_to_latents(32, 32))
    latents = sample(ours.params, tokens, keys, ours.scheduler.table(2), scale)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 7}
    expected = ours("a <cat>", "goose", **call, output_type="latent").images
    oracle.assert_close(latents, expected, 1e-4)
