"""The commands, from a package to a folder that draws, with tiny models and synthetic drawings."""

import argparse
import contextlib
import io
import sys
import tarfile

import jax
import jax.numpy as jnp
import model
import numpy as np
import pytest
import recipe
import text_to_latents
import train
from autoencoder import trained_vae
from flax import nnx
from latents import Latents
from PIL import Image
from safetensors.numpy import load_file

import sdjax

TINY = {
    "VAE": {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 8,
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
    "SIZE": 8,
    "SOURCE_SIZE": 12,
    "ROUNDS": 14,
    "VOCABULARY": 600,
}
STEPS = [f"--{stage}-steps=2" for stage in ("vae", "decoder", "text", "unet", "measure")]
STEPS += [f"--{model}-batch=8" for model in ("vae", "text", "unet")]


def filled(make):
    """In the place of `initialised`, which takes XLA seconds to compile."""
    graphdef, params = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda p: jnp.asarray(0.1 * rng.standard_normal(p.shape), p.dtype), params)
    return nnx.merge(graphdef, values)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in TINY.items():
            monkeypatch.setattr(recipe, name, value)
        for stage in ("autoencoder", "text_to_latents"):
            monkeypatch.setattr(f"{stage}.initialised", filled)
        jax.config.update("jax_disable_most_optimizations", True)  # programs run twice are not worth compiling well
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def run(*arguments):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A folder with `work` and `out`, of the two commands that docs/embedded-model.md names."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "names.txt").write_text("red heart: heart\n")
    with tarfile.open(folder / "package.tgz", "w:gz") as tar:
        for code, color in (("1fabf", (90, 60, 40, 255)), ("2764-fe0f", (255, 0, 0, 255))):
            file = io.BytesIO()
            Image.new("RGBA", (12, 12), color).save(file, "WEBP", lossless=True)
            info = tarfile.TarInfo(f"package/assets/{code}.webp")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "NAMES", folder / "names.txt")
        run("prepare", "--package", folder / "package.tgz", "--work", folder / "work")
    (folder / "package.tgz").unlink()  # drawings.npz is all that the rest needs
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run("all", "--out", folder / "out", *STEPS, "--work", folder / "work")
    assert f"{folder / 'out'}: 0.1 MB" in printed.getvalue()
    return folder


def options(work):
    return argparse.Namespace(work=work, dtype="bfloat16")


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(actual), nnx.state(expected))


def test_two_commands_make_a_finished_folder(made):
    work, out = made / "work", made / "out"
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(out)
    pool = Latents.load(work / "latents")
    assert pool.latents.shape == pool.upright.shape == (14 * (2 + 8), 8, 8, 4)
    assert pool.input_ids.shape == (140, 6, 16)
    assert pipe.vae.config.scaling_factor == pytest.approx(1 / pool.latents.std(dtype=np.float64))
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert pipe.tokenizer.model_max_length == 16

    weights = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float16)}
    vae = trained_vae(options(work))
    encoder, decoder = vae.encoder.conv_in.bias[...], vae.decoder.conv_out.bias[...]
    np.testing.assert_allclose(weights["encoder.conv_in.bias"], encoder, rtol=1e-3, atol=1e-6)
    assert np.abs(weights["decoder.conv_out.bias"] - decoder).max() > 1e-5  # the stage `decoder` went on with it alone

    measured = np.genfromtxt(work / "unet.measured.csv", delimiter=",", names=True)
    assert measured["step"] == 2 and 0 <= measured["top1"] <= measured["top5"] == 1
    with Image.open(work / "curves.png") as curves:
        assert curves.width > 400


def test_upright_latents_are_of_the_same_drawings_and_backgrounds(made):
    """A round of 13 later shows the same drawings alone on the same backgrounds, and other pairs."""
    first, again = (Latents(**np.load(made / f"work/latents/{n:02}.npz")) for n in (0, 13))
    np.testing.assert_array_equal(first.input_ids[:2], again.input_ids[:2])
    np.testing.assert_array_equal(first.upright[:2], again.upright[:2])
    assert not np.array_equal(first.latents[:2], again.latents[:2])
    assert not np.array_equal(first.upright[2:], again.upright[2:])


def test_training_goes_on_from_a_finished_model(made, tmp_path):
    run("begin", "--model", made / "out", "--work", tmp_path)
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(made / "out", dtype="float32")
    begun = text_to_latents.beginning(options(tmp_path))
    assert_same(begun.text_encoder, pipe.text_encoder)
    assert_same(begun.unet, pipe.unet)
    assert_same(trained_vae(options(tmp_path)), pipe.vae)
    assert not begun.sketch.to_square.kernel[...].any()
    vocabulary = "tokenizer/vocab.json"
    assert (tmp_path / vocabulary).read_bytes() == (made / "out" / vocabulary).read_bytes()


def test_the_unet_begins_with_the_text_encoder_that_learned_to_sketch(made):
    args = options(made / "work")
    begun, new = text_to_latents.beginning(args), filled(lambda: model.untrained(args))
    with np.load(made / "work" / "text.npz") as saved:
        table = saved["state.ema.text_encoder.text_model.embeddings.token_embedding.embedding.value"]
    np.testing.assert_array_equal(begun.text_encoder.text_model.embeddings.token_embedding.embedding[...], table)
    assert not np.array_equal(new.text_encoder.text_model.embeddings.token_embedding.embedding[...], table)
    assert_same(begun.unet, new.unet)
