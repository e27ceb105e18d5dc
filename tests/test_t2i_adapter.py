"""T2I-Adapters against PyTorch diffusers: pictures, several at once, schedules, folders."""

import json
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from PIL import Image
from test_controlnet import HINT, compared, controlnet
from test_image_to_image import CALL, SEEDS, command, picture
from test_inpainting import mask

import sdjax
from sdjax.models import T2IAdapter, UNet2DConditionModel
from sdjax.models.attention import Context

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning"),
]
WIDTHS = {"block_out_channels": (16, 32, 32)}
SD1 = replace(
    oracle.SD1,
    unet=oracle.SD1.unet
    | WIDTHS
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
)
SDXL = replace(
    oracle.SDXL,
    unet=oracle.SDXL.unet
    | WIDTHS
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
    },
)
FULL = {"channels": (16, 32, 32), "downscale_factor": 4, "adapter_type": "full_adapter"}
LIGHT = {"channels": (16, 32), "downscale_factor": 4, "adapter_type": "light_adapter", "in_channels": 1}
XL = {"channels": (16, 32, 32, 32), "downscale_factor": 4, "adapter_type": "full_adapter_xl", "num_res_blocks": 1}
FAMILIES = {
    "sd1": (SD1, diffusers.StableDiffusionAdapterPipeline, {"full": FULL, "light": LIGHT}),
    "sdxl": (SDXL, diffusers.StableDiffusionXLAdapterPipeline, {"xl": XL, "xl_grey": XL | {"in_channels": 1}}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a family's pipeline, and those of its adapters."""
    made = {}

    def folders(name):
        if name not in made:
            family, _, kinds = FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            for seed, (kind, config) in enumerate(kinds.items()):
                oracle.randomised(diffusers.T2IAdapter(**config), seed + 5).save_pretrained(folder / kind)
            made[name] = oracle.save_pipeline(folder, family), {kind: folder / kind for kind in kinds}
        return made[name]

    return folders


@pytest.fixture(scope="module")
def pair(folders):
    """Our pipeline and PyTorch's, with adapters of these kinds."""
    made = {}

    def pair(name, *kinds):
        if (name, kinds) not in made:
            model, adapters = folders(name)
            paths = [adapters[kind] for kind in kinds]
            own = paths if len(paths) > 1 else paths[0]
            ours = sdjax.StableDiffusionPipeline.from_pretrained(model, adapter=own)
            theirs = [diffusers.T2IAdapter.from_pretrained(path) for path in paths]
            checked = {} if name == "sdxl" else {"safety_checker": None}
            own = diffusers.MultiAdapter(theirs) if len(theirs) > 1 else theirs[0]
            pytorch = FAMILIES[name][1].from_pretrained(model, adapter=own, **checked)
            pytorch.set_progress_bar_config(disable=True)
            made[name, kinds] = ours, pytorch
        return made[name, kinds]

    return pair


CASES = [
    ("sd1", "full", "ddim", {}),
    ("sd1", "light", "euler_ancestral", {"adapter_conditioning_scale": 0.6}),
    ("sdxl", "xl", "euler", {"adapter_conditioning_scale": 0.7, "adapter_conditioning_factor": 0.5}),
    ("sdxl", "xl", "dpmpp_2m", {}),
]


def renamed(options):
    """From PyTorch's names to ours."""
    names = {"adapter_conditioning_scale": "controlnet_conditioning_scale"}
    names |= {"adapter_conditioning_factor": "control_guidance_end"}
    return {names[name]: value for name, value in options.items()}


@pytest.mark.parametrize(("family", "kind", "name", "options"), CASES)
def test_pictures_are_those_of_pytorch(pair, family, kind, name, options):
    """Two pictures, each with its own, of a size that is rounded down."""
    ours, theirs = pair(family, kind)
    shown = [picture(1, 35, 50), picture(2, 35, 50)]
    shown = [one.convert("L") for one in shown] if kind == "light" else shown
    both = CALL | {"prompt": ["a goose", "blue"]}
    scheduler, expected = compared(ours, theirs, name, {"image": shown}, both | options)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **both, **renamed(options)).images
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize(("family", "kinds"), [("sd1", ("full", "light")), ("sdxl", ("xl", "xl_grey"))])
def test_several_at_once(pair, family, kinds):
    ours, theirs = pair(family, *kinds)
    shown = [picture(1, 32, 40), picture(2, 32, 40).convert("L")]
    both, options = CALL | {"prompt": "a goose"}, {"adapter_conditioning_scale": [0.5, 0.8]}
    both["num_images_per_prompt"] = 2
    scheduler, expected = compared(ours, theirs, "ddim", {"image": shown}, both | options)
    own = both | renamed(options)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **own).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), [("sd1", "full"), ("sd1", "light"), ("sdxl", "xl")])
def test_the_networks(folders, family, kind):
    """An adapter's features, of sides that halve to odd ones; and a UNet with these beside residuals."""
    model, adapters = folders(family)
    config = FAMILIES[family][2][kind]
    reference = diffusers.T2IAdapter.from_pretrained(adapters[kind])
    shown = np.abs(oracle.normal(2, 40, 28, config.get("in_channels", 3))) % 1
    theirs = reference(oracle.nchw(shown))
    adapter = T2IAdapter.from_pretrained(adapters[kind])
    features = adapter.embed_picture(np.concatenate([shown] * 3, axis=-1)[..., :3])
    for own, other in zip(features, theirs, strict=True):
        oracle.assert_close(own, oracle.nhwc(other.detach()))
    factor = 4 if family == "sd1" else 2
    unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    x, texts = oracle.normal(2, 40 // factor, 28 // factor, 4), oracle.normal(4, 7, unet.config.cross_attention_dim)
    more = {} if family == "sd1" else {"text_embeds": oracle.normal(4, 16), "time_ids": oracle.normal(4, 6)}
    ours = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    temb = ours.embed(x, np.float32([3, 900]), **more)
    skips, middle = ours.encode(ours.conv_in(x), temb, Context(texts))
    residuals = [oracle.normal(2, *own.shape[1:], seed=i) for i, own in enumerate([*skips, middle])]
    twice = [oracle.nchw(np.concatenate([own, own])) for own in (x, *residuals)]
    expected = unet(
        twice[0],
        torch.tensor([3, 900] * 2),
        torch.from_numpy(texts),
        added_cond_kwargs={name: torch.from_numpy(value) for name, value in more.items()},
        down_block_additional_residuals=twice[1:-1],
        mid_block_additional_residual=twice[-1],
        down_intrablock_additional_residuals=[torch.cat([own.detach()] * 2) for own in theirs],
    ).sample
    made = oracle.run(ours, x, np.float32([3, 900]), texts, residuals=residuals, features=features, **more)
    oracle.assert_close(made, oracle.nhwc(expected))
