"""T2I-Adapters against PyTorch diffusers: pictures, several at once, schedules, folders."""

import re
import warnings
from dataclasses import replace

import diffusers
import jax
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from flax import nnx
from PIL import Image
from test_controlnet import HINT, compared, controlnet
from test_image_to_image import CALL, SEEDS, command, picture
from test_inpainting import mask

import sdjax
from sdjax import components
from sdjax.models import T2IAdapter, UNet2DConditionModel
from sdjax.models.attention import Context

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning"),
]
SD1 = replace(oracle.SD1, unet=oracle.SD1.unet | {"block_out_channels": (16, 16)})
SDXL = replace(
    oracle.SDXL,
    unet=oracle.SDXL.unet
    | {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
    },
)
FULL = {"channels": (16, 16), "downscale_factor": 4, "adapter_type": "full_adapter"}
LIGHT = {"channels": (16,), "downscale_factor": 4, "adapter_type": "light_adapter", "in_channels": 1}
XL = {"channels": (16, 32, 32, 32), "downscale_factor": 4, "adapter_type": "full_adapter_xl", "num_res_blocks": 1}
FAMILIES = {
    "sd1": (SD1, diffusers.StableDiffusionAdapterPipeline, {"full": FULL, "light": LIGHT}),
    "sdxl": (SDXL, diffusers.StableDiffusionXLAdapterPipeline, {"xl": XL}),
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
    shown = [picture(1, 33, 49), picture(2, 33, 49)]
    shown = [one.convert("L") for one in shown] if kind == "light" else shown
    both = CALL | {"prompt": ["a goose", "blue"]}
    scheduler, expected = compared(ours, theirs, name, {"image": shown}, both | options)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **both, **renamed(options)).images
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_several_at_once(pair):
    ours, theirs = pair("sd1", "full", "light")
    shown = [picture(1, 32, 48), picture(2, 32, 48).convert("L")]
    both, options = CALL | {"prompt": "a goose"}, {"adapter_conditioning_scale": [0.5, 0.8]}
    both["num_images_per_prompt"] = 2
    scheduler, expected = compared(ours, theirs, "ddim", {"image": shown}, both | options)
    own = both | renamed(options)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **own).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), [("sd1", "full"), ("sd1", "light"), ("sdxl", "xl")])
def test_the_features(folders, family, kind):
    """Of sides that halve to odd ones."""
    path, channels = folders(family)[1][kind], FAMILIES[family][2][kind].get("in_channels", 3)
    shown = np.abs(oracle.normal(2, 40, 28, channels)) % 1
    theirs = diffusers.T2IAdapter.from_pretrained(path).requires_grad_(False)(oracle.nchw(shown))
    model = T2IAdapter.from_pretrained(path)
    features = nnx.jit(T2IAdapter.embed_picture)(model, np.concatenate([shown] * 3, axis=-1)[..., :3])
    for own, other in zip(features, theirs, strict=True):
        oracle.assert_close(own, oracle.nhwc(other))


def test_a_unet_with_features_and_residuals(folders):
    """For two texts a sample."""
    model, _ = folders("sdxl")
    ours = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    x, t, texts = oracle.normal(2, 12, 8, 4), np.float32([3, 900]), oracle.normal(4, 7, ours.config.cross_attention_dim)
    more = {"text_embeds": oracle.normal(4, 16), "time_ids": oracle.normal(4, 6)}

    def left(x):
        return ours.encode(ours.conv_in(x), ours.embed(x, t, **more), Context(texts))

    skips, middle = jax.eval_shape(left, x)
    residuals = [oracle.normal(2, *own.shape[1:], seed=i) for i, own in enumerate([*skips, middle])]
    shapes = ((6, 4, 16), (6, 4, 32), (3, 2, 32), (3, 2, 32))
    features = [oracle.normal(2, *shape, seed=i) for i, shape in enumerate(shapes)]
    made = oracle.run(ours, x, t, texts, residuals=residuals, features=features, **more)
    doubled, *added = (oracle.nchw(np.tile(own, (2, 1, 1, 1))) for own in (x, *residuals, *features))
    expected = theirs(
        doubled,
        torch.from_numpy(np.tile(t, 2)),
        torch.from_numpy(texts),
        added_cond_kwargs={name: torch.from_numpy(value) for name, value in more.items()},
        down_block_additional_residuals=added[: len(skips)],
        mid_block_additional_residual=added[len(skips)],
        down_intrablock_additional_residuals=added[len(residuals) :],
    ).sample
    oracle.assert_close(made, oracle.nhwc(expected))


