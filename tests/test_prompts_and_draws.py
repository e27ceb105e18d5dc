"""What a prompt says and a seed draws, against PyTorch's pictures of the same states and generators."""

import diffusers
import jax
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import save_file

import sdjax
from sdjax import sampling
from sdjax.runtime import parallel
from sdjax.text import prompts
from sdjax.text.tokenizer import CLIPTokenizer

CALL = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers


def load(folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(folder, mesh=parallel.data_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def ours(one_level_folder):
    """Read only."""
    return load(one_level_folder)


@pytest.fixture
def theirs(one_level_folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(one_level_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def latents():
    return oracle.normal(1, 8, 12, 4)


def assert_same(pictures, expected):
    oracle.assert_close(pictures, expected, TOLERANCE)
    assert np.std(expected) > 0.05


def text_states(theirs, ids):
    with torch.no_grad():
        return theirs.text_encoder(torch.tensor(np.atleast_2d(ids).astype(np.int64)))[0]


def test_weights_scale_states_and_keep_their_mean(ours, theirs, latents):
    """The web UI's rule, computed on PyTorch's states."""
    ids = ours.tokenizer(["a blue goose"])
    position = ids[0].tolist().index(ours.tokenizer.encode("goose")[0])
    states = text_states(theirs, ids)
    weights = torch.ones(77)
    weights[position] = 1.5
    weights[position - 1] = 1.1 * 1.1
    weighted = states * weights[None, :, None]
    weighted *= states.mean() / weighted.mean()
    expected = theirs(
        prompt_embeds=weighted, negative_prompt_embeds=text_states(theirs, ours.tokenizer([""])), **CALL,
        latents=oracle.nchw(latents),
    ).images  # fmt: skip
    assert_same(ours("a ((blue)) (goose:1.5)", latents=latents, **CALL).images, expected)


def test_long_prompts_are_read_in_chunks(ours, theirs, latents):
    words = ours.tokenizer.encode("goose blue " * 50)
    bos, eos, pad = ours.tokenizer.bos_token_id, ours.tokenizer.eos_token_id, ours.tokenizer.pad_token_id
    first, second = words[:75], words[75:]
    rows = [[bos, *first, eos], [bos, *second, eos, *[pad] * (75 - len(second))]]
    states = torch.cat([text_states(theirs, row) for row in rows], dim=1)
    negative = text_states(theirs, ours.tokenizer([""])).repeat(1, 2, 1)
    expected = theirs(
        prompt_embeds=states, negative_prompt_embeds=negative, latents=oracle.nchw(latents), **CALL
    ).images
    assert_same(ours("goose blue " * 50, latents=latents, **CALL).images, expected)


def test_pytorchs_seeds_give_pytorchs_pictures(ours, theirs):
    seeds = [0, 7, 2**40]
    expected = theirs(
        "a blue goose",
        num_images_per_prompt=3,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **CALL,
    ).images
    out = ours("a blue goose", num_images_per_prompt=3, seed=seeds, noise="torch", **CALL)
    assert_same(out.images, expected)
    assert np.abs(ours("a blue goose", seed=7, noise="cuda", **CALL).images[0] - expected[1]).max() > 1e-2


BRACKETS = r"a (blue:1.5) [goose|dog] ((goose)) AND BREAK \(blue\) <lora:a:1>"


def test_plain_prompts_are_pytorchs(tmp_path):
    """Brackets are text, long prompts are cut, and learned words apply: of SD 1, and of SDXL's pair of encoders."""
    pair = {"clip_l": torch.randn(2, 24) / 4, "clip_g": torch.randn(2, 32) / 4}
    for family, kind in ((oracle.ONE_LEVEL, "sd1"), (oracle.XL_ONE_LEVEL, "sdxl")):
        (tmp_path / kind).mkdir()
        pytorch = oracle.pipeline(tmp_path / kind, family)
        pytorch.save_pretrained(tmp_path / kind / "model")
        ours, latents = load(tmp_path / kind / "model"), oracle.normal(2, 8, 8, 4)
        if family is oracle.ONE_LEVEL:
            save_file({"<cat>": pair["clip_l"]}, tmp_path / "cat.safetensors")
            ours.load_textual_inversion(tmp_path / "cat.safetensors", "<cat>")
            pytorch.load_textual_inversion({"<cat>": pair["clip_l"]}, token="<cat>")
        side = 8 * pytorch.vae_scale_factor
        call = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np", "height": side, "width": side}
        call |= {"prompt": [BRACKETS + " <cat>", "goose, " * 50], "negative_prompt": ["[x]", "a (dog" * 40]}
        expected = pytorch(**call, latents=oracle.nchw(latents)).images
        with pytest.warns(UserWarning, match="prompts are cut at 77 tokens, left out: .*, goose, goose") as caught:
            assert_same(ours(**call, prompt_syntax="plain", latents=latents).images, expected)
        assert len(caught) == 1


DRAWING = {
    "euler_ancestral": {},
    "dpm2_ancestral": {},
    "dpmpp_2m_sde": {},
    "ddpm": {"clip_sample": False},
    "lcm": {},
    "tcd": {},
    "ddim": {"eta": 0.7},
    "dpmpp_2s": {"algorithm_type": "sde-dpmsolver++"},
}


@pytest.mark.parametrize("name", DRAWING)
def test_pytorchs_seeds_give_all_of_pytorchs_draws(ours, theirs, name):
    """The initial noise and then that of each step that draws, of a generator for each image."""
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name, **DRAWING[name])
    config = {key: value for key, value in scheduler.config.items() if key != "eta"}
    theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    eta = {"eta": scheduler.config["eta"]} if "eta" in scheduler.config else {}
    seeds, call = [7, 2**40], CALL | {"num_inference_steps": 5, "num_images_per_prompt": 2}
    expected = theirs("a goose", generator=[torch.Generator().manual_seed(s) for s in seeds], **eta, **call).images
    pictures = ours("a goose", seed=seeds, noise="torch", scheduler=scheduler, **call).images
    assert_same(pictures, expected)
    assert np.abs(ours("a goose", seed=seeds, noise="cuda", scheduler=scheduler, **call).images - pictures).max() > 1e-2


def test_pytorchs_draws_begin_anew_with_given_latents(ours, theirs, latents):
    theirs.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(theirs.scheduler.config)
    generator = torch.Generator().manual_seed(7)
    expected = theirs("a goose", latents=oracle.nchw(latents), generator=generator, **CALL).images
    call = CALL | {"scheduler": "euler_ancestral", "seed": 7, "noise": "torch"}
    assert_same(ours("a goose", latents=latents, **call).images, expected)


@pytest.mark.parametrize("name", ["[cat]", "(cat)", "<cat:1.2>", "cat (v1.2)", "[cat:2]", "[cat|AND]"])
def test_a_word_with_signs_of_the_prompt_syntax(one_level_folder, name):
    """Is read before them; weights around it are its own."""
    tokenizer = CLIPTokenizer.from_pretrained(one_level_folder, subfolder="tokenizer")
    tokenizer.add_token(name, 2)
    first = len(tokenizer) - 2
    for text, weight in ((f"a {name.upper()} goose", 1), (f"a ({name}:1.5) goose", 1.5), (f"a [({name})] goose", 1)):
        ids, weights = prompts.chunks(tokenizer, text)
        [place] = np.flatnonzero(ids[0] == first)
        assert ids[0, place + 1] == first + 1 and place == 2
        np.testing.assert_allclose(weights[0, place - 1 : place + 3], [1, weight, weight, 1])
    with pytest.raises(ValueError, match="does not load networks"):
        prompts.chunks(tokenizer, f"{name} <lora:style:1>")
