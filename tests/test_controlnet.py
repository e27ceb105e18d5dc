"""ControlNets against PyTorch diffusers: pictures, several at once, schedules, folders."""

import warnings
from functools import partial

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from test_image_to_image import CALL, SEEDS, generators, picture
from test_inpainting import mask

import sdjax
from sdjax import sampling
from sdjax.checkpoints.folder import variables
from sdjax.models import ControlNetModel, UNet2DConditionModel

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
HINT = {"conditioning_embedding_out_channels": (4, 6, 8)}
SHARED = ("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups", "cross_attention_dim")
SHARED += ("attention_head_dim", "transformer_layers_per_block", "use_linear_projection", "addition_embed_type")
SHARED += ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
FAMILIES = {
    "sd1": (oracle.SD1, diffusers.StableDiffusionControlNetPipeline, HINT),
    "sd2": (oracle.SD2, diffusers.StableDiffusionControlNetPipeline, {"conditioning_embedding_out_channels": (4, 6)}),
    "sdxl": (
        oracle.SDXL,
        diffusers.StableDiffusionXLControlNetPipeline,
        {"conditioning_embedding_out_channels": (4, 6)},
    ),
}
IMAGE_TO_IMAGE = {
    "sd1": diffusers.StableDiffusionControlNetImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
}
INPAINTING = {
    "sd1": diffusers.StableDiffusionControlNetInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetInpaintPipeline,
}


