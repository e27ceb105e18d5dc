"""PAG and FreeU against PyTorch diffusers."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from test_image_to_image import CALL, SEEDS, generators

import sdjax
from sdjax import sampling
from sdjax.models.freeu import freeu

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
FAMILIES = {
    "sd1": (oracle.SD1, diffusers.StableDiffusionPAGPipeline, {"safety_checker": None}),
    "sdxl": (oracle.SDXL, diffusers.StableDiffusionXLPAGPipeline, {}),
}
FREEU = {"s1": 0.9, "s2": 0.4, "b1": 1.3, "b2": 1.4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def pair(name):
        if name not in made:
            family, kind, options = FAMILIES[name]
            folder = oracle.save_pipeline(tmp_path_factory.mktemp(name), family)
            theirs = kind.from_pretrained(folder, **options)
            theirs.set_progress_bar_config(disable=True)
            made[name] = sdjax.StableDiffusionPipeline.from_pretrained(folder), theirs
        return made[name]

    return pair


CASES = [
    ("sd1", "ddim", ["mid"], {"pag_scale": 3.0}),
    ("sd1", "euler_ancestral", ["mid", "up_blocks.1"], {"pag_scale": 1.5, "guidance_rescale": 0.5}),
    ("sd1", "dpmpp_2m", ["down"], {"pag_scale": 2.0, "guidance_scale": 1.0}),
    ("sdxl", "euler", ["up_blocks.0.attentions.1"], {"pag_scale": 3.0}),
]


@pytest.mark.parametrize(("family", "name", "layers", "options"), CASES)
def test_perturbed_attention_guidance(pair, family, name, layers, options):
    ours, theirs = pair(family)
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    theirs.set_pag_applied_layers(layers)
    both = CALL | {"prompt": ["a goose", "blue"], "height": 32, "width": 24} | options
    expected = theirs(generator=generators(), **both).images
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, pag_applied_layers=layers, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)
    assert np.abs(expected - theirs(generator=generators(), **both | {"pag_scale": 0.0}).images).max() > 0.01


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_freeu(pair, family):
    ours, theirs = pair(family)
    scheduler = sampling.from_config(ours.scheduler.config, sampler="ddim")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(scheduler.config))
    theirs.enable_freeu(**FREEU)
    both = CALL | {"prompt": ["a goose", "blue"], "height": 32, "width": 24}
    expected = theirs(generator=generators(), pag_scale=0.0, **both).images
    theirs.disable_freeu()
    call = {"seed": SEEDS, "noise": "torch", "scheduler": scheduler}
    made = ours(freeu=tuple(FREEU.values()), **call, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)
    kept = ours(freeu=tuple(FREEU.values()), cache_interval=1, **call, **both).images
    np.testing.assert_allclose(kept, expected, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 5)])
def test_the_lowest_frequencies(size):
    """eq. 4 to 6, by PyTorch's Fourier transform with the origin in the middle."""
    x, skip = oracle.normal(2, *size, 6), oracle.normal(2, *size, 5, seed=1)
    b, s = np.float32([1.2, 0.8]), np.float32([0.3, 0.9])
    made_x, made_skip = freeu(x, skip, b, s)
    shifted = torch.fft.fftshift(torch.fft.fftn(oracle.nchw(skip), dim=(-2, -1)), dim=(-2, -1))
    middle = [n // 2 for n in size]
    mask = torch.ones(2, 1, *size)
    rows, columns = (slice(max(0, m - 1), m + 1) for m in middle)
    mask[:, :, rows, columns] = torch.from_numpy(s)[:, None, None, None]
    shifted = torch.fft.ifftshift(shifted * mask, dim=(-2, -1))
    oracle.assert_close(made_skip, oracle.nhwc(torch.fft.ifftn(shifted, dim=(-2, -1)).real))
    expected = np.concatenate([x[..., :3] * b[:, None, None, None], x[..., 3:]], axis=-1)
    oracle.assert_close(made_x, expected)


def test_scales_compile_nothing_and_vary_in_a_batch(pair):
    ours, _ = pair("sd1")
    call = CALL | {"prompt": "a goose", "scheduler": "euler", "height": 16, "width": 16}
    ours(**call, seed=[1, 2], pag_scale=1.0, freeu=[1, 1, 1, 1.1])
    each = {"pag_scale": [0.0, 3.0], "freeu": [[0.9, 0.5, 1.1, 1.2], [1, 1, 1, 1]], "guidance_scale": [5.0, 2.0]}
    with compilations() as compiled:
        both = ours(**call | each, seed=[1, 2]).images
    assert compiled == []
    for i in range(2):
        own = {name: values[i] for name, values in each.items()}
        alone = ours(**call | own, seed=i + 1).images[0]
        np.testing.assert_allclose(alone, both[i], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pag_scale": 3, "pag_applied_layers": "middle"},
            "'middle' is in the name of no layer; there are down_blocks.0",
        ),
        ({"pag_applied_layers": "up"}, "pag_applied_layers: only with pag_scale"),
        ({"freeu": [1e300, 1, 1, 1]}, "freeu must be numbers from 0 to 1e"),
        ({"pag_scale": -1}, "pag_scale must be a finite number from 0"),
        ({"freeu": [1, 2, 3]}, "freeu must be four numbers, s1,s2,b1,b2"),
    ],
)
def test_bad_arguments(pair, arguments, message):
    ours, _ = pair("sd1")
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL, **arguments)
    assert compiled == []
