"""What is encoded once and kept, and what a run of a DreamBooth is shown, against PyTorch diffusers."""

import drawn
import numpy as np
import oracle
import pytest
import torch
from diffusers import StableDiffusionPipeline as TheirPipeline
from diffusers import StableDiffusionXLPipeline as TheirXLPipeline

from sdjax import StableDiffusionPipeline
from sdjax.checkpoints.folder import variables
from sdjax.checkpoints.variables import get_value
from sdjax.training import dataset, priors
from sdjax.training.data import examples, folders
from sdjax.training.data.buckets import crop
from sdjax.training.data.encoded import Moments, TextStates, View
from sdjax.training.data.store import Store
from sdjax.training.options import Options


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return examples.checked(folders.read(drawn.folder(tmp_path_factory.mktemp("pictures"))), where="")


@pytest.fixture(scope="module")
def pipe(one_level_folder):
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_moments_are_those_of_pytorch_and_are_computed_once(pipe, one_level_folder, found, tmp_path):
    views = [View(one, crop(one.picture.size, (32, 24)), way) for one in found[:2] for way in (False, True)]
    seen, own = [], Moments(pipe, Store(tmp_path))
    own.prepare(views, lambda *report: seen.append(report))
    assert seen[-1] == ("pictures encoded", 4, 4)
    vae = TheirPipeline.from_pretrained(one_level_folder).vae
    for view in views:
        x = torch.tensor(view.pixels().astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None].contiguous()
        with torch.no_grad():
            theirs = vae.encode(x).latent_dist.parameters[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(own.get(view), theirs, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_array_equal(views[1].pixels(), views[0].pixels()[:, ::-1])
    again = Moments(pipe, Store(tmp_path))
    again.prepare(views, lambda *_: pytest.fail("computed again"))
    changed = pipe.vae.encoder.conv_in.kernel
    before = changed[...]
    changed[...] = before + 1
    assert Moments(pipe, Store(tmp_path)).digest != own.digest
    changed[...] = before


@pytest.mark.parametrize("their_kind", [TheirPipeline, TheirXLPipeline])
def test_text_states_are_those_of_pytorch(their_kind, one_level_folder, tmp_path):
    folder = one_level_folder if their_kind is TheirPipeline else oracle.save_pipeline(tmp_path, oracle.SDXL)
    own, texts = TextStates(StableDiffusionPipeline.from_pretrained(folder), Store(tmp_path)), ["a blue goose", ""]
    own.prepare(texts)
    theirs = their_kind.from_pretrained(folder)
    for text in texts:
        with torch.no_grad():
            hidden, _, *pooled = theirs.encode_prompt(
                text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        named = {"hidden": hidden[0].numpy()} | ({"pooled": pooled[0][0].numpy()} if pooled else {})
        found = own.get(text)
        assert found.keys() == named.keys()
        for name, value in named.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4 * np.abs(value).max())


def options(tmp_path, **given):
    small = {"resolution": 32, "enable_bucket": False, "train_batch_size": 2}
    return Options.of("dreambooth", data=tmp_path, out=tmp_path / "x.safetensors", **{**small, **given})


def test_class_pictures_are_made_once_and_stand_beside_the_subjects(pipe, found, tmp_path):
    given = options(tmp_path, class_prompt="a goose", num_class_images=3, prior_loss_weight=0.25)
    reports = []
    shown = dataset.prepare(given, pipe, tmp_path, tmp_path / "cache", 32, found, 2, reports.append)
    assert "class pictures made: 3 of 3" in reports
    made = {path: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert len({*made.values()}) == 3
    batch = next(shown.from_number(0))
    assert batch["weights"].tolist() == [2.0] * 4 + [0.5] * 4
    goose = TextStates(pipe, Store(tmp_path / "cache" / "texts")).get("a goose")["hidden"]
    same = [np.array_equal(states, goose) for states in batch["text"]["hidden"]]
    assert same == [False] * 4 + [True] * 4

    lost = sorted(made)[1]
    lost.unlink()
    priors.make(pipe, tmp_path / "class", "a goose", 3, (32, 32))
    assert {path: path.read_bytes() for path in (tmp_path / "class").iterdir()} == made


def test_captions_that_are_too_long_are_counted(pipe, found, tmp_path):
    long = [examples.Example(found[0].picture, "goose " * 100), *found[1:]]
    with pytest.warns(UserWarning, match=r"1 of 4 captions are cut at 77 tokens, the first of 0.png"):
        dataset.prepare(options(tmp_path, shuffle_caption=True), pipe, tmp_path, tmp_path, 32, long, 1, print)


def test_a_resolution_that_a_model_does_not_take(pipe, tmp_path):
    with pytest.raises(ValueError, match="resolution: 3 is less than 4"):
        dataset.resolution(options(tmp_path, resolution=3), pipe)
    assert dataset.resolution(options(tmp_path, resolution=None), pipe) == 32


def test_a_distilled_model_is_also_shown_no_caption(pipe, found, tmp_path):
    given = {"data": tmp_path, "out": tmp_path / "x.safetensors", "resolution": 32, "enable_bucket": False, "lcm": True}
    cached = Options.of("lora", **given, train_batch_size=2)
    batch = next(dataset.prepare(cached, pipe, tmp_path, tmp_path, 32, found, 1, print).from_number(0))
    empty = TextStates(pipe, Store(tmp_path / "texts")).get("")["hidden"]
    np.testing.assert_array_equal(batch["unconditional_text"]["hidden"], np.stack([empty, empty]))
    tokens = Options.of("lora", **given, shuffle_caption=True, train_batch_size=2)
    batch = next(dataset.prepare(tokens, pipe, tmp_path, tmp_path, 32, found, 1, print).from_number(0))
    ids = pipe.tokenizer(["", ""])
    np.testing.assert_array_equal(batch["unconditional_input_ids"]["text_encoder"], ids)


def test_only_a_controlnet_is_shown_what_metadata_has_for_one(tmp_path):
    drawn.pairs(tmp_path / "pairs")
    for method, out, is_shown in (("lora", "x.safetensors", False), ("controlnet", "net", True)):
        given = Options.of(method, data=tmp_path / "pairs", out=tmp_path / out)
        found = dataset.read(given, tmp_path, 32)
        assert [example.control is not None for example in found] == [is_shown] * 2


def test_a_pipeline_leaves_the_devices_and_comes_back(pipe):
    before = pipe("a goose", num_inference_steps=2, output_type="np").images
    pipe.leave_devices()
    values = [get_value(own) for model in pipe.models.values() for own in variables(model).values()]
    assert values and all(isinstance(value, np.ndarray) for value in values)
    np.testing.assert_array_equal(pipe("a goose", num_inference_steps=2, output_type="np").images, before)
