"""scripts/train_emoji.py, from a package to a folder that draws, with tiny models and synthetic drawings."""

import contextlib
import importlib.util
import io
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

import sdjax

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_emoji.py"
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TINY = {
    "VAE": {
        "block_out_channels": (8, 8),
        **LEVELS,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "mid_block_add_attention": False,
    },
    "UNET": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    },
    "TEXT": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
    "SIZE": 16,
    "SOURCE_SIZE": 24,
    "ROUNDS": 2,
    "VOCABULARY": 600,
}
STEPS = [f"--{stage}-steps=2" for stage in ("vae", "decoder", "text", "unet", "measure")]
STEPS += [f"--{model}-batch=8" for model in ("vae", "text", "unet")]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(SCRIPT.parent)
        spec = importlib.util.spec_from_file_location("train_emoji", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, value in TINY.items():
            monkeypatch.setattr(module.recipe, name, value)
        yield module


@pytest.fixture(scope="module")
def run(script):
    def command(*arguments):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("sys.argv", ["train_emoji.py", *map(str, arguments)])
            script.main()

    return command


@pytest.fixture(scope="module")
def trained(script, run, tmp_path_factory):
    """A folder with `work` and `out`, of the two commands that the README of the model names."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "names.txt").write_text("red heart: heart\n")
    script.NAMES = folder / "names.txt"
    with tarfile.open(folder / "package.tgz", "w:gz") as tar:
        for code, color in (("1fabf", (90, 60, 40, 255)), ("2764-fe0f", (255, 0, 0, 255))):
            file = io.BytesIO()
            Image.new("RGBA", (24, 24), color).save(file, "WEBP", lossless=True)
            info = tarfile.TarInfo(f"package/assets/{code}.webp")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    run("prepare", "--package", folder / "package.tgz", "--work", folder / "work")
    (folder / "package.tgz").unlink()  # drawings.npz is all that the rest needs
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run("all", "--out", folder / "out", *STEPS, "--work", folder / "work")
    assert f"{folder / 'out'}: 0.1 MB" in printed.getvalue()
    return folder


def test_two_commands_make_a_finished_folder(script, trained):
    work, out = trained / "work", trained / "out"
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(out)
    pool = script.Latents.load(work / "latents")
    assert pool.latents.shape == pool.upright.shape == (2 * (2 + 8), 8, 8, 4)
    assert pool.input_ids.shape == (20, 6, 16)
    assert pipe.vae.config.scaling_factor == pytest.approx(1 / pool.latents.std(dtype=np.float64))
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert pipe.tokenizer.model_max_length == 16

    weights = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float16)}
    vae = script.trained_vae(script.argparse.Namespace(work=work, dtype="bfloat16"))
    encoder, decoder = vae.encoder.conv_in.bias[...], vae.decoder.conv_out.bias[...]
    np.testing.assert_allclose(weights["encoder.conv_in.bias"], encoder, rtol=1e-3, atol=1e-6)
    assert np.abs(weights["decoder.conv_out.bias"] - decoder).max() > 1e-5  # the stage `decoder` went on with it alone

    measured = np.genfromtxt(work / "unet.measured.csv", delimiter=",", names=True)
    assert measured["step"] == 2 and 0 <= measured["top1"] <= measured["top5"] == 1
    with Image.open(work / "curves.png") as curves:
        assert curves.width > 400


def test_training_goes_on_from_a_finished_model(run, trained, tmp_path):
    out, work, again = trained / "out", tmp_path / "work", tmp_path / "again"
    run("begin", "--model", out, "--work", work)
    shutil.copy(trained / "work" / "drawings.npz", work)
    run("latents", "--work", work)
    run("unet", "--unet-steps", "1", "--unet-rate", "0", "--unet-batch", "8", "--work", work)
    run("export", "--out", again, "--work", work)
    for file in out.rglob("*.safetensors"):
        before, after = load_file(file), load_file(again / file.relative_to(out))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before), file
    vocabulary = "tokenizer/vocab.json"
    assert (again / vocabulary).read_bytes() == (out / vocabulary).read_bytes()


def test_the_unet_begins_with_the_text_encoder_that_learned_to_sketch(script, run, trained, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained / "work", work, ignore=shutil.ignore_patterns("unet*"))
    run("unet", "--unet-steps", "1", "--unet-rate", "0", "--unet-batch", "8", "--work", work)
    run("export", "--out", tmp_path / "out", "--work", work)
    model = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "out").text_encoder
    untrained = script.untrained(script.argparse.Namespace(work=work, dtype="bfloat16"))
    taught = script.trained(untrained, work / "text.npz", script.TEXT)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(script.half(taught.text_encoder)))
    table = taught.text_encoder.text_model.embeddings.token_embedding.embedding
    assert not np.array_equal(table, untrained.text_encoder.text_model.embeddings.token_embedding.embedding)