def controlnet(family, seed: int, **config) -> diffusers.ControlNetModel:
    shared = {name: family.unet[name] for name in SHARED if name in family.unet}
    return oracle.randomised(diffusers.ControlNetModel(**shared | config), seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a pipeline and those of its ControlNets."""
    made = {}

    def folders(name, **options):
        key = (name, *options.items())
        if key not in made:
            family, _, config = FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            nets = [controlnet(family, seed, **config | options) for seed in (5, 6)]
            for i, net in enumerate(nets):
                net.save_pretrained(folder / f"net{i}")
            made[key] = oracle.save_pipeline(folder, family), folder
        return made[key]

    return folders


@pytest.fixture(scope="module")
def pair(folders):
    """Our pipeline, and PyTorch's of a class, with one ControlNet or several."""
    made = {}

    def pair(name, kind, nets=1, **options):
        key = (name, nets, *options.items())
        model, folder = folders(name, **options)
        paths = [folder / f"net{i}" for i in range(nets)]
        if key not in made:
            own = paths[0] if nets == 1 else paths
            made[key] = sdjax.StableDiffusionPipeline.from_pretrained(model, controlnet=own)
        theirs = [diffusers.ControlNetModel.from_pretrained(path) for path in paths]
        checked = {} if name == "sdxl" else {"safety_checker": None}
        pytorch = kind.from_pretrained(model, controlnet=theirs[0] if nets == 1 else theirs, **checked)
        pytorch.set_progress_bar_config(disable=True)
        return made[key], pytorch

    return pair


def compared(ours, theirs, name, given, both):
    """given: by PyTorch's names."""
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    expected = theirs(generator=generators(), **given, **both).images
    return scheduler, expected


CASES = [
    ("sd1", "ddim", {}),
    ("sd1", "euler_ancestral", {"controlnet_conditioning_scale": 0.6, "control_guidance_end": 0.6}),
    ("sd1", "heun", {"control_guidance_start": 0.3}),
    ("sd1", "dpmpp_2m", {"guess_mode": True}),
    ("sd2", "dpmpp_2m", {"control_guidance_start": 0.1, "control_guidance_end": 0.8}),
    ("sdxl", "euler", {"controlnet_conditioning_scale": 0.7}),
    ("sdxl", "dpmpp_2m_sde", {"guess_mode": True}),
]


@pytest.mark.parametrize(("family", "name", "options"), CASES)
def test_pictures_are_those_of_pytorch(pair, family, name, options):
    """Two pictures, each with its control, of a size that is rounded down."""
    ours, theirs = pair(family, FAMILIES[family][1])
    shown = [picture(1, 35, 50), picture(2, 35, 50)]
    both = CALL | options | {"prompt": ["a goose", "blue"]}
    scheduler, expected = compared(ours, theirs, name, {"image": shown}, both)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_several_at_once(pair, family):
    ours, theirs = pair(family, FAMILIES[family][1], nets=2)
    shown = [picture(1, 32, 40), picture(2, 32, 40)]
    both = CALL | {"prompt": "a goose", "controlnet_conditioning_scale": [0.5, 0.8], "control_guidance_end": [1.0, 0.5]}
    both["control_guidance_start"] = [0.0, 0.1]
    scheduler, expected = compared(ours, theirs, "ddim", {"image": shown}, both | {"num_images_per_prompt": 2})
    made = ours(
        control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, num_images_per_prompt=2, **both
    ).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_with_a_picture_to_start_from(pair, family):
    ours, theirs = pair(family, IMAGE_TO_IMAGE[family])
    own, shown = [picture(i, 32, 40) for i in (1, 2)], [picture(i, 32, 40) for i in (3, 4)]
    both = CALL | {"prompt": ["a goose", "blue"], "image": own, "strength": 0.6, "control_image": shown}
    both["controlnet_conditioning_scale"] = 0.8
    scheduler, expected = compared(ours, theirs, "euler", {}, both)
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_with_a_mask(pair, family):
    ours, theirs = pair(family, INPAINTING[family])
    own, shown = [picture(i, 32, 40) for i in (1, 2)], [picture(i, 32, 40) for i in (3, 4)]
    both = CALL | {"prompt": ["a goose", "blue"], "image": own, "mask_image": [mask("half", 32, 40)] * 2}
    both |= {"strength": 0.7, "control_image": shown, "controlnet_conditioning_scale": 0.8}
    size = {"height": 40, "width": 32}
    scheduler, expected = compared(ours, theirs, "ddim", size, both)
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, keep_unmasked=False, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_residuals_that_are_averaged(pair):
    """`global_pool_conditions`, which also means guess mode, and colours in the order blue, green, red."""
    options = {"global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"}
    ours, theirs = pair("sd1", FAMILIES["sd1"][1], **options)
    both = CALL | {"prompt": ["a goose", "blue"], "controlnet_conditioning_scale": 0.5}
    shown = [picture(1, 32, 32), picture(2, 32, 32)]
    scheduler, expected = compared(ours, theirs, "ddim", {"image": shown}, both)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_nothing_compiles_and_each_image_has_its_own(pair):
    ours, _ = pair("sd1", FAMILIES["sd1"][1])
    shown = [picture(i, 16, 16) for i in (1, 2)]
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "seed": [1, 2]}
    ours(control_image=shown[0], **call)
    each = {
        "controlnet_conditioning_scale": [0.5, 1.5],
        "control_guidance_end": [0.5, 1.0],
        "guess_mode": [True, False],
    }
    with compilations() as compiled:
        both = ours(control_image=shown, **call, **each).images
    assert compiled == []
    for i in range(2):
        own = {name: values[i] for name, values in each.items()}
        alone = ours(control_image=shown[i], **call | {"seed": i + 1}, **own).images[0]
        np.testing.assert_allclose(alone, both[i], atol=1e-5)
    free = ours(control_image=shown, **call, controlnet_conditioning_scale=0.0).images
    plain = sdjax.StableDiffusionPipeline(
        ours.text_encoder, ours.unet, ours.vae, ours.tokenizer, ours.scheduler, ours.mesh
    )
    np.testing.assert_allclose(free, plain(**call, height=16, width=16).images, atol=1e-5)
    assert np.abs(free - both).max() > 0.02


def test_kept_features(pair):
    """DeepCache with a ControlNet: an interval of 1 is the whole network."""
    ours, _ = pair("sd1", FAMILIES["sd1"][1])
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "control_image": picture(1, 16, 16)}
    whole = ours(**call).images
    np.testing.assert_allclose(ours(**call, cache_interval=1).images, whole, atol=1e-5)
    assert 0 < np.abs(ours(**call, cache_interval=3).images - whole).max() < 0.5


@pytest.mark.parametrize("nets", [1, 2])
def test_a_saved_pipeline_is_pytorchs(pair, tmp_path, nets):
    ours, theirs = pair("sd1", FAMILIES["sd1"][1], nets=nets)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", safety_checker=None)
        theirs.save_pretrained(tmp_path / "theirs")
    assert type(again) is type(theirs)
    assert type(again.controlnet) is type(theirs.controlnet)
    call = CALL | {"prompt": "a goose", "num_inference_steps": 2, "scheduler": "ddim"}
    shown = [picture(i, 16, 16) for i in range(nets)]
    made = [ours(control_image=shown, **call).images]
    for folder in ("ours", "theirs"):
        loaded = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / folder)
        assert loaded.controlnets == ours.controlnets
        made.append(loaded(control_image=shown, **call).images)
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