def test_nothing_compiles_and_each_image_has_its_own(pair):
    """With a picture to start from and a mask."""
    ours, _ = pair("sd1", "full")
    shown = [picture(i, 32, 48) for i in (1, 2)]
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "seed": [1, 2]}
    call |= {"image": picture(3, 32, 48), "mask_image": mask("half", 32, 48), "strength": 0.7}
    free = ours(control_image=shown[0], controlnet_conditioning_scale=0.0, **call).images
    each = {"controlnet_conditioning_scale": [0.5, 1.5], "control_guidance_end": [0.5, 1.0]}
    with compilations() as compiled:
        both = ours(control_image=shown, **call, **each).images
    assert compiled == []
    for i in range(2):
        own = {name: values[i] for name, values in each.items()}
        alone = ours(control_image=shown[i], **call | {"seed": i + 1}, **own).images[0]
        np.testing.assert_allclose(alone, both[i], atol=1e-5)
    assert np.abs(free - both).max() > 0.02


def test_beside_a_controlnet_and_with_kept_features(folders, pair, tmp_path):
    """A ControlNet that weighs nothing is none. DeepCache: an interval of 1 is the whole network."""
    model, adapters = folders("sd1")
    controlnet(SD1, 5, **HINT).save_pretrained(tmp_path / "net")
    both = sdjax.StableDiffusionPipeline.from_pretrained(model, controlnet=tmp_path / "net", adapter=adapters["full"])
    alone, _ = pair("sd1", "full")
    call, shown = CALL | {"prompt": "a goose", "scheduler": "ddim"}, [picture(i, 32, 48) for i in (1, 2)]
    expected = alone(control_image=shown[1:], controlnet_conditioning_scale=0.7, **call).images
    made = both(control_image=shown, controlnet_conditioning_scale=[0.0, 0.7], **call).images
    np.testing.assert_allclose(made, expected, atol=1e-5)
    more = both(control_image=shown, controlnet_conditioning_scale=[0.9, 0.7], **call).images
    assert np.abs(more - made).max() > 0.01
    kept = alone(control_image=shown[1:], controlnet_conditioning_scale=0.7, cache_interval=1, **call).images
    np.testing.assert_allclose(kept, expected, atol=1e-5)
    both.save_pretrained(tmp_path / "both")
    assert sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "both").controls == both.controls


@pytest.mark.parametrize(("family", "kinds"), [("sd1", ("full", "light")), ("sdxl", ("xl",))])
def test_a_saved_pipeline_is_pytorchs(pair, tmp_path, family, kinds):
    ours, theirs = pair(family, *kinds)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked = {} if family == "sdxl" else {"safety_checker": None}
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", **checked)
        theirs.save_pretrained(tmp_path / "theirs")
    assert type(again) is type(theirs)
    assert type(again.adapter) is type(theirs.adapter)
    for name in ("ours", "theirs"):
        loaded = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / name)
        assert loaded.adapters == ours.adapters
        for own in ours.adapters:
            jax.tree.map(np.testing.assert_array_equal, loaded.params[own], ours.params[own])
    state = theirs.adapter.state_dict()
    assert state.keys() == again.adapter.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in again.adapter.state_dict().items())


