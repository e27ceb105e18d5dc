"""Textual inversion, ControlNet and whole networks as they are trained, against PyTorch diffusers."""

from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import oracle
import pytest
import torch
import torch_training
from comparing import check_steps, our_picture, their_picture
from safetensors.torch import load_file

import sdjax
from sdjax.training import controlnet, whole, words
from sdjax.training.objective import Objective
from sdjax.training.trained import WORDS

TOKEN, VECTORS = "<dog>", 2
VELOCITY = {"prediction_type": "v_prediction", "scheduler": diffusers.DDIMScheduler}


def pipelines(folder, family):
    """PyTorch's, and ours of what it saves."""
    reference = oracle.pipeline(folder, family)
    reference.save_pretrained(folder / "model")
    return reference, sdjax.StableDiffusionPipeline.from_pretrained(folder / "model")


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' Euler
@pytest.mark.parametrize("family", ["ATTENDING", "XL_ONE_LEVEL"])
def test_textual_inversion(family, tmp_path):
    reference, pipe = pipelines(tmp_path, getattr(oracle, family))
    trained = words.begin(pipe, TOKEN, "blue goose", vectors=VECTORS)
    size = len(oracle.vocabulary())
    batch = torch_training.batch(reference, (5, size, size + 1, 9))
    parameters, kept = {}, {}
    for name, rows in trained.initial[WORDS].items():
        encoder = getattr(reference, name)
        np.testing.assert_array_equal(
            rows, encoder.get_input_embeddings().weight[list(map(oracle.vocabulary().get, ("blue</w>", "goose</w>")))]
        )
        encoder.resize_token_embeddings(size + VECTORS, mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        table.data[size:] = torch.tensor(rows)
        parameters[WORDS, name], kept[name] = table, table.data[:size].clone()

    def restore():
        for name, table in kept.items():
            parameters[WORDS, name].data[:size] = table

    draws = torch_training.draws()
    their_loss = partial(torch_training.loss, reference, batch, draws)
    tree = check_steps(
        trained, Objective.of(pipe.scheduler), batch, draws, parameters, their_loss, slice(size, None), restore
    )

    trained.install(tree)
    picture = our_picture(pipe, f"a blue {TOKEN}")
    trained.save(tmp_path, tree)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    ours = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    if "text_encoder_2" in trained.graphs:
        pair = load_file(tmp_path / "learned_embeds.safetensors")
        for key, encoder, tokenizer in (
            ("clip_l", "text_encoder", "tokenizer"),
            ("clip_g", "text_encoder_2", "tokenizer_2"),
        ):
            own = {"text_encoder": getattr(theirs, encoder), "tokenizer": getattr(theirs, tokenizer)}
            theirs.load_textual_inversion(pair[key], token=TOKEN, **own)
        ours.load_textual_inversion(tmp_path, TOKEN)
    else:
        theirs.load_textual_inversion(tmp_path)
        ours.load_textual_inversion(tmp_path)
    assert np.array_equal(our_picture(ours, f"a blue {TOKEN}"), picture)
    assert np.abs(picture - our_picture(ours)).max() > 0.01
    oracle.assert_close(picture, their_picture(theirs, f"a blue {TOKEN}"), 1e-4)


def test_controlnet(tmp_path):
    """Of a UNet that predicts v, with min-SNR weights."""
    reference, pipe = pipelines(tmp_path, replace(oracle.ATTENDING, **VELOCITY))
    trained = controlnet.begin(pipe)
    rng = np.random.default_rng(0)
    own = trained.initial["controlnet"]
    for name, value in own.items():  # else zeros, which hide the gradients of all that is before them
        if not value.any():
            own[name] = 0.1 * rng.standard_normal(value.shape, dtype=np.float32)
    trained.save(tmp_path / "net", trained.initial)
    net = diffusers.ControlNetModel.from_pretrained(tmp_path / "net")
    parameters = {("controlnet", name): value for name, value in net.named_parameters()}
    factor = pipe.vae.config.factor
    picture = rng.uniform(size=(2, 8 * factor, 8 * factor, 3)).astype(np.float32)
    batch, draws = torch_training.batch(reference) | {"control_image": picture}, torch_training.draws()
    their_loss = partial(torch_training.loss, reference, batch, draws, controlnet=net, snr_gamma=5.0)
    objective = Objective.of(pipe.scheduler, snr_gamma=5.0)
    tree = check_steps(trained, objective, batch, draws, parameters, their_loss)

    trained.save(tmp_path / "net", tree)
    folders = {"pretrained_model_name_or_path": tmp_path / "model"}
    net = diffusers.ControlNetModel.from_pretrained(tmp_path / "net")
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(**folders, controlnet=net)
    drawn = their_picture(theirs, image=oracle.nchw(picture[:1]), guidance_scale=1.0)
    trained.install(tree)
    given = {"control_image": picture[0], "guidance_scale": 1.0}
    oracle.assert_close(our_picture(pipe, **given), drawn, 1e-4)
    loaded = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model", controlnet=tmp_path / "net")
    assert np.array_equal(our_picture(loaded, **given), our_picture(pipe, **given))
    assert np.abs(our_picture(loaded, **given, controlnet_conditioning_scale=0.0) - drawn).max() > 0.01


def test_an_untrained_controlnet_adds_nothing(sd1_folder):
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder)
    plain = our_picture(pipe)
    trained = controlnet.begin(pipe)
    trained.install(trained.initial)
    assert np.array_equal(our_picture(pipe, control_image=np.ones((32, 32, 3), np.float32)), plain)


def test_whole_networks(tmp_path):
    """The UNet and the text encoder, with what weighs an image and a pixel."""
    reference, pipe = pipelines(tmp_path, oracle.ATTENDING)
    trained = whole.begin(pipe, train_text_encoder=True)
    parameters = {("unet", name): value for name, value in reference.unet.named_parameters()}
    encoder = {f"text_model.{name}": value for name, value in reference.text_encoder.named_parameters()}
    parameters |= {("text_encoder", name): value for name, value in encoder.items()}
    batch, draws = torch_training.batch(reference), torch_training.draws()
    batch |= {"weights": np.float32([2, 0.6]), "mask": np.float32(oracle.normal(2, 8, 8, 1) > 0)}
    their_loss = partial(torch_training.loss, reference, batch, draws)
    tree = check_steps(trained, Objective.of(pipe.scheduler), batch, draws, parameters, their_loss)

    before = our_picture(pipe)
    trained.save(tmp_path / "trained", tree)
    trained.install(tree)
    picture = our_picture(pipe)
    assert np.abs(picture - before).max() > 0.01
    assert np.array_equal(our_picture(sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "trained")), picture)
    oracle.assert_close(picture, their_picture(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "trained")), 1e-4)