@pytest.mark.parametrize(
    ("nets", "arguments", "message"),
    [
        (1, {}, "control_image: 0 pictures; this pipeline has 1 ControlNets: one for each"),
        (2, {"control_image": picture(1, 16, 16)}, "control_image: 1 pictures; this pipeline has 2"),
        (1, {"control_image": [[picture(1, 16, 16)] * 2]}, "control_image: 2 pictures; this pipeline has 1"),
        (1, {"control_image": 3}, "control_image: must be a file, a PIL picture or an array"),
        (2, {"control_image": [picture(1, 16, 16)] * 2, "control_guidance_end": [1, 1, 1]}, "end: 3 values for 2"),
        (
            1,
            {"control_image": picture(1, 16, 16), "control_guidance_end": 0.2, "control_guidance_start": 0.5},
            "control_guidance_start, 0.5, must be below control_guidance_end, 0.2",
        ),
        (1, {"control_image": picture(1, 16, 16), "controlnet_conditioning_scale": -1}, "from 0 to 1e"),
    ],
)
def test_bad_arguments(pair, nets, arguments, message):
    ours, _ = pair("sd1", FAMILIES["sd1"][1], nets=nets)
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL, **arguments)
    assert compiled == []


def test_a_control_picture_without_a_controlnet(sd1_folder):
    ours = sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder)
    with pytest.raises(ValueError, match="control_image: this pipeline has no ControlNet; load it with controlnet="):
        ours("a goose", control_image=picture(1, 16, 16), **CALL)


def test_a_controlnet_of_another_family(folders):
    model, _ = folders("sd1")
    _, other = folders("sdxl")
    with pytest.raises(sdjax.CheckpointError, match="addition_embed_type of controlnet, text_time, are not the UNet's"):
        sdjax.StableDiffusionPipeline.from_pretrained(model, controlnet=other / "net0")


def test_the_network(folders):
    """Its residuals for two texts a picture are those of PyTorch, for each of them."""
    _, folder = folders("sd1")
    reference = diffusers.ControlNetModel.from_pretrained(folder / "net0").requires_grad_(False)
    model = ControlNetModel.from_pretrained(folder / "net0")
    x, shown, texts = oracle.normal(2, 8, 6, 4), np.abs(oracle.normal(2, 32, 24, 3)) % 1, oracle.normal(4, 7, 24)
    embedded = model.embed_picture(shown)
    residuals = oracle.run(model, x, np.float32([3, 900]), texts, picture=embedded)
    twice = [torch.from_numpy(np.concatenate([v, v])) for v in (np.moveaxis(x, -1, 1), np.moveaxis(shown, -1, 1))]
    down, middle = reference(
        twice[0].contiguous(),
        torch.tensor([3, 900] * 2),
        torch.from_numpy(texts),
        twice[1].contiguous(),
        return_dict=False,
    )
    for ours, theirs in zip(residuals, [*down, middle], strict=True):
        repeated = np.concatenate([ours] * (4 // len(ours)))
        oracle.assert_close(repeated, oracle.nhwc(theirs))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_training_begins_with_is_pytorchs(family, tmp_path):
    """From the same UNet: all that both have, and nothing that it adds; only what sees the picture is new."""
    config, hint = FAMILIES[family][0].unet, {"conditioning_embedding_out_channels": (4, 6, 8)}
    reference = oracle.unet(config)
    theirs = diffusers.ControlNetModel.from_unet(reference, **hint)
    unet = oracle.ported(partial(UNet2DConditionModel.from_config, config), reference)
    ControlNetModel.from_unet(unet, **hint).save_pretrained(tmp_path)
    ours = diffusers.ControlNetModel.from_pretrained(tmp_path)
    assert ours.config["cross_attention_dim"] == theirs.config["cross_attention_dim"]
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        if not name.startswith("controlnet_cond_embedding") or name.startswith("controlnet_cond_embedding.conv_out"):
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        else:
            assert value.shape == expected[name].shape


def test_training_begins_without_layers_that_are_not_wanted():
    config = oracle.SD1.unet
    unet = oracle.ported(partial(UNet2DConditionModel.from_config, config), oracle.unet(config))
    plain = {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}
    model = ControlNetModel.from_unet(unet, **plain)
    assert not any("attention" in name for name in variables(model))
    own, given = variables(model), variables(unet)
    np.testing.assert_array_equal(own["mid_block.resnets.0.conv1.weight"], given["mid_block.resnets.0.conv1.weight"])