@pytest.mark.parametrize(
    ("kinds", "arguments", "message"),
    [
        (("full",), {}, "control_image: 0 pictures; this pipeline has 1 T2I-Adapter: one for each"),
        (("full", "light"), {"control_image": picture(1, 16, 16)}, "1 pictures; this pipeline has 2 T2I-Adapters"),
        (("full",), {"control_image": picture(1, 16, 16), "height": 18}, "height must be a positive multiple of 4"),
    ],
)
def test_bad_arguments(pair, kinds, arguments, message):
    ours, _ = pair("sd1", *kinds)
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL, **arguments)
    assert compiled == []


def test_sides_that_an_adapter_needs(pair):
    ours, _ = pair("sdxl", "xl")
    with pytest.raises(ValueError, match="width must be a positive multiple of 4, not 18"):
        ours("a goose", control_image=picture(1, 16, 16), width=18, **CALL)


def test_an_adapter_that_does_not_fit(folders, tmp_path):
    model, _ = folders("sd1")
    other = folders("sdxl")[1]["xl"]
    with pytest.raises(
        sdjax.CheckpointError, match=r"scales of adapter, \(\(16, 4\), \(32, 4\).*are not those of the UNet"
    ):
        sdjax.StableDiffusionPipeline.from_pretrained(model, adapter=other)
    with pytest.raises(sdjax.CheckpointError, match="a T2I-Adapter, no model: load a model, with adapter= this file"):
        sdjax.StableDiffusionPipeline.from_pretrained(other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="adapter: 9 of them; 8 at most"):
        sdjax.StableDiffusionPipeline.from_pretrained(model, adapter=[other] * 9)


def original(name: str, *, is_light: bool) -> str:
    """What a parameter is called in TencentARC's files."""
    name = name.removeprefix("adapter.")
    if is_light:
        return name.replace(".resnets.", ".body.")
    level, found = re.match(r"body\.(\d)\.", name), re.sub(r"\.resnets\.\d", "", name)
    index = 2 * int(level[1]) + int("resnets.1" in name) if level else None
    return found if level is None else re.sub(r"^body\.\d", f"body.{index}", found)


@pytest.mark.parametrize(
    "config",
    [
        FULL | {"channels": (16, 32, 32), "num_res_blocks": 2},
        LIGHT | {"channels": (16, 32), "num_res_blocks": 4, "in_channels": 3},
        FULL | {"downscale_factor": 8, "in_channels": 1},
        XL | {"downscale_factor": 16, "num_res_blocks": 2},
    ],
)
@pytest.mark.parametrize("is_original", [True, False])
def test_a_single_file(tmp_path, config, is_original):
    """In the layout of TencentARC, pickled, and in that of diffusers."""
    reference = oracle.randomised(diffusers.T2IAdapter(**config), 5)
    is_light, state, path = config["adapter_type"] == "light_adapter", reference.state_dict(), tmp_path / "a.pth"
    if is_original:
        state = {original(name, is_light=is_light): value for name, value in state.items()}
        assert not any(name.startswith("adapter.") for name in state)
    torch.save(state, path)
    model = components.load_model("adapter", path, dtype=None)
    assert model.config.to_dict() == {name: reference.config[name] for name in model.config.to_dict()}
    shown = np.abs(oracle.normal(1, 32, 32, 3)) % 1
    shown = shown[..., : model.config.in_channels]
    for own, other in zip(model.adapter(shown), reference(oracle.nchw(shown)), strict=True):
        oracle.assert_close(own, oracle.nhwc(other))


def test_the_command(folders, tmp_path):
    """`generate` records adapters and pictures, `--from` finds them."""
    model, adapters = folders("sd1")
    picture(1, 32, 48).save(tmp_path / "shown.png")
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    options = ["--model", str(model), "--steps", "2", "--adapter", str(adapters["full"])]
    options += ["--control-image", str(tmp_path / "shown.png"), "--out", str(first)]
    assert command("generate", "a goose", *options) == 0
    assert command("generate", "--from", str(first), "--out", str(again)) == 0
    np.testing.assert_array_equal(Image.open(again), Image.open(first))
